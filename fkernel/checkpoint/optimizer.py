"""An optimizer's state_dict → its state, keyed by parameter name.

A state_dict numbers its parameters, and whose moments are number i must not be guessed. In the order in which they
are believed, names are

    recorded      `torch.optim.AdamW(model.named_parameters())` records `param_names` in each group (torch ≥ 2.6);
                  distributed checkpoints use names instead of numbers
    given         by the caller, or in a file beside the state
    found         the one known order of the model's parameters that fits every shape (`fkernel.checkpoint.order`)

Settings are the groups' own; there is no default for a learning rate. Which optimizer wrote it, `recognising` tells;
how many steps were taken, `steps`. What is stored keeps its dtypes (`stored_optimizer_state`); what it means is in
float32 (`optimizer_state`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fkernel import tree
from fkernel.checkpoint.files import read_tensors
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.order import Groups, find_order
from fkernel.checkpoint.recognising import flat_entry, merged, recognise
from fkernel.checkpoint.steps import steps_of
from fkernel.errors import OptimizerStateError
from fkernel.precond import (
    AdamWState,
    OptimizerState,
    StoredState,
    check_masters,
    exact_state,
    shape_of_entry,
)
from fkernel.precond.updates import OPTIMIZERS
from fkernel.shapes import Tree

Names = Sequence[str] | Sequence[Sequence[str]] | Mapping[str, Any]


def load_adamw_state(
    path: str | Path,
    params: Tree,
    *,
    model: torch.nn.Module | None = None,
    names: Names | None = None,
    order: str | None = None,
    decoupled: bool | None = None,
) -> AdamWState:
    """Read `optimizer.pt` (weights only: nothing in the file is executed) and key it by parameter name.

    Args:
        path: a file written by `torch.save(optimizer.state_dict())`.
        params: {name: tensor}, the parameters that the state must be about.
        model: as in `optimizer_state`.
        names: as in `optimizer_state`.
        order: as in `optimizer_state`.
        decoupled: as in `optimizer_state`.

    Returns:
        The state before the next step.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else; see also `adamw_state`.
    """
    state_dict = read_tensors(Path(path), "an optimizer state")
    return adamw_state(state_dict, params, model=model, names=names, order=order, decoupled=decoupled)


def adamw_state(
    state_dict: Any,
    params: Tree,
    *,
    model: torch.nn.Module | None = None,
    names: Names | None = None,
    order: str | None = None,
    decoupled: bool | None = None,
) -> AdamWState:
    """Key a state_dict of AdamW by parameter name: torch's, bitsandbytes' or torchao's.

    Arguments as in `optimizer_state`.

    Raises:
        OptimizerStateError: as `optimizer_state`; or the optimizer is not AdamW in the plain.
        TreeError: as `optimizer_state`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        >>> adamw_state(optimizer.state_dict(), dict(model.named_parameters())).lr
        {'weight': 0.1, 'bias': 0.1}
    """
    stored = stored_optimizer_state(state_dict, params, model=model, names=names, order=order, decoupled=decoupled)
    other = sorted({*stored.kinds.values()} - {"adamw"})
    if other:
        variant = [key for key in ("amsgrad", "maximize") if any(group.get(key) for group in stored.groups.values())]
        what = f"with {variant[0]}=True" if variant else "whose decay is added to the gradient"
        raise OptimizerStateError(
            f"This is the state of {other[0]}{f' {what}' if other == ['adam'] else ''}, not that of AdamW in the "
            f"plain; fkernel.checkpoint.optimizer_state takes it."
        )
    state = exact_state(stored, params)
    assert isinstance(state, AdamWState)
    return state


def optimizer_state(
    state_dict: Any,
    params: Tree,
    *,
    model: torch.nn.Module | None = None,
    names: Names | None = None,
    order: str | None = None,
    decoupled: bool | None = None,
) -> OptimizerState:
    """Key an optimizer's state_dict by parameter name, whichever of those that are modelled wrote it.

    Args:
        state_dict: what `optimizer.state_dict()` returned; a list of them, with recorded or given names, where several
            optimizers share a model.
        params: {name: tensor}, the parameters that the state must be about. One that the optimizer has not stepped
            yet has zero moments and step 0.
        model: where no names are recorded or given: the model, whose known orders are tried.
        names: where none are recorded: the parameters' names in the optimizer's order, as one list, as one list a
            group, or as {"0": name, …}.
        order: which of the known orders, where several fit; see `fkernel.checkpoint.order`.
        decoupled: whether weight decay is AdamW's (True) or Adam's (False), where the state does not say: torch before
            2.7, and torchao, write the same for both.

    Returns:
        The state before the next step, in real numbers: `AdamWState` for AdamW, else that of its kind; a `MixedState`
        where groups have different optimizers. 8-bit codes are decoded, bfloat16 is float32.

    Raises:
        OptimizerStateError: no names, or more than one order of them fits; the optimizer is none of those that are
            modelled; it tells no step; codes have no map; master weights are of another step; a number is impossible.
        TreeError: it is about other parameters, or shapes differ.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        >>> type(optimizer_state(optimizer.state_dict(), dict(model.named_parameters()))).__name__
        'SGDState'
    """
    stored = stored_optimizer_state(state_dict, params, model=model, names=names, order=order, decoupled=decoupled)
    return exact_state(stored, params)


def stored_optimizer_state(
    state_dict: Any,
    params: Tree,
    *,
    model: torch.nn.Module | None = None,
    names: Names | None = None,
    order: str | None = None,
    decoupled: bool | None = None,
) -> StoredState:
    """Key an optimizer's state_dict by parameter name and leave it in its own dtypes and codes.

    Arguments and errors as in `optimizer_state`.

    Example:
        >>> model = torch.nn.Linear(2, 1).bfloat16()
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        >>> stored_optimizer_state(optimizer.state_dict(), dict(model.named_parameters())).writers
        {'weight': 'torch.optim.AdamW', 'bias': 'torch.optim.AdamW'}
    """
    tree.check_tensors(params, "params")
    state_dict = merged(state_dict)
    written = recognise(state_dict, decoupled)
    each: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {}
    named_groups = names_of(state_dict, params, model, names, order)
    for group, named, by in zip(state_dict["param_groups"], named_groups, written, strict=True):
        entries: dict[str, dict[str, Any]] = {}
        for name, index in zip(named, group["params"], strict=True):
            if name in each or name in entries:
                raise OptimizerStateError(f"The names given for the optimizer's parameters hold {name!r} twice.")
            entries[name] = flat_entry(state_dict["state"].get(index, {}))
        if "step" in OPTIMIZERS[by.kind].numbers:
            steps = steps_of(group, entries)
            entries = {name: {**entry, **_step(entry, steps[name])} if entry else {} for name, entry in entries.items()}
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")} | by.settings
        each |= {name: (by.kind, by.writer, entry, settings) for name, entry in entries.items()}
    # A frozen parameter that the optimizer was given has no state, and is never moved: it is not the optimizer's.
    foreign = [name for name, (_, _, entry, _) in each.items() if name not in params and entry]
    own = [name for name in params if name in each] + foreign
    masters = {name: each[name][2].pop("master_param").float() for name in own if "master_param" in each[name][2]}
    kinds, writers, kept, groups = ({name: each[name][i] for name in own} for i in range(4))
    check_masters({name: leaf for name, leaf in masters.items() if name in params}, params)
    return StoredState(kinds, writers, kept, groups, masters)  # pyright: ignore[reportArgumentType]


def _step(entry: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The steps taken, as the entry has them where it does."""
    recorded = entry.get("step")
    return {"step": recorded if recorded is not None and float(recorded) == step else step}


