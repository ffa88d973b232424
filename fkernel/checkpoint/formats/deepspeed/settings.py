"""Parameter groups of a DeepSpeed checkpoint: what the optimizer's class and DeepSpeed's configuration tell together.

torch's AdamW says whether its decay is decoupled; DeepSpeed's FusedAdam and DeepSpeedCPUAdam do not, and the
configuration does, where DeepSpeed made the optimizer from it: "AdamW" is, and "Adam" is unless adam_w_mode is false.
elastic_checkpoint leaves the groups out altogether; then the configuration must have every number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fkernel.checkpoint.formats.deepspeed.states import ModelStates
from fkernel.checkpoint.recognising import recognise
from fkernel.errors import CheckpointError, OptimizerStateError

NUMBERS = ("lr", "betas", "eps", "weight_decay")
BY_ELEMENT = ("adamw", "adam", "nadam", "radam", "sgd", "rmsprop", "adagrad", "lion")
"""Optimizers that treat each number by itself, so that a flat tensor is stepped as its parameters would be."""


def named_groups(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[Any]], states: ModelStates) -> list[Any]:
    """Give the groups the parameters' names, and the kind of their decay where the configuration tells it.

    Args:
        groups: of the optimizer's state_dict.
        names: of each group's parameters.
        states: with the configuration.

    Raises:
        OptimizerStateError: the scheduler has set other learning rates.
    """
    decoupled = _decoupled(states.config)
    named: list[dict[str, Any]] = []
    for group, own in zip(groups, names, strict=True):
        kept = {key: value for key, value in group.items() if key not in ("params", "param_names", "step")}
        if decoupled is not None and ("amsgrad" in kept or "bias_correction" in kept):
            kept = {"amsgrad": False, "decoupled_weight_decay": decoupled, **kept}
        named.append({"params": [*own], **kept})
    _check_schedule(named, states)
    return named


def with_step(entry: Any, group: Mapping[str, Any]) -> Any:
    """Give what an optimizer keeps of a tensor with the steps taken, where its group counts them (apex's FusedAdam).

    Example:
        >>> with_step({"exp_avg": 0.5}, {"step": 7})
        {'exp_avg': 0.5, 'step': 7}
    """
    if not isinstance(entry, Mapping) or not entry or "step" in entry or not group.get("step"):
        return entry
    return {**entry, "step": group["step"]}


def check_by_element(state_dict: Any) -> None:
    """Raise OptimizerStateError where an optimizer's step depends on how the flat tensor is cut.

    Args:
        state_dict: with a flat tensor for each group.
    """
    groups = state_dict["param_groups"]
    if any("use_muon" in group for group in groups):
        raise OptimizerStateError("DeepSpeed's Muon keeps its momentum in flat tensors, which is not modelled.")
    for written in recognise(state_dict, decoupled=True):
        if written.kind not in BY_ELEMENT:
            raise OptimizerStateError(
                f"The optimizer is {written.writer}, over flat tensors of many parameters each, as ZeRO keeps them: "
                f"its step depends on how they were cut, which is not modelled. Optimizers that treat each number by "
                f"itself are: {', '.join(BY_ELEMENT)}."
            )


def configured_groups(states: ModelStates) -> list[dict[str, Any]]:
    """Make the one group of an elastic checkpoint, which holds none, from the configuration.

    Raises:
        CheckpointError: there are several, or the configuration lacks a number.
    """
    made = states.config.get("optimizer") or {}
    numbers = made.get("params") or {}
    missing = [key for key in NUMBERS if key not in numbers or isinstance(numbers[key], str)]
    if len(states.shapes) != 1 or _decoupled(states.config) is None or missing:
        raise CheckpointError(
            f"The optimizer beside {states.path} was saved with elastic_checkpoint, which leaves out lr, betas, ε and "
            f"decay; the configuration tells them for one group of an optimizer that DeepSpeed made, and here are "
            f"{len(states.shapes)} group(s) and {made or 'no optimizer in it'}. Save with elastic_checkpoint false."
        )
    rates = _rates(states)
    if states.found.get("lr_scheduler") and rates is None:
        raise CheckpointError(
            f"The optimizer beside {states.path} was saved with elastic_checkpoint, which leaves out lr, and its "
            f"scheduler does not tell it. Save with elastic_checkpoint false."
        )
    group = {key: numbers[key] for key in NUMBERS} | {"lr": numbers["lr"] if rates is None else rates[0]}
    return [{"params": [0], **group, "amsgrad": False}]


def _decoupled(config: Mapping[str, Any]) -> bool | None:
    """Whether decay is AdamW's, where DeepSpeed made the optimizer from its configuration; None where it did not."""
    made = config.get("optimizer")
    made = made if isinstance(made, Mapping) else {}
    kind = str(made.get("type", "")).lower()
    if kind not in ("adam", "adamw"):
        return None
    return kind == "adamw" or bool((made.get("params") or {}).get("adam_w_mode", True))


def _rates(states: ModelStates) -> list[float] | None:
    """The learning rates that the scheduler has set last, where it keeps them."""
    schedule = states.found.get("lr_scheduler")
    last = schedule.get("_last_lr") if isinstance(schedule, Mapping) else None
    return [float(rate) for rate in last] if isinstance(last, list | tuple) and last else None


def _check_schedule(groups: Sequence[Mapping[str, Any]], states: ModelStates) -> None:
    rates, own = _rates(states), [float(group["lr"]) for group in groups if "lr" in group]
    if rates is None or len(rates) != len(own):
        return  # a scheduler of another kind
    if not all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(rates, own, strict=True)):
        raise OptimizerStateError(
            f"The optimizer's learning rates are {own}, the scheduler in {states.path} has set {rates}: the two are "
            f"not of the same step. Load files of one checkpoint."
        )
