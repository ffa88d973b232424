"""Prompts, samples, rewards, advantages, records, files."""
