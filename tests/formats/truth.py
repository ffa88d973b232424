"""What a writer knew when it saved, and the step that it took next: every format is tested against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file

from fkernel.shapes import Tree

TREES = ("theta", "exp_avg", "exp_avg_sq", "grads", "after", "rounded")


class Truth(NamedTuple):
    """One training's state at the checkpoint, brought together from its ranks by its own package, not by our readers.

    All are {parameter name of the model: tensor}, trained parameters only.

    Attributes:
        theta: what the optimizer steps: fp32 masters where the trainer keeps any, else the weights.
        exp_avg: the first moments.
        exp_avg_sq: the second moments.
        grads: what the optimizer was given for the next step, clipped.
        after: θ after that step.
        rounded: the half-precision weights that the policy ran with at the checkpoint; {} where θ is what it ran with.
        meta: {"step": steps taken at the checkpoint, "lr": of the next step, "versions": {package: version}, …}.
    """

    theta: Tree
    exp_avg: Tree
    exp_avg_sq: Tree
    grads: Tree
    after: Tree
    rounded: Tree
    meta: Mapping[str, Any]


def save_truth(directory: Path, truth: Truth) -> None:
    """Write truth.safetensors."""
    leaves = {
        f"{tree}/{name}": leaf.detach().cpu().contiguous().clone()
        for tree in TREES
        for name, leaf in getattr(truth, tree).items()
    }
    save_file(leaves, directory / "truth.safetensors", metadata={"meta": json.dumps(dict(truth.meta))})


def load_truth(directory: Path) -> Truth:
    """Read truth.safetensors."""
    trees: dict[str, dict[str, Any]] = {tree: {} for tree in TREES}
    with safe_open(directory / "truth.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            tree, _, name = key.partition("/")
            trees[tree][name] = file.get_tensor(key)
        meta = json.loads(file.metadata()["meta"])
    return Truth(**trees, meta=meta)