def names_of(
    state_dict: Mapping[str, Any],
    params: Tree,
    model: torch.nn.Module | None = None,
    names: Names | None = None,
    order: str | None = None,
) -> Groups:
    """Name every numbered place of a state_dict, group by group: recorded, given or found names.

    Arguments and errors as in `optimizer_state`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state_dict = torch.optim.AdamW(model.parameters()).state_dict()
        >>> names_of(state_dict, dict(model.named_parameters()), model)
        [['weight', 'bias']]
    """
    groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    recorded = [_recorded(group, params) for group in groups]
    given = None if names is None else _given(names, sizes)
    if all(group is not None for group in recorded):
        named = [group or [] for group in recorded]
        if given not in (None, named):
            raise OptimizerStateError(
                "The optimizer recorded its parameters' names, and they are not those that were given; give none."
            )
        return named
    if given is not None:
        return given
    if model is None:
        bare = next(i for i, group in enumerate(recorded) if group is None)
        raise OptimizerStateError(
            f"Parameter group {bare} records no param_names, so its {sizes[bare]} moments cannot be told apart. Give "
            f"their names in the optimizer's order (names=), or the model (model=), whose known orders are then tried."
        )
    places = [[_shape(state_dict["state"].get(index, {})) for index in group["params"]] for group in groups]
    return find_order(places, model, order)


def _recorded(group: Mapping[str, Any], params: Tree) -> list[str] | None:
    if "param_names" in group:
        return [unwrapped(name, params) for name in group["param_names"]]
    if group["params"] and not all(isinstance(index, str) for index in group["params"]):
        return None
    return [unwrapped(name, params) for name in group["params"]]


def _given(names: Names, sizes: list[int]) -> Groups:
    """Bring names to one list a group."""
    if isinstance(names, Mapping):
        try:
            names = [str(names[str(i)]) for i in range(len(names))]
        except KeyError as missing:
            raise OptimizerStateError(
                f"The names given for the optimizer's parameters lack number {missing}; expected {{'0': name, …}}."
            ) from None
    if all(isinstance(name, str) for name in names):
        flat = [str(name) for name in names]
        if len(flat) != sum(sizes):
            raise OptimizerStateError(f"{len(flat)} names were given for the {sum(sizes)} parameters of the optimizer.")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    grouped = [[*group] for group in names]
    if [len(group) for group in grouped] != sizes:
        raise OptimizerStateError(
            f"Names were given for groups of {[len(group) for group in grouped]} parameters; the optimizer's groups "
            f"are {sizes}."
        )
    return grouped


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    return shape_of_entry(flat_entry(entry))
