"""How many steps has each parameter taken? The bias correction 1 − βᵗ hangs on it: 91 % of a step, taken for the first.

    torch.optim                       state["step"], each parameter's own; they may differ
    apex's and TransformerEngine's    group["step"], and none in the states
    DeepSpeed's FusedAdam             state["step"], of which only the last parameter's of a group advances

The last two count once for a whole group, so that what is told in a group is told of all its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fkernel.errors import OptimizerStateError


def steps_of(group: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Give the steps that each parameter of a group has taken.

    Args:
        group: a parameter group.
        entries: {name: what the state has of it}; an empty one was never stepped.

    Raises:
        OptimizerStateError: steps disagree, are no whole numbers, or there are moments and none is told.

    Example:
        >>> moments = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
        >>> steps_of({"amsgrad": False, "step": 7}, {"w": moments, "b": {}})
        {'w': 7, 'b': 0}
    """
    own = {name: _whole(entry["step"], repr(name)) for name, entry in entries.items() if "step" in entry}
    shared = _whole(group["step"], "the group") if group.get("step") is not None else None
    counts_once = "bias_correction" in group and "amsgrad" not in group  # fused
    if counts_once:
        steps = dict.fromkeys(entries, _one_of({*own.values(), shared or 0} - {0}))
    else:
        steps = {name: own.get(name, shared or 0) if entry else 0 for name, entry in entries.items()}
        if shared and any(step != shared for step in own.values()):
            raise _disagree({*own.values(), shared})
    for name, entry in entries.items():
        if entry and (steps[name] == 0) and (name not in own or _moved(entry)):
            says = "step 0" if name in own or shared is not None else "no step, neither its own nor its group's"
            raise OptimizerStateError(
                f"The state of {name!r} has moments and tells {says}: without the number of steps taken the bias "
                f"correction is unknown, and the step may be ten times off. Add it to the parameter group, as 'step', "
                f"and save the state again."
            )
    return steps


def _one_of(steps: set[int]) -> int:
    if len(steps) > 1:
        raise _disagree(steps)
    return next(iter(steps), 0)


def _disagree(steps: set[int]) -> OptimizerStateError:
    return OptimizerStateError(
        f"The steps taken disagree within one parameter group: {sorted(steps)}. Its optimizer counts once for a whole "
        f"group; the state is of several runs, or was edited. Save it again from the training."
    )


def _moved(entry: Mapping[str, Any]) -> bool:
    kept = ("exp_avg", "exp_avg_sq", "state1", "state2", "row_var", "variance")
    moments: list[Any] = [entry[key] for key in kept if type(entry.get(key)) in (torch.Tensor, torch.nn.Parameter)]
    return any(bool(leaf.any()) for leaf in moments)


def _whole(value: Any, whose: str) -> int:
    try:
        if isinstance(value, bool) or (isinstance(value, torch.Tensor) and not _is_real(value)):
            raise ValueError
        number = float(value)
        if number == int(number) >= 0:
            return int(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise OptimizerStateError(f"The step of {whose} is {value!r}; expected a whole number of steps taken, 0 or more.")


def _is_real(value: torch.Tensor) -> bool:
    return value.layout == torch.strided and not value.is_complex() and not value.is_meta
