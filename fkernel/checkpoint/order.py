"""Which parameter is number i of an optimizer that recorded no names?

A `state_dict` numbers the moments in the order in which the optimizer was given its parameters, group by group. Where
that order was not recorded it must be one that a known trainer makes of the model; each is tried, and one that does
not fit the sizes of the groups and the shape of every moment is out. What is left is believed only if it is one
order: two that both fit would give two different answers, and nothing in the file says which is true.

A run that froze a part of its model leaves fewer moments, and no file says which. Where no order fits whole, each is
tried with parameters left out, and is believed only if the moments' shapes leave one way to do so, of one order.

    named_parameters      the trainable parameters, one group
    all_parameters        all parameters, frozen ones too, one group
    trainer               Hugging Face's Trainer, TRL: decay (neither bias nor norm), then no decay
    trainer_before_4_51   the same, where only `nn.LayerNorm` counted as a norm: RMSNorm's weights decay
    by_dimension          matrices, then vectors (nanoGPT, litgpt)

Source: transformers 5.23, `Trainer.create_optimizer` and `get_decay_parameter_names`; before 4.51, the same without the
patterns for norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fkernel.errors import OptimizerStateError

NORMS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

Groups = list[list[str]]
"""Names, group by group, in the order in which the optimizer was given them."""
Shape = tuple[int, ...] | None
"""Of the moments in one numbered place; None where the optimizer never stepped it."""


def find_order(places: Sequence[Sequence[Shape]], model: torch.nn.Module, order: str | None = None) -> Groups:
    """Find the one known order of a model's parameters that fits an optimizer's groups.

    Args:
        places: what the state_dict tells of each numbered place, group by group.
        model: the model that was optimized, its frozen parameters marked by `requires_grad`.
        order: one of `ORDERS`, where the caller knows; it must fit all the same.

    Returns:
        A name for every place.

    Raises:
        OptimizerStateError: none fits, or more than one; it says why each does not, and what decides.

    Example:
        >>> find_order([[(2, 3), (2,)]], torch.nn.Linear(3, 2))
        [['weight', 'bias']]
    """
    if order is not None and order not in ORDERS:
        raise OptimizerStateError(f"order is {order!r}; the known ones are {', '.join(ORDERS)}.")
    shapes = {name: tuple(leaf.shape) for name, leaf in model.named_parameters()}
    # A group that a trainer makes and has no parameter for may or may not have been kept: empty ones are not compared.
    wanted = [[*group] for group in places if group]
    found, fitting, reasons = list[Groups](), list[str](), list[str]()
    for name in ORDERS if order is None else (order,):
        groups = [group for group in ORDERS[name](model) if group]
        reason = _misfit(groups, wanted, shapes)
        if reason:
            reasons.append(f"{name}: {reason}")
        elif groups not in found:
            found.append(groups)
            fitting.append(name)
    if not found:
        ways = _subsets(places, model, order, shapes)
        if len(ways) == 1:
            return ways[0]
        several = "; with some of the model's parameters frozen, more than one way fits" if ways else ""
        raise OptimizerStateError(
            f"The optimizer recorded no parameter names, and its groups of {[len(group) for group in places]} are in "
            f"no known order of this model's parameters ({'; '.join(reasons)}{several}). Give their names in the "
            f"optimizer's order: optimizer_param_names.json beside the state, or names=; what is not named is frozen."
        )
    if len(found) > 1:
        raise OptimizerStateError(
            f"The optimizer recorded no parameter names, and more than one known order of them fits every shape: "
            f"{', '.join(fitting)}. Say which one the training used, such as order={fitting[0]!r}; or give "
            f"their names in the optimizer's order: optimizer_param_names.json beside the state, or names=."
        )
    named = iter(found[0])
    return [next(named) if group else [] for group in places]


def _misfit(groups: Groups, places: list[list[Shape]], shapes: dict[str, tuple[int, ...]]) -> str:
    """Say why an order does not fit, or nothing where it does."""
    sizes = [len(group) for group in groups]
    if sizes != [len(group) for group in places]:
        return f"it has groups of {sizes}"
    for group, row in zip(groups, places, strict=True):
        for name, shape in zip(group, row, strict=True):
            if shape not in (None, shapes[name]):
                return f"{name!r} is {list(shapes[name])}, the moments in its place {list(shape or ())}"
    return ""


def _subsets(
    places: Sequence[Sequence[Shape]], model: torch.nn.Module, order: str | None, shapes: dict[str, tuple[int, ...]]
) -> list[Groups]:
    """List the ways to leave parameters out of the known orders so that every shape fits; two are enough."""
    ways: list[Groups] = []
    for name in ORDERS if order is None else (order,):
        groups = ORDERS[name](model)
        if len(groups) != len(places) or not any(shape for row in places for shape in row):
            continue
        first = [_chosen(group, row, shapes) for group, row in zip(groups, places, strict=True)]
        last = [_chosen(group[::-1], row[::-1], shapes) for group, row in zip(groups, places, strict=True)]
        early = [group for group in first if group is not None]
        late = [group[::-1] for group in last if group is not None]
        if len(early) == len(late) == len(groups):
            ways += [early, late]
    return [way for number, way in enumerate(ways) if way not in ways[:number]]


def _chosen(group: Sequence[str], row: Sequence[Shape], shapes: dict[str, tuple[int, ...]]) -> list[str] | None:
    """Choose a parameter for each place as early as may be, keeping the order; None where they do not suffice.

    Where the earliest choice, made from either end, is the same, there is no other.
    """
    names = iter(group)
    chosen = [next((name for name in names if shape in (None, shapes[name])), None) for shape in row]
    return None if None in chosen else [name for name in chosen if name is not None]


def _trainable(model: torch.nn.Module) -> list[str]:
    return [name for name, leaf in model.named_parameters() if leaf.requires_grad]


def _halves(model: torch.nn.Module, first: Callable[[str], bool]) -> Groups:
    names = _trainable(model)
    return [[name for name in names if first(name)], [name for name in names if not first(name)]]


def _as_trainer(model: torch.nn.Module, patterns: list[str]) -> Groups:
    from transformers.trainer_pt_utils import get_parameter_names

    decaying = {*get_parameter_names(model, [torch.nn.LayerNorm], patterns)}
    return _halves(model, decaying.__contains__)


def _by_dimension(model: torch.nn.Module) -> Groups:
    matrices = {name for name, leaf in model.named_parameters() if leaf.ndim >= 2}
    return _halves(model, matrices.__contains__)


ORDERS: dict[str, Callable[[Any], Groups]] = {
    "named_parameters": lambda model: [_trainable(model)],
    "all_parameters": lambda model: [[name for name, _ in model.named_parameters()]],
    "trainer": lambda model: _as_trainer(model, NORMS),
    "trainer_before_4_51": lambda model: _as_trainer(model, NORMS[:1]),
    "by_dimension": _by_dimension,
}
"""{name: model -> groups}: the orders that trainers are known to make."""
