"""ZeRO-1 and 2: each parameter group is one flat tensor, cut into W equal parts.

    group g:  [θ₀ ‖ gap₀ ‖ θ₁ ‖ gap₁ ‖ … ‖ θₙ ‖ padding],  W·P numbers;  rank r keeps [rP, (r + 1)P)

    param_shapes[g]               the parameters in this order, round_robin_gradients included
    param_alignment_paddings[g]   the gaps after each parameter (parameter_alignment), else 0
    group_paddings[g]             how much of a rank's part is padding; in elastic checkpoints, and of the masters in
                                  others, it is cut off
    param_slice_mappings[g]       {name: (start, numel)} in a rank's part. Under round_robin_gradients it counts in the
                                  order of the group before it was reordered (DeepSpeed 0.19.8), unlike the tensor

The padding that the ranks tell, and these mappings, show a part that is another rank's.

Source: DeepSpeed 0.19.8, `DeepSpeedZeroOptimizer` in runtime/zero/stage_1_and_2.py, `BF16_Optimizer` in
runtime/bf16_optimizer.py (bfloat16 with ZeRO-1 and float32 gradients), `link_hp_params` in utils/tensor_fragment.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.checkpoint.formats.deepspeed.parts import (
    MASTER,
    Gathered,
    Outline,
    Part,
    Piece,
    add,
    check_alike,
    check_length,
    outline,
    part_of,
)
from fkernel.checkpoint.formats.deepspeed.places import Files
from fkernel.checkpoint.formats.deepspeed.settings import check_by_element, configured_groups, with_step
from fkernel.checkpoint.formats.deepspeed.states import ModelStates, check_keys, naming, read_file
from fkernel.checkpoint.names import unwrapped
from fkernel.errors import CheckpointError

WHAT = "one rank's optimizer states of a DeepSpeed checkpoint"


class Slot(NamedTuple):
    """Which part of which flat tensor.

    Attributes:
        group: the parameter group's number.
        rank: the rank's.
        ranks: how many there are.
        size: how many numbers each rank's part has, with its padding.
    """

    group: int
    rank: int
    ranks: int
    size: int


class FlatGroup(NamedTuple):
    """Where the parameters of a group lie in its flat tensor.

    Attributes:
        shapes: {name: shape}, in order.
        starts: where each begins.
        total: where the last one ends.
    """

    shapes: Mapping[str, torch.Size]
    starts: tuple[int, ...]
    total: int


def flat_group(shapes: Mapping[str, torch.Size], gaps: Sequence[int] = ()) -> FlatGroup:
    """Lay parameters one after the other.

    Args:
        shapes: {name: shape}, in order.
        gaps: what lies empty after each; () for nothing.

    Example:
        >>> flat_group({"w": torch.Size([2, 3]), "b": torch.Size([2])}, [2, 0]).starts
        (0, 8)
    """
    starts, end = [], 0
    for place, shape in enumerate(shapes.values()):
        starts.append(end)
        end += shape.numel() + (gaps[place] if gaps else 0)
    return FlatGroup(shapes, tuple(starts), end - (gaps[-1] if gaps else 0))


def pieces_of(group: FlatGroup, size: int, rank: int) -> Iterator[Piece]:
    """List what lies in a rank's part [rank · size, (rank + 1) · size).

    Example:
        >>> group = flat_group({"w": torch.Size([2, 3]), "b": torch.Size([2])})
        >>> [*pieces_of(group, 4, 1)]
        [Piece(name='w', into=4, start=0, numel=2), Piece(name='b', into=0, start=2, numel=2)]
    """
    begin, end = rank * size, (rank + 1) * size
    for (name, shape), start in zip(group.shapes.items(), group.starts, strict=True):
        low, high = max(begin, start), min(end, start + shape.numel())
        if low < high:
            yield Piece(name, low - start, low - begin, high - low)


def read_flat(files: Files, states: ModelStates) -> tuple[Gathered, list[Any]]:
    """Read the ranks' files one after the other.

    Returns:
        Whole masters and moments, and the parameter groups as rank 0 has them, numbered.

    Raises:
        CheckpointError: a file is missing, of another rank, step or training, or lacks a key.
        OptimizerStateError: the optimizer's step depends on how the flat tensor is cut, or is not kept in float32.
    """
    gathered, groups, first, sizes = Gathered({}, {}), list[Any](), list[Outline](), list[int]()
    ranks = len(files.optimizer)
    for rank, path in enumerate(files.optimizer):
        with naming(path):
            own = _opened(path, ranks, states)
            entries, settings = _base(own, path, states)
            masters = own["single_partition_of_fp32_groups"]
            parts = [
                part_of(path, master, entry, f"group {number}")
                for number, (master, entry) in enumerate(zip(masters, entries, strict=True))
            ]
            if rank == 0:
                groups, first = settings, [outline(part) for part in parts]
                check_by_element({"state": dict(enumerate(entries)), "param_groups": settings})
                sizes = [_size(part, number, own) for number, part in enumerate(parts)]
            elif settings != groups:
                raise CheckpointError(f"{path} has other parameter groups than rank 0's: they are of different steps.")
            for number, (part, shapes) in enumerate(zip(parts, states.shapes, strict=True)):
                slot = Slot(number, rank, ranks, sizes[number])
                gaps = _gaps(own, number, len(shapes), path)
                group = flat_group(shapes, gaps)
                check_alike(part, first[number], f"group {number}")
                _check_part(part, group, slot, own)
                dealt = states.zero().get("round_robin_gradients") and not any(gaps)
                _check_mapping(path, own, flat_group(before_round_robin(shapes, ranks)) if dealt else group, slot)
                add(gathered, shapes, part, pieces_of(group, slot.size, rank))
    return gathered, groups


def before_round_robin(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, torch.Size]:
    """Undo round_robin_gradients, which deals a group's parameters out to the ranks in turn.

    Example:
        >>> [*before_round_robin(dict.fromkeys("acebd", torch.Size([1])), 2)]
        ['a', 'b', 'c', 'd', 'e']
    """
    dealt = [place for rank in range(ranks) for place in range(rank, len(shapes), ranks)]
    names = [*shapes]
    return {names[place]: shapes[names[place]] for place in sorted(range(len(names)), key=dealt.__getitem__)}


def _opened(path: Path, ranks: int, states: ModelStates) -> Mapping[str, Any]:
    """Open a rank's file and check that it is of as many ranks and groups."""
    saved, groups = read_file(path, WHAT, "optimizer_state_dict"), len(states.shapes)
    states.check_config(saved, path)
    keys = ("base_optimizer_state", "single_partition_of_fp32_groups", "partition_count", "group_paddings")
    own = check_keys(saved["optimizer_state_dict"], path, *keys)
    counts = own["partition_count"]
    counts = [*counts] if isinstance(counts, list | tuple) else [counts]
    if {*counts} != {ranks}:
        raise CheckpointError(
            f"{path} is of a training whose groups were cut into {counts} parts; there are files of {ranks} ranks. "
            f"Copy the files that are missing; a training of experts by their own ranks is not read."
        )
    if len(own["single_partition_of_fp32_groups"]) != groups:
        raise CheckpointError(
            f"{path} has {len(own['single_partition_of_fp32_groups'])} parameter groups, the model's states have "
            f"{groups}: they are of different trainings."
        )
    return own


