"""AdamW's state_dict → AdamWState, keyed by the parameter names that the optimizer recorded.

A state_dict numbers its parameters. `torch.optim.AdamW(model.named_parameters())` also records their names in each
group (torch ≥ 2.6), and those are believed; nothing is ever matched by position or by shape.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fkernel.errors import OptimizerStateError, listing
from fkernel.precond import AdamWState
from fkernel.precond.state import check_covers
from fkernel.shapes import Tensor, Tree


def load_adamw_state(path: str | Path, params: Tree) -> AdamWState:
    """Read `optimizer.pt` (weights only: nothing in the file is executed) and key it by parameter name.

    Args:
        path: a file written by `torch.save(optimizer.state_dict())`.
        params: {name: tensor}, the parameters that the state must be about.

    Returns:
        The state before the next step.

    Raises:
        OptimizerStateError: the file is missing, damaged or holds something else; see also `adamw_state`.
    """
    try:
        state_dict = torch.load(Path(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OptimizerStateError(f"There is no optimizer state at {path}.") from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise OptimizerStateError(
            f"{path} could not be read as tensors only ({str(error).splitlines()[0]}); expected a file written by "
            f"torch.save(optimizer.state_dict())."
        ) from error
    return adamw_state(state_dict, params)


def adamw_state(state_dict: Any, params: Tree) -> AdamWState:
    """Key a `torch.optim.AdamW` state_dict by parameter name.

    Args:
        state_dict: what `optimizer.state_dict()` returned, with `param_names` recorded in every group.
        params: {name: tensor}, the parameters that the state must be about. One that the optimizer has not stepped
            yet has zero moments and step 0.

    Returns:
        The state before the next step; learning rate, betas, ε and decay are the groups' own.

    Raises:
        OptimizerStateError: names are not recorded, the optimizer is not plain AdamW (amsgrad, maximize, coupled
            decay), or a number in it is impossible.
        TreeError: it is about other parameters, or shapes differ.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        >>> adamw_state(optimizer.state_dict(), dict(model.named_parameters())).lr
        {'weight': 0.1, 'bias': 0.1}
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise OptimizerStateError("This is no optimizer state_dict: it lacks 'state' and 'param_groups'.")
    group_of: dict[str, Mapping[str, Any]] = {}
    entry_of: dict[str, Mapping[str, Any]] = {}
    for number, group in enumerate(state_dict["param_groups"]):
        _check_group(group, number)
        for name, index in zip(group["param_names"], group["params"], strict=True):
            group_of[name], entry_of[name] = group, state_dict["state"].get(index, {})
    names = [name for name in params if name in group_of] + [name for name in group_of if name not in params]
    state = AdamWState(
        step={name: int(entry_of[name].get("step", 0)) for name in names},
        exp_avg={name: _moment(entry_of[name], "exp_avg", name, params) for name in names},
        exp_avg_sq={name: _moment(entry_of[name], "exp_avg_sq", name, params) for name in names},
        lr={name: float(group_of[name]["lr"]) for name in names},
        beta1={name: float(group_of[name]["betas"][0]) for name in names},
        beta2={name: float(group_of[name]["betas"][1]) for name in names},
        eps={name: float(group_of[name]["eps"]) for name in names},
        weight_decay={name: float(group_of[name]["weight_decay"]) for name in names},
    )
    check_covers(state, list(params), params, "params")
    return state


def _check_group(group: Mapping[str, Any], number: int) -> None:
    if "param_names" not in group:
        raise OptimizerStateError(
            f"Parameter group {number} records no param_names, so its {len(group['params'])} moments cannot be told "
            f"apart; build the optimizer with torch.optim.AdamW(model.named_parameters(), …)."
        )
    missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
    if missing:
        raise OptimizerStateError(f"Parameter group {number} lacks {listing(missing)}: this is not an AdamW state.")
    for flag in ("amsgrad", "maximize"):
        if group.get(flag, False):
            raise OptimizerStateError(f"Parameter group {number} has {flag}=True, which is not modelled.")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise OptimizerStateError(
            f"Parameter group {number} is Adam's with weight_decay={group['weight_decay']} added to the gradient; only "
            f"AdamW's decoupled decay is modelled."
        )


def _moment(entry: Mapping[str, Any], key: str, name: str, params: Tree) -> Tensor:
    if key in entry:
        return entry[key]
    if entry:
        raise OptimizerStateError(f"The state of {name!r} has {listing([*entry])} but no {key}: not an AdamW state.")
    return torch.zeros_like(params[name]) if name in params else torch.zeros(())
