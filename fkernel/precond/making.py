"""An optimizer's state from what torch keeps of each parameter, or from nothing, before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch

from fkernel.boundary import public
from fkernel.errors import OptimizerStateError, listing
from fkernel.precond.base import OptimizerState
from fkernel.precond.state import check_tree
from fkernel.precond.updates import OPTIMIZERS, Optimizer
from fkernel.shapes import Tree

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
"""AdamW's defaults: its state has none."""


@public
def fresh_state(kind: str, params: Tree, **settings: Any) -> OptimizerState:
    """Make an optimizer's state before its first step: moments of zero, step 0.

    Args:
        kind: one of `fkernel.precond.updates.OPTIMIZERS`.
        params: {name: [*shape]}, the parameters that the optimizer will move.
        settings: as the optimizer's own class names them (lr, betas, eps, weight_decay, …), or as its state does; each
            one value, or {name: value} where groups differ. What is not given has that class's default, but for lr.

    Raises:
        OptimizerStateError: the kind or a setting is not known, or lr is missing.

    Example:
        >>> fresh_state("lion", {"w": torch.zeros(2)}, lr=1e-4, betas=(0.95, 0.98)).beta1
        {'w': 0.95}
    """
    check_tree(params, "params")
    optimizer = _known(kind)
    names = {key for key, _ in optimizer.settings.values()} | set(optimizer.settings)
    if unknown := sorted(set(settings) - names):
        raise OptimizerStateError(f"{kind} has no setting {listing(unknown)}; it has {listing(sorted(names))}.")
    relative = kind == "transformers_adafactor" and settings.get("relative_step", True)
    if relative == ("lr" in settings):
        raise OptimizerStateError(
            f"{kind} is given lr={settings['lr']!r} and finds its own: say relative_step=False, or give no lr."
            if relative
            else f"lr is not given, and {kind} has no learning rate of its own."
        )
    values = {
        name: (ADAMW if kind == "adamw" else {})
        | {key: value[name] if isinstance(value, Mapping) else value for key, value in settings.items()}
        for name in params
    }
    return state_from(kind, params, {name: {} for name in params}, values)


@public
def state_from(
    kind: str, params: Tree, entries: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]]
) -> OptimizerState:
    """Make a state of what an optimizer keeps of each parameter and what its group says, both by parameter name.

    Args:
        kind: one of `fkernel.precond.updates.OPTIMIZERS`.
        params: {name: [*shape]}.
        entries: {name: {"step": …, "exp_avg": …}}, as torch's state_dict has it; an empty one was never stepped.
        groups: {name: {"lr": …, "betas": …}}, as a parameter group has it; what it lacks has the state's default.

    Raises:
        OptimizerStateError: a group lacks what has no default, or a value is impossible.

    Example:
        >>> w, b = {"w": torch.zeros(1)}, {"momentum_buffer": torch.ones(1)}
        >>> state_from("sgd", w, {"w": b}, {"w": {"lr": 0.1, "momentum": 0.9}}).momentum
        {'w': 0.9}
    """
    optimizer = _known(kind)
    made: dict[str, dict[str, Any]] = {field.name: {} for field in fields(optimizer.state) if field.name != "width"}
    for name, leaf in params.items():
        entry = entries[name]
        for moment, shape in optimizer.state.shapes(tuple(leaf.shape)).items():
            moments = entry.get(moment) if entry else leaf.new_zeros(shape)
            if moments is None:
                raise OptimizerStateError(f"The state of {name!r} has {listing([*entry])} but no {moment}.")
            made[moment][name] = moments
        made_here = {key: entry[key] for key in optimizer.state.OPTIONAL if entry.get(key) is not None}
        made_here |= {key: entry.get(key, int(key == "mu_product")) for key in optimizer.numbers}
        if "scale" in made:
            made_here["scale"] = float(leaf.detach().double().square().mean().sqrt())
        for key, value in {**made_here, **_settings(optimizer, groups[name], kind)}.items():
            made[key][name] = value
    return optimizer.state(**made)


def _settings(optimizer: Optimizer, group: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Read a group's settings: under the state's own names, the optimizer's, or by default."""
    defaults = {field.name: field.default for field in fields(optimizer.state)}
    values: dict[str, Any] = {}
    for own, (key, place) in optimizer.settings.items():
        value = group[own] if own in group and own != key else group.get(key, MISSING)
        if value is MISSING:
            value = defaults[own]
        elif place is not None and key in group:
            value = group[key][place]
        if value is MISSING:
            raise OptimizerStateError(f"A parameter group of {kind} lacks {key!r}.")
        values[own] = float(value) if isinstance(value, torch.Tensor) else value
    return values


def _known(kind: str) -> Optimizer:
    if kind not in OPTIMIZERS:
        raise OptimizerStateError(f"{kind!r} is no optimizer that is known; expected one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[kind]
