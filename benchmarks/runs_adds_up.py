"""Does an account of a real run add up? What is left of the realised change, and how far a replay is from the run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs_made import Reward, Setting, exact, probes_of, problems, recorded
from fkernel import tree
from fkernel.record import Recording, distance, replay
from fkernel.shapes import Tree
from fkernel.study import AccountResults, account_recording

STEPS = 16
TARGETS = {"midpoint": 3e-3, "gauss2": 5e-4}
"""Shares of the realised change that remainder and unexplained may leave together; two nodes, or the rounding floor."""
REPLAY = 1e-5
"""Distance of a replay from the run, relative to how far the run went."""
KINDS: dict[str, dict[str, Any]] = {
    "DAPO": {},
    "CISPO, KL 0.05, two inner epochs": {"options": {"loss_type": "cispo", "beta": 0.05, "num_iterations": 2}},
    "LoRA, lr 1e-3": {"lora": True, "options": {"learning_rate": 1e-3}},
    "bf16 autocast": {"options": {"bf16": True, "gradient_checkpointing": True}},
}
PROBES = probes_of(
    [("37+25=", "62"), ("37+25=", "52"), ("84-19=", "65"), ("84-19=", "75"), ("12-57=", "-45"), ("66+77=", "143")]
)


def measured(
    base: Path, kinds: dict[str, dict[str, Any]] | None = None, steps: int = STEPS, reward: Reward = exact
) -> list[dict[str, Any]]:
    """Account for each kind of run, on both paths, and replay it.

    Args:
        base: the policy that they begin with.
        kinds: changes of the setting, by name; None for all.
        steps: of each run.
        reward: that they are trained on.
    """
    rows = []
    for name, changes in (KINDS if kinds is None else kinds).items():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            recording = recorded(place, base, Setting(steps, (reward,), problems(64), **changes))
            row: dict[str, Any] = {"run": name, "steps": steps}
            for path in TARGETS:
                row[path] = _shares(account_recording(recording, PROBES, place / path, path=path, p_values=False))
            rows.append(row | _apart(recording))
    return rows


def _apart(recording: Recording) -> dict[str, float]:
    """How far a replay is from the run: in all parameters, and without keys' biases, which no log π depends on."""
    *_, last = replay(recording)
    first, there = recording.snapshot(recording.snapshots[0]).params, recording.snapshot(last.number).params
    used = [name for name in there if not name.endswith("k_proj.bias")]

    def size(a: Tree, b: Tree) -> float:
        return float(tree.norm({name: a[name].double() - b[name].double() for name in used}))

    return {"replay": distance(recording, last) or 0.0, "replay_used": size(last.params, there) / size(there, first)}


def _shares(made: AccountResults) -> dict[str, float]:
    """Sizes of columns over the realised change, over all probes."""
    size = float(np.linalg.norm(made["realised"]))
    shares = {
        name: float(np.linalg.norm(made[name])) / size for name in ("arithmetic", "unexplained", "remainder", "floor")
    }
    left = shares["unexplained"] + shares["remainder"]
    momentum = float(np.linalg.norm(made["momentum"]) / np.linalg.norm(made["own"]))
    return {
        "left": left,
        **shares,
        "momentum_over_own": momentum,
        "largest_change": float(np.abs(made["realised"]).max()),
    }


def met(path: str, shares: dict[str, float]) -> bool:
    """Whether a run's account leaves little enough."""
    return shares["left"] <= max(TARGETS[path], shares["floor"])
