"""A DeepSpeed checkpoint → weights, masters, moments, steps and settings under the model's own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.formats.deepspeed.flat import read_flat
from fkernel.checkpoint.formats.deepspeed.parts import MASTER, entries_of, step_in
from fkernel.checkpoint.formats.deepspeed.places import Files, files_of
from fkernel.checkpoint.formats.deepspeed.settings import named_groups
from fkernel.checkpoint.formats.deepspeed.sliced import check_models, read_frozen, read_sliced
from fkernel.checkpoint.formats.deepspeed.states import ModelStates, naming, read_states
from fkernel.checkpoint.formats.deepspeed.unsharded import read_unsharded
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout
from fkernel.errors import CheckpointError
from fkernel.shapes import Tree

LAZY = (0, 14)
"""DeepSpeed before 0.14 took a step with zero gradients when ZeRO was set up, which counts in the bias correction."""


def read(layout: Layout, model: torch.nn.Module, optimizer: bool = True) -> Saved:
    """Read the checkpoint of one tag, one rank's file at a time.

    Args:
        layout: `find`'s.
        model: the architecture: names and shapes are held against it. Where the layout is pretrained, it has the
            weights of that directory, and they must be the masters' rounding.
        optimizer: False to leave the optimizer's state unread.

    Returns:
        Weights as the policy ran with them ({} where the layout is pretrained). Under ZeRO-3 no file keeps them: they
        are the rounding of the masters. A state's "master_param" is the float32 master, where the policy ran in
        another dtype or its weights are read elsewhere.

    Raises:
        CheckpointError: a file is missing, damaged, or of another rank, step, training or model.
        OptimizerStateError: the optimizer is one whose step depends on how flat tensors are cut, its state is not kept
            in float32, or the scheduler's learning rates are others.
    """
    if layout.pretrained and not optimizer:
        return Saved()
    assert layout.optimizer is not None
    with naming(layout.optimizer):
        return _read(layout, files_of(layout.optimizer), model, optimizer)


def _read(layout: Layout, files: Files, model: torch.nn.Module, optimizer: bool) -> Saved:
    """Read what the stage left."""
    with naming(files.model[0]):
        states = read_states(files.model[0], model, mmap=layout.pretrained and bool(files.optimizer))
        if states.found.get("optimizer") is not None and not files.optimizer:
            return _unsharded(layout, states, model, optimizer)
    if not files.sliced and not optimizer:
        return Saved(dict(states.module), None, states.step)
    if not states.shapes and not files.optimizer:
        return Saved({} if layout.pretrained else dict(states.module), None, states.step)  # it had no optimizer
    if not states.shapes:
        raise CheckpointError(
            f"{files.model[0]} tells no param_shapes, and files of an optimizer that is cut by ranks lie beside it: "
            f"they are of different trainings. Copy all files of one step."
        )
    return _sharded(layout, files, states, model, optimizer)


def _unsharded(layout: Layout, states: ModelStates, model: torch.nn.Module, optimizer: bool) -> Saved:
    weights = {} if layout.pretrained else dict(states.module)
    if not optimizer:
        return Saved(weights, None, states.step)
    state_dict, entries = read_unsharded(states, dict(model.named_parameters()))
    masters = {name: entry[MASTER] for name, entry in state_dict["state"].items() if MASTER in entry}
    masters = {name: leaf for name, leaf in masters.items() if isinstance(name, str)}  # named by them
    step = _check_step(entries, states, states.path, empty_step="optimizer_state_dict" in states.found["optimizer"])
    _check_rounding(masters, states.module, states.path)
    if layout.pretrained:
        _check_pretrained(masters, states.module, model, layout.model)
    return Saved(weights, state_dict, step)


def _sharded(layout: Layout, files: Files, states: ModelStates, model: torch.nn.Module, optimizer: bool) -> Saved:
    """Read ZeRO-1, 2 or 3."""
    if not files.optimizer:
        raise CheckpointError(
            f"{states.path.parent} lacks the optimizer's files, *zero_pp_rank_*_optim_states.pt, where the masters "
            f"and moments are: copy them from where the training saved them, one of each rank."
        )
    if files.sliced:
        check_models(files, states)
    gathered, groups = read_sliced(files, states) if files.sliced else read_flat(files, states)
    step = _check_step(gathered.whole, states, files.optimizer[0], empty_step=_version(states) < LAZY)
    if any(told.get("step", step) != step for told in gathered.whole.values()):
        raise CheckpointError(f"{files.optimizer[0]} has groups of different steps; ZeRO steps all groups together.")
    masters = {name: tree[MASTER] for name, tree in gathered.trees.items()}
    if files.sliced:
        weights = {name: _rounded(name, master, states) for name, master in masters.items()}
        weights |= read_frozen(files, model) if not layout.pretrained else {}
        buffers = {name: states.module.get(name) for name in states.found.get("buffer_names") or []}
        weights |= {name: leaf for name, leaf in buffers.items() if isinstance(leaf, torch.Tensor)}
    else:
        weights = dict(states.module)
        _check_rounding(masters, weights, files.optimizer[0])
    if layout.pretrained:
        _check_pretrained(masters, weights, model, layout.model)
    if not optimizer:
        return Saved(weights, None, states.step)
    names = [[name for number in group["params"] for name in states.shapes[number]] for group in groups]
    entries = entries_of(gathered)
    if not layout.pretrained:
        _drop_float32(entries, masters, weights)
    return Saved(
        {} if layout.pretrained else weights,
        {"state": entries, "param_groups": named_groups(groups, names, states)},
        step,
    )


def _rounded(name: str, master: torch.Tensor, states: ModelStates) -> torch.Tensor:
    """What the policy ran with: the master in the dtype of the empty tensor that the model's states have of it."""
    kept = states.module.get(name)
    if not isinstance(kept, torch.Tensor) or not kept.is_floating_point():
        raise CheckpointError(f"{states.path} has no {name!r} in its module, and so no dtype that it ran in.")
    return master.to(kept.dtype)


