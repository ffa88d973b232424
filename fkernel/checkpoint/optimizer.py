"""AdamW's state_dict → AdamWState, keyed by parameter name.

A state_dict numbers its parameters, and whose moments are number i must not be guessed. In the order in which they
are believed, names are

    recorded      `torch.optim.AdamW(model.named_parameters())` records `param_names` in each group (torch ≥ 2.6);
                  distributed checkpoints use names instead of numbers
    given         by the caller, or in a file beside the state
    found         the one known order of the model's parameters that fits every shape (`fkernel.checkpoint.order`)

lr, betas, ε and decay are the groups' own; there is no default for any of them. Whose state it is, `foreign` tells; how
many steps were taken, `steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.files import read_tensors
from fkernel.checkpoint.foreign import check_flags, check_group, is_of_bitsandbytes, plain_entry
from fkernel.checkpoint.names import unwrapped
from fkernel.checkpoint.order import Groups, find_order
from fkernel.checkpoint.steps import steps_of
from fkernel.errors import OptimizerStateError
from fkernel.precond import AdamWState, check_covers
from fkernel.shapes import Tensor, Tree

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
        model: as in `adamw_state`.
        names: as in `adamw_state`.
        order: as in `adamw_state`.
        decoupled: as in `adamw_state`.

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
    """Key a `torch.optim.AdamW` state_dict by parameter name.

    Args:
        state_dict: what `optimizer.state_dict()` returned.
        params: {name: tensor}, the parameters that the state must be about. One that the optimizer has not stepped
            yet has zero moments and step 0.
        model: where no names are recorded or given: the model, whose known orders are tried.
        names: where none are recorded: the parameters' names in the optimizer's order, as one list, as one list a
            group, or as {"0": name, …}.
        order: which of the known orders, where several fit; see `fkernel.checkpoint.order`.
        decoupled: whether weight decay is AdamW's (True) or Adam's (False), where the state does not say: torch before
            2.7 wrote the same for both.

    Returns:
        The state before the next step; learning rate, betas, ε and decay are the groups' own.

    Raises:
        OptimizerStateError: no names, or more than one order of them fits; the optimizer is not plain AdamW (amsgrad,
            maximize, coupled decay, 8-bit, another one); it tells no step; or a number in it is impossible.
        TreeError: it is about other parameters, or shapes differ.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        >>> adamw_state(optimizer.state_dict(), dict(model.named_parameters())).lr
        {'weight': 0.1, 'bias': 0.1}
    """
    state_dict = plain_state(state_dict, decoupled)
    group_of: dict[str, Mapping[str, Any]] = {}
    entry_of: dict[str, Mapping[str, Any]] = {}
    step_of: dict[str, int] = {}
    named_groups = names_of(state_dict, params, model, names, order)
    for group, named in zip(state_dict["param_groups"], named_groups, strict=True):
        for name, index in zip(named, group["params"], strict=True):
            if name in group_of:
                raise OptimizerStateError(f"The names given for the optimizer's parameters hold {name!r} twice.")
            group_of[name], entry_of[name] = group, state_dict["state"].get(index, {})
        step_of |= steps_of(group, {name: entry_of[name] for name in named})
    # A frozen parameter that the optimizer was given has no state, and is never moved: it is not the optimizer's.
    foreign = [name for name in group_of if name not in params and entry_of[name]]
    each = [name for name in params if name in group_of] + foreign
    state = AdamWState(
        step={name: step_of[name] for name in each},
        exp_avg={name: _moment(entry_of[name], "exp_avg", name, params) for name in each},
        exp_avg_sq={name: _moment(entry_of[name], "exp_avg_sq", name, params) for name in each},
        lr={name: float(group_of[name]["lr"]) for name in each},
        beta1={name: float(group_of[name]["betas"][0]) for name in each},
        beta2={name: float(group_of[name]["betas"][1]) for name in each},
        eps={name: float(group_of[name]["eps"]) for name in each},
        weight_decay={name: float(group_of[name]["weight_decay"]) for name in each},
    )
    check_covers(state, list(params), params, "params")
    return state


def plain_state(state_dict: Any, decoupled: bool | None = None) -> dict[str, Any]:
    """Check that a state_dict is AdamW's, and give its states the names that `torch.optim.AdamW` gives them.

    Raises:
        OptimizerStateError: it is no optimizer's, or another optimizer's; it says whose.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> plain_state(torch.optim.NAdam(net.parameters()).state_dict())
        Traceback (most recent call last):
        fkernel.errors.OptimizerStateError: Parameter group 0 has 'momentum_decay': it is NAdam's, ...
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise OptimizerStateError("This is no optimizer state_dict: it lacks 'state' and 'param_groups'.")
    entries, groups = state_dict["state"], state_dict["param_groups"]
    whole = isinstance(entries, Mapping) and all(isinstance(entry, Mapping) for entry in entries.values())
    whole = whole and isinstance(groups, Sequence) and all(isinstance(g, Mapping) and "params" in g for g in groups)
    if not whole:
        raise OptimizerStateError(
            "This is no optimizer state_dict of torch: expected state as {number: {…}} and param_groups as a list of "
            "{'params': […], …}."
        )
    for number, group in enumerate(groups):
        check_flags(group, number)
    plain = {index: plain_entry(entry, index) for index, entry in entries.items()}
    for number, group in enumerate(groups):
        bitsandbytes = any(is_of_bitsandbytes(entries.get(index)) for index in group["params"])
        check_group(group, number, decoupled, bitsandbytes)
    return {"state": plain, "param_groups": list(groups)}


def names_of(
    state_dict: Mapping[str, Any],
    params: Tree,
    model: torch.nn.Module | None = None,
    names: Names | None = None,
    order: str | None = None,
) -> Groups:
    """Name every numbered place of a state_dict, group by group: recorded, given or found names.

    Arguments and errors as in `adamw_state`.

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
        found = [group or [] for group in recorded]
        if given not in (None, found):
            raise OptimizerStateError(
                "The optimizer recorded its parameters' names, and they are not those that were given; give none."
            )
        return found
    if given is not None:
        return given
    if model is None:
        bare = next(i for i, group in enumerate(recorded) if group is None)
        raise OptimizerStateError(
            f"Parameter group {bare} records no param_names, so its {sizes[bare]} moments cannot be told apart. Give "
            f"their names in the optimizer's order (names=), or the model (model=), whose known orders are then tried."
        )
    places = [[_place(state_dict["state"].get(index, {})) for index in group["params"]] for group in groups]
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


def _place(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    moment = entry.get("exp_avg_sq", entry.get("exp_avg"))
    return None if moment is None else tuple(moment.shape)


def _moment(entry: Mapping[str, Any], key: str, name: str, params: Tree) -> Tensor:
    if not entry:
        return torch.zeros_like(params[name])
    moment = entry[key]
    return moment if moment.dtype in (torch.float32, torch.float64) else moment.float()
