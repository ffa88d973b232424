"""What it costs that everything is flushed to disk before it gets its name: the same calls, with fsync and without.

    python -m tests.torture.flushing [--rounds 5]

Sides take turns; the ratio is of the fastest of each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from tests.torture.crashes import in_child
from tests.torture.scenarios import SCENARIOS


def seconds(name: str, inputs: Path, root: Path, flush: bool) -> float:
    """One call, in a process of its own."""
    root.mkdir()

    def call() -> float:
        if not flush:
            os.fsync = lambda file: None
        began = time.perf_counter()
        SCENARIOS[name].act(inputs, root)
        return time.perf_counter() - began

    ended = in_child(call, root.with_name("log"))
    assert not ended.status, ended.said
    return float(ended.said)


def main() -> None:
    """Print a line for each scenario."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.flushing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name in ("store", "record", "sample", "run"):
        with tempfile.TemporaryDirectory(prefix="fkernel-torture-") as work:
            inputs = Path(work, "inputs")
            inputs.mkdir()
            ended = in_child(lambda name=name, inputs=inputs: SCENARIOS[name].make(inputs), Path(work, "log"))
            assert not ended.status, ended.said
            sides = {flush: [0.0] * rounds for flush in (True, False)}
            for i in range(rounds):
                for flush, times in sides.items():
                    times[i] = seconds(name, inputs, Path(work, f"{flush}-{i}"), flush)
        with_, without = min(sides[True]), min(sides[False])
        print(f"{name}: {with_:.3f} s with fsync, {without:.3f} s without: {with_ / without:.2f}", flush=True)


if __name__ == "__main__":
    main()
