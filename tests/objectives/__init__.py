"""Losses as functions of what tokens' log-probabilities are."""
