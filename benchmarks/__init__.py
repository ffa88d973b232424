"""Speed and memory of every low-level module, as ratios to the limit. `python -m benchmarks`; see README.md."""
