"""A live optimizer's settings and state, by parameter name, as JSON and plain tensors.

Written so that reading gives back what `optimizer.state_dict()` would, with `param_names` in each group:
`fkernel.checkpoint.optimizer_state` takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fkernel.errors import OptimizerStateError, listing
from fkernel.shapes import Tensor, Tree

WRAPPED = ("module", "_orig_mod")
"""Attributes under which DDP and torch.compile hold the module inside."""
OWN = ("params", "param_names")


def bare_model(model: nn.Module) -> nn.Module:
    """Take DDP and torch.compile off a module.

    Args:
        model: wrapped or not.

    Example:
        >>> linear = nn.Linear(1, 1)
        >>> bare_model(torch.nn.parallel.DataParallel(linear)) is linear
        True
    """
    kinds = (nn.parallel.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, kinds) or hasattr(model, "_orig_mod"):
        model = next(getattr(model, name) for name in WRAPPED if isinstance(getattr(model, name, None), nn.Module))
    return model


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Take accelerate's wrapper off an optimizer."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def trained_names(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[list[list[str]]]:
    """Name the trained parameters of every group of every optimizer.

    Args:
        model: whose names they are.
        optimizers: they have disjoint parameters.

    Returns:
        Names by optimizer and group; a frozen parameter has none.

    Raises:
        OptimizerStateError: an optimizer has a parameter that the model has not, or none of them moves one that
            requires a gradient.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> trained_names(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
        [[['weight', 'bias']]]
    """
    name_of = {id(leaf): name for name, leaf in model.named_parameters()}
    named: list[list[list[str]]] = []
    for i, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            foreign = [leaf for leaf in group["params"] if id(leaf) not in name_of and leaf.requires_grad]
            if foreign:
                raise OptimizerStateError(
                    f"Optimizer {i} has {len(foreign)} parameters that are not the model's, the first of shape "
                    f"{list(foreign[0].shape)}; expected the optimizer of this model. Was the model wrapped or loaded "
                    f"again after the optimizer was made?"
                )
        named.append(
            [[name_of[id(leaf)] for leaf in g["params"] if leaf.requires_grad] for g in optimizer.param_groups]
        )
    moved = {name for groups in named for group in groups for name in group}
    left = [name for name, leaf in model.named_parameters() if leaf.requires_grad and name not in moved]
    if not moved:
        raise OptimizerStateError("No optimizer has a parameter of the model that requires a gradient.")
    if left:
        raise OptimizerStateError(
            f"{listing(left)} require(s) a gradient, and no optimizer moves them; give all optimizers, or freeze them "
            f"with requires_grad_(False)."
        )
    return named


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group, JSON.

    Args:
        optimizer: a live one.

    Raises:
        OptimizerStateError: a setting is neither a number, a text nor a list of them.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> settings_of(torch.optim.SGD(model.parameters(), lr=0.1))[0]["lr"]
        0.1
    """
    return [{key: _plain(key, value) for key, value in g.items() if key not in OWN} for g in optimizer.param_groups]


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer will leave this step out: a GradScaler tells it where gradients are infinite.

    Example:
        >>> overflowed(torch.optim.AdamW(nn.Linear(2, 1).parameters()))
        False
    """
    infinite = getattr(optimizer, "found_inf", None)
    return infinite is not None and bool(infinite)


def class_of(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class, as "torch.optim.adamw.AdamW"."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def entries_of(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What optimizers keep of each parameter: tensors, and everything else.

    Args:
        model: whose names they are.
        optimizers: live ones.

    Returns:
        {"name/key": tensor} and {name: {key: number}}.

    Raises:
        OptimizerStateError: it keeps something that is neither a tensor nor a number.
    """
    name_of = {id(leaf): name for name, leaf in model.named_parameters()}
    tensors, rest = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for optimizer in optimizers:
        for leaf, entry in optimizer.state.items():
            name = name_of.get(id(leaf))
            for key, value in entry.items() if name is not None else ():
                if type(value) in (torch.Tensor, nn.Parameter):
                    tensors[f"{name}/{key}"] = value.detach()
                else:
                    rest.setdefault(str(name), {})[key] = _plain(f"{name}/{key}", value)
    return tensors, rest


def state_dict_of(
    groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], tensors: Tree, rest: Mapping[str, Any]
) -> dict[str, Any]:
    """Put one optimizer's state_dict together again.

    Args:
        groups: settings of each group.
        names: of its parameters, by group.
        tensors: {"name/key": tensor}.
        rest: {name: {key: number}}.

    Returns:
        As `optimizer.state_dict()` gives it, with `param_names` in each group.

    Example:
        >>> state_dict_of([{"lr": 0.1}], [["w"]], {"w/exp_avg": torch.zeros(1)}, {"w": {"step": 1}})["state"]
        {0: {'exp_avg': tensor([0.]), 'step': 1}}
    """
    state, made, start = dict[int, dict[str, Any]](), list[dict[str, Any]](), 0
    by_name = dict[str, dict[str, Any]]()
    for place, tensor in tensors.items():
        name, _, key = place.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    for settings, own in zip(groups, names, strict=True):
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        made.append({**plain, "params": [*range(start, start + len(own))], "param_names": [*own]})
        for i, name in enumerate(own):
            if entry := {**by_name.get(name, {}), **rest.get(name, {})}:
                state[start + i] = entry
        start += len(own)
    return {"state": state, "param_groups": made}


def _plain(key: str, value: Any) -> Any:
    """A JSON value."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(key, each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise OptimizerStateError(
        f"The optimizer keeps {key!r} as {type(value).__name__}, which a recording does not hold; expected plain "
        f"tensors, numbers and texts. Wrapped tensors (torchao) are not recorded: take snapshots of the checkpoint."
    )
