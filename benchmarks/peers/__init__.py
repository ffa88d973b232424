"""The exact kernel against other implementations of it, in time and in value. `python -m benchmarks.peers`."""
