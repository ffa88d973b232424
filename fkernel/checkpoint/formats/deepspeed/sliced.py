"""ZeRO-3: every parameter is cut into W equal slices, and rank r's slices of a sub-group are one flat tensor.

    parameter of n numbers:   k = ⌈n / W⌉;  rank r keeps [rk, (r + 1)k), the last ones with padding
    sub-group s of rank r:    [slice of θ₀ ‖ slice of θ₁ ‖ …], its parameters those of param_shapes[s]

    fp32_flat_groups[s]                     the masters
    optimizer_state_dict["state"][s]        the moments
    param_groups[i]["params"]               the sub-groups of parameter group i (sub_group_size cuts a group)
    frozen_param_shapes, …_fragments        what is not trained: the same slices, in each rank's model states

Nothing in a file says which rank's it is; the name under which it was saved does.

Source: DeepSpeed 0.19.8, `DeepSpeedZeroOptimizer_Stage3._rigid_state_dict` and `_create_fp16_sub_groups` in
runtime/zero/stage3.py, `zero3_partitioned_param_info` in utils/zero_to_fp32.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.formats.deepspeed.parts import (
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
from fkernel.checkpoint.formats.deepspeed.settings import check_by_element, with_step
from fkernel.checkpoint.formats.deepspeed.states import ModelStates, check_keys, naming, own_shapes, read_file
from fkernel.checkpoint.names import unwrapped
from fkernel.errors import CheckpointError
from fkernel.shapes import Tree

WHAT = "one rank's optimizer states of a DeepSpeed checkpoint of ZeRO-3"


def slices_of(shapes: Mapping[str, torch.Size], ranks: int, rank: int) -> Iterator[Piece]:
    """List what lies in one rank's part of a sub-group.

    Example:
        >>> [*slices_of({"w": torch.Size([5]), "b": torch.Size([2])}, 2, 1)]
        [Piece(name='w', into=3, start=0, numel=2), Piece(name='b', into=1, start=3, numel=1)]
    """
    start = 0
    for name, shape in shapes.items():
        each = -(-shape.numel() // ranks)
        into = rank * each
        if into < shape.numel():
            yield Piece(name, into, start, min(each, shape.numel() - into))
        start += each


def read_sliced(files: Files, states: ModelStates) -> tuple[Gathered, list[Any]]:
    """Read the ranks' files one after the other.

    Returns:
        Whole masters and moments, and the parameter groups as rank 0 has them, by the numbers of their sub-groups.

    Raises:
        CheckpointError: a file is missing, of another rank, step or training, or lacks a key.
        OptimizerStateError: the optimizer's step depends on how the flat tensor is cut, or is not kept in float32.
    """
    gathered, groups, ranks = Gathered({}, {}), list[Any](), len(files.optimizer)
    first: dict[int, Outline] = {}
    for rank, path in enumerate(files.optimizer):
        with naming(path):
            own = _opened(path, ranks, states)
            base = check_keys(own["optimizer_state_dict"], path, "state", "param_groups")
            settings = [{k: v for k, v in group.items() if k != "param_names"} for group in base["param_groups"]]
            if rank == 0:
                groups = settings
                _check_sub_groups(groups, len(states.shapes), path)
                check_by_element({"state": base["state"], "param_groups": groups})
            elif settings != groups:
                raise CheckpointError(f"{path} has other parameter groups than rank 0's: they are of different steps.")
            for number, shapes in enumerate(states.shapes):
                which = f"sub-group {number}"
                group = next(group for group in base["param_groups"] if number in group["params"])
                entry = with_step(base["state"].get(number, {}), group)
                part = part_of(path, own["fp32_flat_groups"][number], entry, which)
                length = sum(-(-shape.numel() // ranks) for shape in shapes.values())
                check_alike(part, first.setdefault(number, outline(part)), which)
                check_length(part, dict.fromkeys(part.flat, length), which)
                add(gathered, shapes, part, slices_of(shapes, ranks, rank))
    return gathered, groups


def read_frozen(files: Files, model: torch.nn.Module) -> Tree:
    """Put the slices of what was not trained together; {} where they were left out.

    Raises:
        CheckpointError: ranks disagree, or a slice has another length.
    """
    known, ranks = dict(model.named_parameters(remove_duplicate=False)), len(files.model)
    gathered, first = Gathered({}, {}), {}
    for rank, path in enumerate(files.model):
        found = read_file(path, "one rank's model states of a DeepSpeed checkpoint", "module")
        with naming(path):
            listed = found.get("frozen_param_shapes") or {}
            shapes = next(iter(own_shapes([listed], known, path)))
            first = shapes if rank == 0 else first
            if shapes != first:
                raise CheckpointError(f"{path} lists other frozen parameters than rank 0's file: copy all of one step.")
            slices = {
                unwrapped(name, known): leaf for name, leaf in (found.get("frozen_param_fragments") or {}).items()
            }
            for name, shape in shapes.items():
                part = Part(path, {"weight": slices[name].view(-1)}, {})
                if not part.flat["weight"].is_floating_point():
                    raise CheckpointError(f"{path} keeps {name!r} quantised (zero_quantized_nontrainable_weights).")
                check_length(part, {"weight": -(-shape.numel() // ranks)}, repr(name))
                _add_frozen(gathered, name, shape, part, ranks, rank)
    return {name: tree["weight"] for name, tree in gathered.trees.items()}


def check_models(files: Files, states: ModelStates) -> None:
    """Raise CheckpointError unless all ranks' model states are of one training and step."""
    keys = ("param_shapes", "global_steps", "skipped_steps", "dp_world_size")
    for path in files.model[1:]:
        found = read_file(path, "one rank's model states of a DeepSpeed checkpoint", "param_shapes", "global_steps")
        states.check_config(found, path)
        for key in keys:
            if found.get(key) != states.found.get(key):
                what = "" if key == "param_shapes" else f": {found.get(key)}, not {states.found.get(key)}"
                raise CheckpointError(
                    f"{path} has another {key} than rank 0's file{what}. Copy the files of all ranks of one step."
                )


