"""Accounts of whole runs: probes, the sweep over a recording, what is written of it."""
