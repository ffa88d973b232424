"""The whole torture: `make torture`. Each part goes on where it was stopped, and saves JSON to benchmarks/results/."""

import sys

from tests.torture import crashes, inputs

if __name__ == "__main__":
    sys.exit(crashes.main() | inputs.main())
