"""`python -m benchmarks.runs`: does the account of a whole run add up, predict, find culprits, and at what cost?

    adds_up     real TRL runs: what their accounts leave of the realised change, and how far a replay is from the run
    linear      replays without half of the sequences against predictions: a linear datamodeling score
    culprits    runs with a planted mistake: are the sequences that it paid ranked first?
    cost        an account's time over that of the passes it cannot do without, and its peak memory
    explaind    beside ExPLAIND, on a run of its own

Results and environments go to benchmarks/results/runs.json, tables to docs/run_proofs.md. One thread throughout,
so that it can be measured on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs_adds_up, runs_cost, runs_culprits, runs_explaind, runs_linear
from benchmarks.environment import ROOT, environment
from benchmarks.runs_made import odd_digits, small_policy, trained_policy
from benchmarks.runs_page import page

RESULTS = ROOT / "benchmarks" / "results" / "runs.json"
PAGE = ROOT / "docs" / "run_proofs.md"
PARTS = ("adds_up", "linear", "culprits", "explaind", "cost")


def measured(part: str) -> Any:
    """Measure one part, whole."""
    if part == "cost":
        return runs_cost.all_of_it()
    if part == "explaind":
        return runs_explaind.measured() if runs_explaind.available() else runs_explaind.MISSING
    module: Any = {"adds_up": runs_adds_up, "linear": runs_linear, "culprits": runs_culprits}[part]
    return module.measured(trained_policy())


def quick(place: Path) -> dict[str, Any]:
    """A small instance of what needs no process of its own, on a random policy."""
    base = small_policy(place / "base")
    few: dict[str, Any] = {"per_device_train_batch_size": 8, "learning_rate": 3e-4}
    window = {"after 4 steps": runs_linear.Window(4, few)}
    return {
        "adds_up": {"rows": runs_adds_up.measured(base, {"DAPO": {"options": few}}, 4, odd_digits)},
        "linear": {"rows": runs_linear.measured(base, window, 4, 4, odd_digits, peers=False)},
        "culprits": {"rows": runs_culprits.measured(base, ["reward bug"], 4, few)},
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Hold accounts of whole runs against what happened.")
    parser.add_argument("--quick", action="store_true", help="a small policy, and nothing is written")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts; the results of the others stay")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(runs_cost.THREADS)
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            print(page(quick(Path(folder))))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in given.only or PARTS:
        about = environment() | {"threads": runs_cost.THREADS}
        results = written({**results, part: {"environment": about, "rows": measured(part)}})
    print(page(results))


def written(results: Mapping[str, Any]) -> dict[str, Any]:
    """Save results, parts in order, and their page."""
    ordered = {part: results[part] for part in PARTS if part in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(ordered))
    return ordered


if __name__ == "__main__":
    main()
