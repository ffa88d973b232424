"""A run that is killed and resumed: is this step, or snapshot, already there, and is it the same one?

A step that is there is compared, never silently overwritten. One that differs is the step of a run that went another
way since: the recorder stops, or moves it and all after it to `replaced/` where it was told to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fkernel.errors import StoreError
from fkernel.record.directory import (
    SNAPSHOTS,
    STEPS,
    numbered,
    place_of,
    read_snapshot,
    read_step,
    set_aside,
)
from fkernel.record.layout import RecordedMicrobatch
from fkernel.shapes import Tensor

SAME = 1e-4
"""Relative difference of ω, or of θ, up to which a repeated step is the same: another order of sums, no other step."""


def check_empty(directory: Path) -> None:
    """Check that there is no step yet, where nobody says which one comes next.

    Args:
        directory: of the recording.

    Raises:
        StoreError: there is one.
    """
    steps = numbered(directory, STEPS)
    if steps:
        raise StoreError(
            f"{str(directory)!r} holds the steps {steps[0]} to {steps[-1]} already. If the run is resumed, say which "
            f"step this is: recorder.step(number=…); else choose another directory."
        )


def step_is_new(
    directory: Path, number: int, facts: Mapping[str, Any], microbatches: Sequence[RecordedMicrobatch], resume: str
) -> bool:
    """Tell whether a step is to be written.

    Args:
        directory: of the recording.
        number: of the step.
        facts: its settings.
        microbatches: of it.
        resume: "compare" or "replace".

    Returns:
        False where it is there, and the same.

    Raises:
        StoreError: another one is there, and resume is "compare".
    """
    if number not in numbered(directory, STEPS):
        return True
    before, passes, _ = read_step(place_of(directory, STEPS, number))
    differs = _difference(before, passes, facts, microbatches)
    if differs is None:
        return False
    if resume != "replace":
        raise StoreError(
            f"Step {number} is recorded in {str(directory)!r} already, and {differs} differ(s): the resumed run "
            f"goes another way from here. Recorder(…, resume='replace') moves the old step, and all after it, to "
            f"'replaced/'; or choose another directory."
        )
    # The last one first, and the step that differs last of all: after a kill the next run finds it, and goes on.
    for later in reversed(numbered(directory, SNAPSHOTS)):
        if later > number:
            set_aside(directory, SNAPSHOTS, later)
    for later in reversed(numbered(directory, STEPS)):
        if later >= number:
            set_aside(directory, STEPS, later)
    return True


def snapshot_is_new(directory: Path, number: int, weights: Mapping[str, Tensor], resume: str) -> bool:
    """Tell whether a snapshot is to be written.

    Args:
        directory: of the recording.
        number: of the step that it is before.
        weights: θ.
        resume: "compare" or "replace".

    Returns:
        False where it is there, and the same.

    Raises:
        StoreError: another one is there, and resume is "compare".
    """
    if number not in numbered(directory, SNAPSHOTS):
        return True
    _, before, _ = read_snapshot(place_of(directory, SNAPSHOTS, number))
    differ = [name for name, leaf in weights.items() if not close(before[name], leaf)]
    if not differ:
        return False
    if resume != "replace":
        raise StoreError(
            f"The snapshot before step {number} in {str(directory)!r} has other weights ({differ[0]!r} and "
            f"{len(differ) - 1} more). Was the run resumed from another checkpoint? Recorder(…, resume='replace') "
            f"moves the old one to 'replaced/'."
        )
    set_aside(directory, SNAPSHOTS, number)
    return True


def close(before: Tensor, now: Tensor) -> bool:
    """Tell whether two tensors are the same, up to rounding.

    Args:
        before: any shape.
        now: another, or the same.

    Example:
        >>> close(torch.ones(2), torch.ones(2) + 1e-7), close(torch.ones(2), torch.zeros(2))
        (True, False)
    """
    a, b = before.detach().cpu().double(), now.detach().cpu().double()
    return a.shape == b.shape and float((a - b).norm()) <= SAME * float(a.norm() + b.norm())


def _difference(
    facts: Mapping[str, Any],
    passes: Sequence[RecordedMicrobatch],
    now: Mapping[str, Any],
    microbatches: Sequence[RecordedMicrobatch],
) -> str | None:
    if len(passes) != len(microbatches):
        return "the number of micro-batches"
    pairs = [*zip(passes, microbatches, strict=True)]
    for what, name in (("tokens", "input_ids"), ("masks", "attention_mask"), ("masks", "response_mask")):
        if not all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs):
            return what
    if not all(close(a.token_weights, b.token_weights) for a, b in pairs):
        return "token weights"
    rates = [[group["lr"] for groups in each["optimizers"] if groups for group in groups] for each in (facts, now)]
    if len(rates[0]) != len(rates[1]) or any(abs(a - b) > SAME * abs(a) for a, b in zip(*rates, strict=True)):
        return "learning rates"
    return None
