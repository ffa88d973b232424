"""A checkpoint of any number of ranks → this rank's shards of θ and of the optimizer's state, and no rank holds more.

    parameter [l, *rest]  →  rank r reads rows r⌈l/W⌉ … (r+1)⌈l/W⌉ − 1 of it, of m, of v and of its float32 master

The model is made without weights; its buffers are computed, or filled from the checkpoint where they are saved. Of
torch.distributed.checkpoint a rank opens only the chunks that have rows of its shards, of safetensors only these rows.
Results are, bit for bit, slices of what `load` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from fkernel.checkpoint.conditions import Condition
from fkernel.checkpoint.contents import optimizer_in, weights_in
from fkernel.checkpoint.distributed import Rows, everything, read_distributed, weights_alone
from fkernel.checkpoint.evidence import conditions_of, trained_dtypes
from fkernel.checkpoint.files import first_line, read_json
from fkernel.checkpoint.formats import FORMATS, find_layout
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.loading import step_of, tokenizer_of
from fkernel.checkpoint.model import ADAPTER
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.optimizer import Names, stored_optimizer_state
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.checkpoint.weights import INDEX, shards_of
from fkernel.distributed import Group, agree, gather_numbers, group_of, shard_of, together
from fkernel.errors import CheckpointError, ModelError, listing
from fkernel.func import without_weights
from fkernel.precond import OptimizerState, StoredState, exact_state
from fkernel.shapes import Tensor, Tree


class ShardedCheckpoint(NamedTuple):
    """What this rank holds of a checkpoint.

    Attributes:
        model: the policy without weights, in eval mode, with eager attention: for `func.make_functional`.
        params: {name: [l_r, *rest]}, this rank's shards of θ; of the float32 masters, where the optimizer keeps any.
        optimizer: the optimizer's state before the next step, of the same shards; None where none was saved.
        path: what was asked for.
        layout: as in `Provenance`.
        tokenizer: its tokenizer, or None where none was saved.
        step: optimizer steps taken, or None where nothing tells.
        stored: the optimizer's state as in `Checkpoint`, of the same shards.
        trained_dtypes: as in `Checkpoint`.
        rounded: as in `Checkpoint`, of the same shards.
        conditions: as in `Checkpoint`; loading does not warn of them.
    """

    model: Any
    params: Tree
    optimizer: OptimizerState | None
    path: str
    layout: str
    tokenizer: Any = None
    step: int | None = None
    stored: StoredState | None = None
    trained_dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    rounded: Tree = {}  # noqa: RUF012 - never changed
    conditions: tuple[Condition, ...] = ()


@libraries_quiet()
def load_shards(
    path: str | Path,
    mesh: Any,
    *,
    model: str | Path | None = None,
    names: Names | None = None,
    optimizer: bool = True,
    dtype: torch.dtype = torch.float32,
) -> ShardedCheckpoint:
    """Load this rank's shards of a checkpoint; every rank of the mesh must call it.

    Args:
        path: a directory of torch.distributed.checkpoint, with or without an optimizer's state, or of
            save_pretrained's safetensors, with an optimizer's state beside it in either form.
        mesh: a `torch.distributed.DeviceMesh` of one dimension.
        model: a directory with config.json, where the checkpoint has none.
        names: the parameters' names in the optimizer's order, where the state records none.
        optimizer: False to leave the optimizer's state unread.
        dtype: of the shards of θ.

    Raises:
        CheckpointError: a file is missing or damaged, or the layout is one that is read whole (`load`).
        ModelError: the weights are not the model's, or there is no architecture.
        OptimizerStateError, TreeError: as `load`.
        ProcessError: a rank failed, or the ranks were given different things.
    """
    group = group_of(mesh)
    with together(group, "load_shards"):
        agree(group, "path, model and dtype", f"{path} {model} {dtype} {optimizer}")
        layout = find_layout(path)
        if not in_slices(layout):
            raise CheckpointError(
                f"{path} is of the layout {layout.kind!r}, which is read whole by each rank: take load(path), and "
                f"fkernel.distributed.shard_tree of what it gives."
            )
        made = _architecture(layout, model)
        shapes = {name: tuple(leaf.shape) for name, leaf in made.named_parameters(remove_duplicate=False)}
        weights, state_dict = _read(layout, shapes, group, optimizer)
        params = _fitted(made, weights, shapes, group, dtype, layout.model)
        state = stored = None
        if state_dict is not None:
            if layout.names is not None and names is None:
                names = read_json(layout.names, "names of the optimizer's parameters")
            known = True if layout.trainer_state is not None else None
            stored = stored_optimizer_state(state_dict, params, names=names, decoupled=known)
        dtypes = trained_dtypes(made, layout, weights)
        rounded: Tree = {}
        if stored is not None:
            rounded = _take_masters(params, stored, dtypes, dtype, group)
            state = exact_state(stored, params)
        trainer_state = None if layout.trainer_state is None else read_json(layout.trainer_state, "a trainer's state")
        return ShardedCheckpoint(
            made,
            params,
            state,
            str(path),
            layout.kind,
            tokenizer_of(layout, model, None, trust_remote_code=False),
            step_of(trainer_state, None, stored),
            stored,
            dtypes,
            rounded,
            conditions_of(made, layout, weights, state_dict, [], rounded),
        )


def in_slices(layout: Layout) -> bool:
    """Whether each rank reads its own rows of a checkpoint's weights; those of other layouts are read whole."""
    return not (layout.kind in FORMATS or layout.kind == "file" or (layout.model / ADAPTER).is_file())


