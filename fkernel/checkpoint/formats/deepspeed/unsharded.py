"""ZeRO-0: one file, with an optimizer of whole tensors, which has numbers for names.

    float32       optimizer = the optimizer's own state_dict, over the weights
    bf16, fp16    optimizer = {optimizer_state_dict, fp32_groups}       masters in tensors of their own, or
                              {optimizer_state_dict, fp32_groups_flat}  under FusedAdam each group's in one flat tensor

No file records the parameters' names. Masters tell them: the weights are their rounding, and within a group parameters
are in the model's order. Where there are none, or they fit in several ways, `fkernel.checkpoint.order` tries the
model's known orders.

Source: DeepSpeed 0.19.8, runtime/fp16/unfused_optimizer.py and fused_optimizer.py (`state_dict`). Both take one step
with zero gradients when they are made, which counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fkernel.checkpoint.formats.deepspeed.parts import MASTER, step_in
from fkernel.checkpoint.formats.deepspeed.settings import check_by_element, named_groups, with_step
from fkernel.checkpoint.formats.deepspeed.states import ModelStates, check_keys
from fkernel.checkpoint.steps import steps_of
from fkernel.errors import CheckpointError, OptimizerStateError
from fkernel.shapes import Tree

SAMPLE = 16
"""Numbers that are compared before all are."""


def read_unsharded(states: ModelStates, params: Tree) -> tuple[Any, Mapping[Any, Any]]:
    """Give the optimizer's state_dict, with names where masters tell them, and its entries by number.

    Args:
        states: the one file.
        params: the model's parameters, each once, in its order.

    Raises:
        CheckpointError: flat masters are not the rounding of the model's weights in one order of them.
    """
    saved = check_keys(states.found["optimizer"], states.path)
    if "optimizer_state_dict" not in saved:
        base = check_keys(saved, states.path, "state", "param_groups")
        _check_entries(base, {}, states)
        return _numbered(base, {}, states), base["state"]
    base = check_keys(saved["optimizer_state_dict"], states.path, "state", "param_groups")
    numbers = [number for group in base["param_groups"] for number in group["params"]]
    weights = {name: states.module[name] for name in params if name in states.module}
    if "fp32_groups_flat" in saved:
        check_by_element(base)
        _check_entries(base, dict(zip(numbers, saved["fp32_groups_flat"], strict=True)), states)
        flats = [flat.detach() for flat in saved["fp32_groups_flat"]]
        return _from_flat(base, flats, weights, states), base["state"]
    groups = check_keys(saved, states.path, "fp32_groups")["fp32_groups"]
    masters = [[master.detach() for master in group] for group in groups]
    leaves = [master for group in masters for master in group]
    _check_entries(base, dict(zip(numbers, leaves, strict=True)), states)
    return _from_tensors(base, masters, weights, states), base["state"]


def _check_entries(base: Mapping[str, Any], masters: Mapping[Any, Any], states: ModelStates) -> None:
    """Raise unless masters and moments are float32, of one shape each, and each master has its own."""
    missing = [number for number in masters if not base["state"].get(number)]
    if missing and len(missing) < len(masters):  # all are stepped together
        raise CheckpointError(f"{states.path} has no state of the optimizer's parameters {missing}; others have one.")
    for number, entry in base["state"].items():
        cut = {key: leaf for key, leaf in entry.items() if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
        cut |= {MASTER: masters[number]} if number in masters else {}
        if {leaf.dtype for leaf in cut.values()} - {torch.float32} or len({leaf.shape for leaf in cut.values()}) > 1:
            found = {key: f"{leaf.dtype} {list(leaf.shape)}" for key, leaf in cut.items()}
            raise OptimizerStateError(
                f"{states.path} keeps of the optimizer's parameter {number} {found}; expected float32 masters and "
                f"moments of one shape."
            )


def _numbered(base: Mapping[str, Any], masters: Mapping[Any, Any], states: ModelStates) -> Any:
    """Leave parameters their numbers, for `fkernel.checkpoint.order` or the caller to name."""
    groups = base["param_groups"]
    made = named_groups(groups, [group["params"] for group in groups], states)
    recorded = [{"param_names": group["param_names"]} if "param_names" in group else {} for group in groups]
    state: dict[Any, Any] = {}
    for group in groups:
        own = {number: base["state"][number] for number in group["params"] if number in base["state"]}
        counts = "betas" in group and "eps" in group  # FusedAdam counts once for a whole group
        steps = steps_of(group, {str(number): entry for number, entry in own.items()}) if counts else {}
        state |= {
            number: {**entry, **({"step": steps[str(number)]} if entry and str(number) in steps else {})}
            | ({MASTER: masters[number]} if number in masters else {})
            for number, entry in own.items()
        }
    return {"state": state, "param_groups": [{**group, **names} for group, names in zip(made, recorded, strict=True)]}


def _from_tensors(base: Mapping[str, Any], groups: Any, weights: Tree, states: ModelStates) -> Any:
    """Name masters that are tensors of their own; where they do not tell, numbers stay."""
    names: list[list[str]] = []
    for masters in groups:
        found = in_order(
            len(masters), weights, lambda place, leaf, own=masters: place + 1 if _rounds(own[place], leaf) else None
        )
        if found is None:
            numbers = [number for group in base["param_groups"] for number in group["params"]]
            leaves = [master for own in groups for master in own]
            return _numbered(base, dict(zip(numbers, leaves, strict=True)), states)
        names.append(found)
    state: dict[str, Any] = {}
    for group, masters, own in zip(base["param_groups"], groups, names, strict=True):
        for number, master, name in zip(group["params"], masters, own, strict=True):
            entry = _counted(base["state"].get(number, {}), group, states)
            state[name] = {**entry, MASTER: master} if entry else {}
    return {"state": state, "param_groups": named_groups(base["param_groups"], names, states)}


def _from_flat(base: Mapping[str, Any], groups: Any, weights: Tree, states: ModelStates) -> Any:
    """Cut flat masters into parameters, and the moments with them."""
    names, state = list[list[str]](), dict[str, Any]()
    for group, flat in zip(base["param_groups"], groups, strict=True):

        def follows(start: int, leaf: torch.Tensor, flat: torch.Tensor = flat) -> int | None:
            end = start + leaf.numel()
            return end if end <= flat.numel() and _rounds(flat[start:end].view(leaf.shape), leaf) else None

        found = in_order(flat.numel(), weights, follows)
        if found is None:
            raise CheckpointError(
                f"{states.path} has flat float32 masters that do not round to the model's weights in one order of its "
                f"parameters, and no file records their order: weights and masters are of different steps, or "
                f"parameters of equal weights cannot be told apart."
            )
        names.append(found)
        entry, start = _counted(base["state"].get(group["params"][0], {}), group, states), 0
        for name in found:
            run, shape = slice(start, start + weights[name].numel()), weights[name].shape
            cut = {key: _cut(value, flat, run, shape, states) for key, value in entry.items()}
            state[name] = {**cut, MASTER: flat[run].view(shape)} if entry else {}
            start = run.stop
    return {"state": state, "param_groups": named_groups(base["param_groups"], names, states)}


def in_order(end: int, weights: Mapping[str, Any], follows: Callable[[int, Any], int | None]) -> list[str] | None:
    """Find the one way from 0 to an end through parameters in the model's order, each taken once or left out.

    Args:
        end: how far.
        weights: {name: weights}, in the model's order.
        follows: (how far one is, the next parameter's weights) → how far with it, or None where it does not fit.

    Returns:
        The parameters that are taken; None where there is no way, or more than one.

    Example:
        >>> in_order(3, {"a": 1, "b": 9, "c": 2}, lambda far, size: far + size if far + size < 4 else None)
        ['a', 'c']
        >>> in_order(1, {"a": 1, "b": 1}, lambda far, size: far + size if far + size < 4 else None)  # a or b?
    """
    names = [*weights]
    ways: dict[int, dict[int, tuple[int, int | None]]] = {0: {-1: (1, None)}}  # {how far: {last: (ways, far before)}}
    for place, name in enumerate(names):
        reached = {far: sum(count for count, _ in ways[far].values()) for far in ways}
        for far, count in reached.items():
            following = follows(far, weights[name]) if far < end else None
            if following is not None:
                ways.setdefault(following, {})[place] = (count, far)
    if sum(count for count, _ in ways.get(end, {}).values()) != 1:
        return None
    taken: list[str] = []
    far: int | None = end
    limit = len(names)
    while far:
        place, (_, before) = max((last, way) for last, way in ways[far].items() if last < limit)
        taken.append(names[place])
        far, limit = before, place
    return taken[::-1]


def _counted(entry: Mapping[str, Any], group: Mapping[str, Any], states: ModelStates) -> Mapping[str, Any]:
    """An entry with its steps as a number."""
    told = with_step(entry, group)
    return {**told, "step": step_in(told["step"], states.path)} if "step" in told else told


def _cut(value: Any, flat: torch.Tensor, run: slice, shape: torch.Size, states: ModelStates) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.shape != flat.shape:
        raise CheckpointError(
            f"{states.path} has moments of {list(value.shape)} numbers beside masters of {list(flat.shape)}."
        )
    return value[run].view(shape)


def _rounds(master: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether weights are the rounding of a master."""
    if master.shape != leaf.shape:
        return False
    sample = master.reshape(-1)[:SAMPLE].to(leaf.dtype), leaf.reshape(-1)[:SAMPLE]
    return torch.equal(*sample) and torch.equal(master.to(leaf.dtype), leaf)
