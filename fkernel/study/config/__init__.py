"""Plans: the configuration of a study, as pydantic models."""
