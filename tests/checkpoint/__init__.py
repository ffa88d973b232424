"""Checkpoints as real trainers write them."""