def _base(own: Mapping[str, Any], path: Path, states: ModelStates) -> tuple[list[Any], list[Any]]:
    """Give what the optimizer keeps of each group's part, and the groups' settings."""
    base = own["base_optimizer_state"]
    if isinstance(base, list):  # elastic_checkpoint
        return [*base], configured_groups(states)
    check_keys(base, path, "state", "param_groups")
    numbers = [group["params"] for group in base["param_groups"]]
    if any(len(each) != 1 for each in numbers):
        raise CheckpointError(f"{path} has groups of {numbers}; expected one flat tensor a group, as ZeRO keeps them.")
    settings = [
        {key: value for key, value in group.items() if key != "param_names"} | {"params": [number]}
        for number, group in enumerate(base["param_groups"])
    ]
    entries = zip(numbers, base["param_groups"], strict=True)
    return [with_step(base["state"].get(own[0], {}), group) for own, group in entries], settings


def _gaps(own: Mapping[str, Any], number: int, parameters: int, path: Path) -> list[int]:
    """What lies empty after each parameter of a group."""
    told = own.get("param_alignment_paddings")
    gaps = [0] * parameters if told is None else [*told[number]]
    if len(gaps) != parameters or any(type(gap) is not int or gap < 0 for gap in gaps):
        raise CheckpointError(f"{path} tells gaps {gaps} between the {parameters} parameters of group {number}.")
    return gaps


def _size(part: Part, number: int, own: Mapping[str, Any]) -> int:
    """How many numbers a rank's part of a group has with its padding: as many as the moments, which keep it."""
    moments = [leaf.numel() for key, leaf in part.flat.items() if key != MASTER]
    if moments and not isinstance(own["base_optimizer_state"], list):
        return moments[0]
    return part.flat[MASTER].numel() + own["group_paddings"][number]


def _check_part(part: Part, group: FlatGroup, slot: Slot, own: Mapping[str, Any]) -> None:
    """Check a part's padding and lengths: they are this rank's."""
    padding = min(slot.size, max(0, (slot.rank + 1) * slot.size - group.total))
    at_the_end = slot.ranks * slot.size - group.total if slot.rank == slot.ranks - 1 else 0  # as BF16_Optimizer counts
    told = own["group_paddings"][slot.group]
    if slot.ranks * slot.size < group.total or told not in (padding, at_the_end):
        raise CheckpointError(
            f"{part.path} tells a padding of {told} in group {slot.group}, where rank {slot.rank} of {slot.ranks} has "
            f"{padding} of its {slot.size} numbers: it is another rank's file, or of another training."
        )
    elastic = isinstance(own["base_optimizer_state"], list)
    lean = slot.size if part.flat[MASTER].numel() == slot.size else slot.size - told
    lengths = {key: lean if key == MASTER or elastic else slot.size for key in part.flat}
    check_length(part, lengths, f"group {slot.group}")


def _check_mapping(path: Path, own: Mapping[str, Any], group: FlatGroup, slot: Slot) -> None:
    """Hold the places that DeepSpeed recorded, counted in the order of `group`, against those that are computed."""
    mappings = own.get("param_slice_mappings")
    if mappings is None:
        return
    recorded = {
        unwrapped(name, group.shapes): tuple(getattr(address, "state", {}).get(key) for key in ("start", "numel"))
        for name, address in mappings[slot.group].items()
    }
    computed = {piece.name: (piece.start, piece.numel) for piece in pieces_of(group, slot.size, slot.rank)}
    if recorded != computed:
        name = min({*recorded.items()} ^ {*computed.items()})[0]
        raise CheckpointError(
            f"{path} records {name!r} at (start, numel) {recorded.get(name)}, where rank {slot.rank} of {slot.ranks} "
            f"has {computed.get(name)}: it is another rank's file, or of another training."
        )
