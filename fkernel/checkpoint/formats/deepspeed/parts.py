"""Ranks' parts of flat tensors, copied into whole parameters: one rank's file open at a time.

A flat tensor holds many parameters one after the other; each rank keeps a part of it, of the float32 master weights and
of each moment alike. A `Piece` says which numbers of a parameter lie where in a rank's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.errors import CheckpointError, OptimizerStateError, listing
from fkernel.shapes import Tree

MASTER = "master_param"


class Piece(NamedTuple):
    """A run of numbers of one parameter in a rank's part.

    Attributes:
        name: the parameter's.
        into: where it begins in the flattened parameter.
        start: where it begins in the rank's part.
        numel: how many numbers.
    """

    name: str
    into: int
    start: int
    numel: int


class Part(NamedTuple):
    """What one rank keeps of one flat tensor.

    Attributes:
        path: the rank's file.
        flat: {"master_param": θ, moment: its numbers}, float32, one-dimensional.
        whole: what is not cut, such as the steps taken.
    """

    path: Path
    flat: Tree
    whole: Mapping[str, Any]


class Outline(NamedTuple):
    """What rank 0 keeps of a flat tensor, and every other must.

    Attributes:
        keys: of what is cut.
        whole: what is not cut.
    """

    keys: frozenset[str]
    whole: Mapping[str, Any]


class Gathered(NamedTuple):
    """Whole parameters, as far as ranks were added.

    Attributes:
        trees: {name: {"master_param": θ, moment: …}}.
        whole: {name: what is not cut}.
    """

    trees: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, Mapping[str, Any]]


def part_of(path: Path, master: Any, entry: Any, which: str) -> Part:
    """Bring one rank's part of a flat tensor into one form.

    Args:
        path: the rank's file.
        master: the part of the float32 master weights.
        entry: what the optimizer keeps of it; empty before the first step.
        which: the group or sub-group, for messages.

    Raises:
        CheckpointError: something is no flat tensor.
        OptimizerStateError: it is not float32.
    """
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{path} keeps of {which} a {type(entry).__name__}; expected a dictionary of moments.")
    cut = {key: leaf for key, leaf in entry.items() if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
    flat = {MASTER: master, **cut}
    for key, leaf in flat.items():
        if not isinstance(leaf, torch.Tensor) or leaf.dim() != 1:
            shape = list(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise CheckpointError(f"{path} has {key} of {which} as {shape}; expected a flat tensor.")
        if leaf.dtype != torch.float32:
            raise OptimizerStateError(
                f"{path} keeps {key} of {which} in {str(leaf.dtype).removeprefix('torch.')}; read are float32 masters "
                f"and moments (bf16_master_weights_and_grads, fp16_master_weights_and_grads and bf16_optimizer_states "
                f"keep others)."
            )
    whole = {key: value for key, value in entry.items() if key not in cut}
    if "step" in whole:
        whole["step"] = step_in(whole["step"], path)
    return Part(path, {key: leaf.detach() for key, leaf in flat.items()}, whole)


def check_length(part: Part, lengths: Mapping[str, int], which: str) -> None:
    """Raise CheckpointError unless each flat tensor of a part has its length."""
    for key, leaf in part.flat.items():
        if leaf.numel() != lengths[key]:
            raise CheckpointError(
                f"{part.path} has {leaf.numel()} numbers of {key} of {which}; expected {lengths[key]}, by the "
                f"parameters' shapes and the number of ranks. The file is of another training, or was changed."
            )


def outline(part: Part) -> Outline:
    """What a rank keeps, without the numbers: nothing of its file stays mapped."""
    return Outline(frozenset(part.flat), part.whole)


def check_alike(part: Part, first: Outline, which: str) -> None:
    """Raise CheckpointError unless a rank keeps what the first one does, and has taken as many steps."""
    if {*part.flat} != first.keys or not _alike(part.whole, first.whole):
        raise CheckpointError(
            f"{part.path} keeps of {which} {_summary(part.flat, part.whole)}, rank 0 "
            f"{_summary(sorted(first.keys), first.whole)}: the ranks' files are of different steps. Copy all of one "
            f"step."
        )


def add(gathered: Gathered, shapes: Mapping[str, torch.Size], part: Part, pieces: Iterable[Piece]) -> None:
    """Copy one rank's numbers into whole parameters.

    Args:
        gathered: what is filled; a parameter that is not there yet is allocated.
        shapes: of the parameters in the flat tensor.
        part: the rank's.
        pieces: what lies where.

    Raises:
        OptimizerStateError: a number is not finite.
    """
    for name, into, start, numel in pieces:
        tree = gathered.trees.setdefault(name, {key: torch.empty(shapes[name]) for key in part.flat})
        gathered.whole.setdefault(name, part.whole)
        for key, leaf in part.flat.items():
            own = leaf[start : start + numel]
            if not bool(own.isfinite().all()):  # of what pads, nothing is known
                raise OptimizerStateError(f"{part.path} keeps numbers of {name!r} in {key} that are not finite.")
            tree[key].view(-1)[into : into + numel].copy_(own)


def entries_of(gathered: Gathered) -> dict[str, dict[str, Any]]:
    """Give what the optimizer keeps of each parameter, its float32 master with it; {} before its first step."""
    return {
        name: {**gathered.whole[name], **tree} if {*tree} != {MASTER} else {} for name, tree in gathered.trees.items()
    }


def step_in(value: Any, path: Path) -> int:
    """Give the number of steps taken.

    Raises:
        OptimizerStateError: it is no whole number.
    """
    try:
        number = float(value)
        if number == int(number) >= 0:
            return int(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise OptimizerStateError(f"{path} tells a step of {value!r}; expected a whole number of steps taken, 0 or more.")


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {*one} == {*other} and all(_number(one[key]) == _number(other[key]) for key in one)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _summary(flat: Iterable[str], whole: Mapping[str, Any]) -> str:
    return listing([*flat, *(f"{key} {_number(value)}" for key, value in whole.items())])
