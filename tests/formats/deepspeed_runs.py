"""The runs of DeepSpeed: where a user may point, what must be said besides, and copies that may be damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fkernel import checkpoint
from fkernel.checkpoint import files, formats
from fkernel.checkpoint.files import read_tensors
from fkernel.checkpoint.formats import deepspeed
from tests.formats.family import copied, loaded
from tests.formats.policy import tiny
from tests.formats.saving import save_again

TAG = "global_step2"
PLACES: dict[str, tuple[str, ...]] = {
    **{f"deepspeed_zero{stage}_{dtype}": (".", TAG) for stage in range(4) for dtype in ("fp32", "bf16")},
    **{f"deepspeed_zero0_{name}": (".", TAG) for name in ("fused", "fused_fp32")},
    **{f"deepspeed_zero1_{name}": (".", TAG) for name in ("fp32_gradients", "elastic", "frozen")},
    **{f"deepspeed_zero2_{name}": (".", TAG) for name in ("aligned", "round_robin")},
    **{f"deepspeed_zero3_{name}": (".", TAG) for name in ("frozen", "subgroups", "fused")},
    "deepspeed_openrlhf": (".", "_actor", f"_actor/{TAG}"),
    "deepspeed_open_instruct": (".", TAG),
    "deepspeed_accelerate": (".", "pytorch_model"),
    **{f"deepspeed_trainer_{name}": ("checkpoint-2", f"checkpoint-2/{TAG}") for name in ("zero2", "zero3", "lora")},
}
"""{run: what a user may point at; all are the same checkpoint}."""
UNTIED = ("deepspeed_zero2_aligned", "deepspeed_zero2_round_robin", "deepspeed_zero3_subgroups")
UNSAID = ("deepspeed_openrlhf", "deepspeed_zero0_fused", "deepspeed_zero0_fused_fp32", "deepspeed_zero3_fused")
"""A client's FusedAdam or DeepSpeedCPUAdam: no file says whether decay is decoupled."""
SHARDED = [run for run in PLACES if "zero0" not in run]
FLAT = ["deepspeed_zero1_bf16", "deepspeed_zero2_fp32", "deepspeed_openrlhf", "deepspeed_trainer_zero2"]
SLICED = ["deepspeed_zero3_fp32", "deepspeed_zero3_subgroups", "deepspeed_trainer_zero3"]


def options_of(run: str, path: Path) -> dict[str, Any]:
    """What a user must say besides the path."""
    said: dict[str, Any] = {"decoupled": True} if run in UNSAID else {}
    if "trainer" not in run:
        said["model"] = tiny(seed=7, tied=run not in UNTIED)
    if "lora" in run:
        said["base"] = path / "base"
    return said


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is among those that are tried."""
    monkeypatch.setitem(formats.FORMATS, "deepspeed", formats.Format(deepspeed.find, deepspeed.read))
    numpy = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
    known = files.STAND_INS
    monkeypatch.setattr(files, "STAND_INS", (*known, *(name for name in numpy if name not in known)))


class Fresh:
    """A copy of a run that may be damaged."""

    def __init__(self, run: str, directory: Path) -> None:
        self.run = run
        self.root, self.truth = copied(run, directory)
        self.path = self.root / PLACES[run][0]
        self.tag = self.root / PLACES[run][-1]

    def load(self, **options: Any) -> checkpoint.Checkpoint:
        return loaded(self.path, **{**options_of(self.run, self.root), **options})

    def file(self, name: str) -> Path:
        return next(path for path in sorted(self.tag.iterdir()) if name in path.name)

    def edit(self, name: str, change: Callable[[Any], None], every: bool = False) -> Path:
        """Change what files hold and save them under their own names: their sums are right."""
        found = [path for path in sorted(self.tag.iterdir()) if name in path.name]
        for path in found if every else found[:1]:
            held = read_tensors(path, "a file")
            held.pop("rng_states", None)  # numpy's, which only numpy writes
            change(held)
            save_again(held, path)
        return found[0]


def runs(*names: str) -> Any:
    return pytest.mark.parametrize("fresh", names, indirect=True)