def _drop_float32(entries: Mapping[str, dict[str, Any]], masters: Tree, weights: dict[str, Any]) -> None:
    """Keep one copy where the policy ran in float32: its weights are the masters."""
    for name, entry in entries.items():
        if weights[name].dtype == torch.float32:
            entry.pop(MASTER, None)
            weights[name] = masters[name]


def _check_step(whole: Mapping[Any, Mapping[str, Any]], states: ModelStates, path: Path, empty_step: bool) -> int:
    """Hold the steps that the optimizer counts against those of the engine; it returns how many it has taken."""
    steps = [step_in(told["step"], path) for told in whole.values() if "step" in told]
    steps += [0] * (not any(whole.values()))
    if not steps:
        return states.step  # of an optimizer that counts none
    if max(steps) not in (states.step, states.step + empty_step):
        raise CheckpointError(
            f"{path} is of step {max(steps)}, {states.path} of step {states.step}: they are of different steps, or "
            f"the training was resumed without its optimizer's state. Copy the files of all ranks of one step."
        )
    return max(steps)


def _check_rounding(masters: Tree, weights: Mapping[str, Any], path: Path) -> None:
    """Raise unless the weights are the masters' rounding, to the last bit."""
    for name, master in masters.items():
        if name not in weights:
            raise CheckpointError(f"The model's states beside {path} have no weights of {name!r}.")
        leaf = weights[name]
        if leaf.shape != master.shape or not _same(master.to(leaf.dtype), leaf):
            raise CheckpointError(
                f"{path} has masters of {name!r} that do not round to the weights in the model's states beside it: "
                f"the two are of different steps or ranks. Copy all files of one step."
            )


def _check_pretrained(masters: Tree, weights: Mapping[str, Any], model: torch.nn.Module, directory: Path) -> None:
    """Raise unless the weights that save_pretrained wrote are the masters', or their rounding."""
    loaded = dict(model.named_parameters())
    for name, master in masters.items():
        leaf, ran = loaded[name].detach(), master.to(weights[name].dtype)
        if not _same(ran.to(leaf.dtype), leaf) and not _same(master.to(leaf.dtype), leaf):
            raise CheckpointError(
                f"The weights of {name!r} in {directory} are not the rounding of the float32 masters in DeepSpeed's "
                f"files: they are of different steps. Copy both of one step, or say optimizer=False for the weights."
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _version(states: ModelStates) -> tuple[int, ...]:
    """DeepSpeed's, as the file tells it; of a file that tells none, an early one."""
    told: Iterable[str] = str(states.found.get("ds_version", "0.0")).split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in told)