def _take_masters(
    params: Tree, stored: StoredState, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype, group: Group
) -> Tree:
    """Make the float32 masters θ, where the optimizer keeps any; the rounded weights that they replace are returned."""
    ran = {name: leaf for name, leaf in params.items() if name in stored.masters}
    params |= {name: stored.masters[name].to(dtype) for name in ran}
    if not ran:
        return {}
    own = [int(not torch.equal(leaf, params[name])) for name, leaf in ran.items()]
    apart = dict(zip(ran, map(any, zip(*gather_numbers(group, own), strict=True)), strict=True))  # on some rank
    return {name: leaf.to(dtypes.get(name, dtype)) for name, leaf in ran.items() if apart[name]}


def _architecture(layout: Layout, model: str | Path | None) -> Any:
    """Make the model without weights."""
    near = [model, layout.config, layout.model, layout.model.parent]
    place = next((here for here in near if here is not None and (Path(here) / "config.json").is_file()), None)
    if place is None:
        raise ModelError(
            f"{layout.model} says nothing about the architecture; give model=, a directory with config.json."
        )
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        with without_weights():
            made = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # transformers and its models raise whatever they like
        raise ModelError(f"{place} describes no causal language model: {first_line(error)}") from error
    return made.eval()


def _rows_of(shapes: Mapping[str, tuple[int, ...]], group: Group) -> Rows:
    """Tell which rows of a stored tensor are this rank's: of a parameter's shape, and with its name in the key."""

    def rows(key: str, shape: tuple[int, ...]) -> slice | None:
        parts = key.split(".")
        inner = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(len(parts), i, -1))
        known = any(shapes.get(name) == shape for name in inner)
        return shard_of(shape[0], group.size, group.rank) if known and shape else None

    return rows


def _read(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], group: Group, optimizer: bool
) -> tuple[Mapping[str, Any], Any]:
    """Read this rank's rows: (the weights, the optimizer's state_dict or None)."""
    rows, state_dict = _rows_of(shapes, group), None
    if layout.kind in ("huggingface", "nested", "accelerate"):
        weights = _safetensors(layout.model, rows)
    else:
        both = optimizer and layout.optimizer is None
        found = read_distributed(layout.model, everything if both else weights_alone, rows)
        weights = weights_in(found, layout.model)
        state_dict = optimizer_in(found, layout.model) if both else None
    if optimizer and layout.optimizer is not None:
        if not layout.optimizer.is_dir():
            raise CheckpointError(
                f"{layout.optimizer} is one file, which each rank would read whole: take load(path), and "
                f"fkernel.distributed.shard_tree of what it gives; or say optimizer=False."
            )
        found = read_distributed(layout.optimizer, rows_of=rows)
        state_dict = optimizer_in(found, layout.optimizer) or found
    return weights, state_dict


def _safetensors(directory: Path, rows_of: Rows) -> Tree:
    """Read rows of model.safetensors, or of all the shards that its index names."""
    found: Tree = {}
    try:
        index = directory / INDEX
        files = shards_of(directory) if index.is_file() else [directory / "model.safetensors"]
        for path in files:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    stored = file.get_slice(key)
                    rows = rows_of(key, tuple(stored.get_shape()))
                    found[key] = file.get_tensor(key) if rows is None else stored[rows.start : rows.stop]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {directory} cannot be read: {first_line(error)}") from error
    return found


def _fitted(
    model: Any,
    weights: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    group: Group,
    dtype: torch.dtype,
    source: Path,
) -> Tree:
    """Name this rank's shards as the model does; its buffers are filled where they are saved."""
    renamed: dict[str, Tensor] = {unwrapped(name, shapes): leaf for name, leaf in weights.items()}
    params: Tree = {}
    for name, leaf in model.named_parameters():
        others = [other for other, same in model.named_parameters(remove_duplicate=False) if same is leaf]
        own = next((renamed[other] for other in others if other in renamed), None)
        l, *rest = shapes[name] or (1,)
        rows = shard_of(l, group.size, group.rank)
        if own is None:
            raise ModelError(f"{source} lacks {name!r} of the model's parameters.")
        own = own if own.ndim else own[None][rows]
        if tuple(own.shape) != (rows.stop - rows.start, *rest):
            raise ModelError(
                f"{source} has {name!r} of other shapes than the model's {list(shapes[name])}: is it a checkpoint of "
                f"another model?"
            )
        params[name] = own.to(dtype)
    buffers = dict(model.named_buffers())
    foreign = [name for name in renamed if name not in shapes and name not in buffers]
    if foreign:
        raise ModelError(f"{source} has foreign {len(foreign)} of the model's parameters: {listing(foreign)}.")
    for name in buffers.keys() & renamed.keys():
        buffers[name].copy_(renamed[name])
    return params