def _add_frozen(gathered: Gathered, name: str, shape: torch.Size, part: Part, ranks: int, rank: int) -> None:
    """Copy a slice in the dtype in which it is kept."""
    gathered.trees.setdefault(name, {"weight": torch.empty(shape, dtype=part.flat["weight"].dtype)})
    add(gathered, {name: shape}, part, slices_of({name: shape}, ranks, rank))


def _opened(path: Path, ranks: int, states: ModelStates) -> Mapping[str, Any]:
    """Open a rank's file and check that it is of as many ranks and sub-groups."""
    saved, sub_groups = read_file(path, WHAT, "optimizer_state_dict"), len(states.shapes)
    states.check_config(saved, path)
    keys = ("optimizer_state_dict", "fp32_flat_groups", "partition_count")
    own = check_keys(saved["optimizer_state_dict"], path, *keys)
    if own["partition_count"] != ranks or "ds_zero_partition_groups" in own:
        raise CheckpointError(
            f"{path} is of a training whose parameters were cut into {own['partition_count']} slices; there are files "
            f"of {ranks} ranks. Copy the files that are missing; experts and tensors cut by other ranks are not read."
        )
    if len(own["fp32_flat_groups"]) != sub_groups:
        raise CheckpointError(
            f"{path} has {len(own['fp32_flat_groups'])} sub-groups, the model's states have {sub_groups}: they are of "
            f"different trainings."
        )
    return own


def _check_sub_groups(groups: list[Any], sub_groups: int, path: Path) -> None:
    """Each sub-group is of one parameter group."""
    listed = [number for group in groups for number in group["params"]]
    if sorted(listed) != [*range(sub_groups)]:
        raise CheckpointError(
            f"{path} has parameter groups of the sub-groups {listed}; there are {sub_groups}, each of one group."
        )
