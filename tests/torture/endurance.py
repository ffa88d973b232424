"""Hundreds of requests in one process, and hundreds of recorded steps: memory, open files and time stay what they were.

    python -m tests.torture.endurance [--requests 200] [--steps 500] [--out FILE]

Each series is compared with itself: its last quarter with its second one, the first being warming up. Time is what the
process computed, not what it waited for others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fkernel.record import Recorder
from fkernel.study import FisherKernelPlan, FisherKernelRunner
from tests.record.loops import adamw, gpt2, take
from tests.study.conftest import Run, made

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "torture_endurance.json"
GROWTH = 0.05
"""Of memory, at most, over the last half."""
SLOWER = 1.25
"""A call of the last quarter, by one of the second, at most."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def series(calls: Iterator[Callable[[], Any]]) -> dict[str, Any]:
    """Make calls one after the other; how memory, open files and time went.

    Args:
        calls: each is made once.
    """
    memory, files, seconds = list[int](), list[int](), list[float]()
    for call in calls:
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        files.append(len(os.listdir("/proc/self/fd")))
    quarter = len(memory) // 4
    second, last = slice(quarter, 2 * quarter), slice(-quarter, None)
    return {
        "calls": len(memory),
        "memory, MB": [round(median(memory[part]) / 1e6, 1) for part in (second, last)],
        "memory's growth": round(median(memory[last]) / median(memory[second]) - 1, 4),
        "open files": [max(files[part]) for part in (second, last)],
        "seconds of a call": [round(median(seconds[part]), 4) for part in (second, last)],
        "last by second quarter": round(median(seconds[last]) / median(seconds[second]), 3),
    }


def wrong_with(found: dict[str, Any]) -> list[str]:
    """What of a series is not flat."""
    wrong = ["memory grows"] if found["memory's growth"] > GROWTH else []
    wrong += ["files stay open"] if found["open files"][1] > found["open files"][0] else []
    return wrong + (["calls get slower"] if found["last by second quarter"] > SLOWER else [])


def requests(run: Run, out: Path, count: int) -> dict[str, Any]:
    """One workspace, and so many requests about one sequence each, no two of the same."""
    plan = FisherKernelPlan.model_validate(run.plan(out, self_kernel=False, requests=[]))
    kind = {"kind": "custom_sequence", "prompt": "3+4="}
    probes = [{**kind, "name": f"probe-{i}", "response": f"{i % 7}"} for i in range(count)]
    asked = FisherKernelPlan.model_validate({**run.plan(out), "requests": probes}).requests
    runner = FisherKernelRunner(plan)
    with runner.prepare_update_workspace():
        return series((lambda request=request: runner.evaluate_batch(request)) for request in asked)


def steps(place: Path, count: int) -> dict[str, Any]:
    """So many recorded steps."""
    model = gpt2()
    optimizer = adamw(model, 1e-4)
    with Recorder(place, model, optimizer, snapshots=50) as recorder:
        return series((lambda: take(recorder, model, optimizer)) for _ in range(count))


def main() -> int:
    """Measure both, and save them."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.endurance", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fkernel-torture-") as work:
        found = {"recorded steps": steps(Path(work, "recording"), given.steps)}
        found["requests"] = requests(made(Path(work, "run")), Path(work, "out"), given.requests)
    for each in found.values():
        each["wrong"] = wrong_with(each)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
