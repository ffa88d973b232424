"""Gradient handles on disk: what is read is what was written, or an error says why not."""
