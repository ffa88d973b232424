"""Optimizers' steps against the real optimizers."""
