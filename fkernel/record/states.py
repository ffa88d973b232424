"""When the state of a training is kept, and keeping it: what is trained of θ, and what optimizers keep of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fkernel.errors import ModelError
from fkernel.record.directory import SNAPSHOTS, numbered, place_of, write_snapshot
from fkernel.record.optimizers import entries_of, settings_of
from fkernel.record.resuming import snapshot_is_new
from fkernel.shapes import Tensor

FIRST, EVERY = "first", "every"
ON_RESUME = ("compare", "replace")


def snapshot_due(directory: Path, snapshots: str | int, number: int) -> bool:
    """Tell whether the state before a step is kept; the first of a recording always is.

    Args:
        directory: of the recording.
        snapshots: "first", "every" or every k-th.
        number: of the step.
    """
    k = 1 if snapshots == EVERY else 0 if snapshots == FIRST else int(snapshots)
    return (k > 0 and number % k == 0) or not numbered(directory, SNAPSHOTS)


def write_state(
    directory: Path,
    number: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    trained: Mapping[str, Tensor],
    resume: str,
) -> Path:
    """Keep θ and the optimizers' state as they are now.

    Args:
        directory: of the recording.
        number: of the step that comes next.
        model: that is trained.
        optimizers: of it.
        trained: {name: parameter} that they move.
        resume: what happens to a snapshot that is there: "compare" or "replace".

    Returns:
        Where it is.

    Raises:
        StoreError: there is one with other weights.
    """
    place = place_of(directory, SNAPSHOTS, number)
    tensors, rest = entries_of(model, optimizers)
    tensors = {name: leaf for name, leaf in tensors.items() if name.rpartition("/")[0] in trained}
    facts = {"number": number, "groups": [settings_of(each) for each in optimizers], "state": rest}
    if snapshot_is_new(directory, number, trained, resume):
        write_snapshot(place, facts, {**trained}, tensors)
    return place


def check_arguments(snapshots: str | int, resume: str) -> None:
    """Check a recorder's choices.

    Raises:
        ModelError: there is no such choice.

    Example:
        >>> check_arguments("often", "compare")
        Traceback (most recent call last):
        fkernel.errors.ModelError: snapshots is 'often'; expected 'first', 'every' or a number of steps.
    """
    number = isinstance(snapshots, int) and not isinstance(snapshots, bool) and snapshots > 0
    if not number and snapshots not in (FIRST, EVERY):
        raise ModelError(f"snapshots is {snapshots!r}; expected 'first', 'every' or a number of steps.")
    if resume not in ON_RESUME:
        raise ModelError(f"resume is {resume!r}; expected one of {', '.join(map(repr, ON_RESUME))}.")
