"""Several real processes."""
