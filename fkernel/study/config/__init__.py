"""Plans: what is asked of a study, checked when it is read."""
