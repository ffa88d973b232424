"""Arguments of every public function of `func`, `precond`, `engine` and `analysis`, one of them spoilt.

What does not change the meaning (memory order, autograd's marks, the order of names) must not change the answer.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.torture.examples import Call, example_calls, public_functions
from tests.torture.grammar import junk
from tests.torture.rightness import NotRightError, check_finite, numbers_of

SAME: dict[str, Callable[[torch.Tensor], Any]] = {
    "strided": lambda leaf: leaf if not leaf.ndim else torch.stack([leaf, leaf], -1)[..., 0],
    "grad": lambda leaf: leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf,
    "inference": lambda leaf: _inference(leaf),
    "parameter": lambda leaf: torch.nn.Parameter(leaf.detach().clone(), leaf.is_floating_point()),
}
"""Another tensor that means the same."""
VALUES = {"nan": math.nan, "inf": -math.inf, "tiny": 1e-320, "negative": -1.0}
KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "short": lambda leaf: leaf.reshape(-1)[:-1],
    "flat": lambda leaf: leaf.reshape(-1),
    "deep": lambda leaf: leaf[None],
    "deeper": lambda leaf: leaf[..., None],
    "scalar": lambda leaf: leaf.sum(),
    "empty": lambda leaf: leaf[:0] if leaf.ndim else leaf.reshape(1)[:0],
    "int": lambda leaf: leaf.int(),
    "bool": lambda leaf: leaf.bool(),
    "half": lambda leaf: leaf.half(),
    "bfloat16": lambda leaf: leaf.bfloat16(),
    "double": lambda leaf: leaf.double(),
    "complex": lambda leaf: leaf.to(torch.complex64),
    "meta": lambda leaf: leaf.to("meta"),
    "sparse": lambda leaf: leaf.to_sparse(),
    "list": lambda leaf: leaf.tolist(),
    "numpy": lambda leaf: leaf.detach().numpy(),
}


def _inference(leaf: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return leaf.clone()


LINEAR = (
    *("func.weighted_sum", "func.squared_sum", "func.squared_norms", "func.contract", "func.contract_by"),
    *("func.through_detach", "func.with_masked_padding_grad", "engine.mean_of", "engine.nodes_of"),
    *("precond.identity", "precond.diagonal", "precond.chain", "precond.select", "precond.partition"),
    *("precond.linearized", "precond.secant", "precond.broyden", "precond.real_entry", "analysis.group_sums"),
    *("engine.pearson", "engine.state_against_step", "analysis.missed"),
)
"""Sums and products of what is given, and functions given back: a NaN that goes in comes out, and the engine, which
calls them, looks at what it gives and at what it gets. The last three say in their documentation what a NaN means."""
Place = tuple[Any, ...]


def _children(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
    return {}


def places(value: Any, here: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Walk through arguments: dictionaries, lists, tuples, dataclasses, and what they hold."""
    yield here, value
    for key, each in _children(value).items():
        yield from places(each, (*here, key))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy of arguments in which something else stands at a place."""
    if not place:
        return new
    key, *rest = place
    children = {**_children(value)}
    children[key] = replaced(children[key], tuple(rest), new)
    if isinstance(value, dict):
        return children
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return type(value)._make(children.values())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, list | tuple):
        return type(value)(children.values())
    return dataclasses.replace(value, **children)


def spoilt_value(value: Any, draw: random.Random) -> tuple[str, Any, bool]:
    """Change an argument, or a part of one: (how, the new one, whether it means the same)."""
    if draw.random() < 0.1:
        return "other", junk(draw), False
    if isinstance(value, torch.Tensor) and not value.is_meta and value.layout == torch.strided:
        how = draw.choice([*SAME, *VALUES, "huge", *KINDS])
        if how in SAME:
            return how, SAME[how](value), True
        if how in KINDS:
            return how, KINDS[how](value), False
        changed = value.detach().clone()
        largest = torch.finfo(value.dtype).max if value.is_floating_point() else 2**40
        number = largest if how == "huge" else VALUES[how]
        if changed.numel() and (value.is_floating_point() or how in ("huge", "negative")):
            changed.view(-1)[draw.randrange(changed.numel())] = number
        return how, changed, not changed.numel()
    if isinstance(value, dict) and value:
        how, names = draw.choice(("gone", "more", "order")), [*value]
        if how == "gone":
            names.remove(draw.choice(names))
            return how, {name: value[name] for name in names}, False
        if how == "more":
            return how, {**value, "another": value[names[0]]}, False
        return how, {name: value[name] for name in reversed(names)}, True
    return "value", junk(draw), False


def _at(place: Place) -> str:
    return ".".join(map(str, place))


def public(place: Path) -> Callable[[random.Random], tuple[str, Callable[[], Any]]]:
    """A call of each public function, as its example has it, in which one thing is spoilt."""
    calls = {name: example_calls(name) for name in public_functions()}
    assert all(calls.values()), f"no example calls {[name for name in calls if not calls[name]]}"

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        name = draw.choice([*calls])
        call = draw.choice(calls[name])
        given = {"args": call.args, "kwargs": call.kwargs, "then": call.then}
        every = [(at, value) for at, value in places(given) if _is_argument(at)]
        if not every:
            return f"{name}: nothing to spoil", call.made
        at, value = draw.choice(every)
        how, new, same = spoilt_value(value, draw)

        def made() -> None:
            result = Call(call.function, **replaced(given, at, new)).made()
            if same and numbers_of(call.made()) is not None:
                check_same(result, call.made())
            if name not in LINEAR:
                check_finite(result)

        return f"{name}: {how} at {_at(at)}", made

    return family


def _is_argument(place: Place) -> bool:
    """Whether a place lies below an argument: ("args", 0), ("kwargs", "k"), ("then", 0, 0), ("then", 1, "k")."""
    return len(place) >= (3 if place[:1] == ("then",) else 2)


def check_same(result: Any, expected: Any) -> None:
    """Raise NotRightError where two results have other numbers."""
    own, wanted = dict(numbers_of(result)), dict(numbers_of(expected))
    if {*own} != {*wanted}:
        raise NotRightError("OTHER", f"the result has {sorted({*own} ^ {*wanted})} on one side alone")
    for name, leaf in own.items():
        a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (leaf, wanted[name]))
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise NotRightError("OTHER", f"{name} is {a}, and {b} for what means the same")
