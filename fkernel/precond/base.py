"""What the states of all optimizers have in common: every field is {name: …}, or one value for all parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch

from fkernel import tree
from fkernel.boundary import described
from fkernel.errors import OptimizerStateError
from fkernel.shapes import Tensor, Tree

LARGEST = 2.0**1000
"""Of a setting: beyond it products with parameters are infinite."""
T = TypeVar("T")
Setting = T | Mapping[str, T]
"""One value for all parameters, or {name: value}, as parameter groups have it."""
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What an optimizer remembers before a step, by parameter name. `AdamWState` is one; so are those of `updates`.

    Attributes:
        MOMENTS: fields of tensors that `shapes` tells of.
        OPTIONAL: further ones, of the parameter's shape, that it may lack: nothing has been remembered there.
        SQUARES: those of both that cannot be negative.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    SQUARES: ClassVar[tuple[str, ...]] = ()

    @property
    def names(self) -> list[str]:
        """The parameters, in order."""
        named = [value for each in fields(self) if isinstance(value := getattr(self, each.name), Mapping)]
        return list(dict.fromkeys(name for value in named for name in value))

    @classmethod
    def shapes(cls, shape: Shape) -> dict[str, Shape]:
        """Tell which moments a parameter of some shape must have, and their shapes: all of MOMENTS, its own."""
        return dict.fromkeys(cls.MOMENTS, shape)

    def of(self, name: str) -> Any:
        """Give one parameter's own values, None for what it lacks: what its update rule reads."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return SimpleNamespace(
            **{key: value.get(name) if isinstance(value, Mapping) else value for key, value in values.items()}
        )

    def restricted(self, names: Iterable[str]) -> OptimizerState:
        """Keep the state of some parameters, in their order; what it says of all stays."""
        named = {each.name: value for each in fields(self) if isinstance(value := getattr(self, each.name), Mapping)}
        wanted = list(names)
        return replace(
            self, **{key: {name: value[name] for name in wanted if name in value} for key, value in named.items()}
        )

    def misfit(self, name: str, shape: Shape) -> str:
        """Say which moment is not that of a parameter of this shape, or nothing where all are."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping) and name not in value and each.name not in (*self.MOMENTS, *self.OPTIONAL):
                return f"the optimizer state has no {each.name} of it"
        required = self.shapes(shape)
        for moment, expected in (required | dict.fromkeys(self.OPTIONAL, shape)).items():
            leaf = getattr(self, moment).get(name)
            if leaf is None and moment in required:
                return f"the optimizer state has no {moment} of it"
            if leaf is not None and tuple(leaf.shape) != expected:
                moments = "moments have" if expected == shape else f"{moment} has"
                return f"the optimizer state's {moments} {list(leaf.shape)}"
        return ""


@dataclass(frozen=True, eq=False)
class DecayingState(OptimizerState):
    """A state whose rule is given h = ±g + λθ, or whose optimizer takes lr λ θ off by itself.

    Attributes:
        weight_decay: λ.
        decoupled_weight_decay: whether decay is a term of the step, −lr λ θ, and not of the gradient.
        maximize: whether the optimizer climbs: its rule is given −g.
    """

    weight_decay: Setting[float] = field(default=0.0, kw_only=True)
    decoupled_weight_decay: Setting[bool] = field(default=False, kw_only=True)
    maximize: Setting[bool] = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for moment in (*self.MOMENTS, *self.OPTIONAL):
            leaves = getattr(self, moment)
            if not isinstance(leaves, Mapping):
                raise OptimizerStateError(f"{moment} is a {type(leaves).__name__}; expected {{name: tensor}}.")
            for name, leaf in leaves.items():
                check_moment(leaf, f"{moment}[{name!r}]", moment in self.SQUARES)
        for each in fields(self):
            if each.name not in (*self.MOMENTS, *self.OPTIONAL):
                check_setting(getattr(self, each.name), each.name)

    @staticmethod
    def decay_step(past: Any) -> float:
        """Tell how far decoupled decay goes along −λθ, of one parameter's values: lr."""
        return past.lr


def check_moment(leaf: Tensor, what: str, square: bool = False) -> None:
    """Raise OptimizerStateError where a moment is no real tensor, is not finite, or is a negative mean of squares."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_complex() or leaf.is_quantized:
        raise OptimizerStateError(f"{what} is {described(leaf)}; expected a dense tensor of real numbers.")
    if leaf.is_meta:
        raise OptimizerStateError(f"{what} lies on the meta device and holds no values; load the state first.")
    if not tree.all_finite(leaf):
        bad = int((~torch.isfinite(leaf)).sum())
        raise OptimizerStateError(
            f"{what} holds {bad} non-finite value(s) of {leaf.numel()}: the run that wrote it had diverged, or the "
            f"file is damaged; use an earlier checkpoint."
        )
    if square and bool((leaf < 0).any()):
        raise OptimizerStateError(
            f"{what} is negative in {int((leaf < 0).sum())} of {leaf.numel()} places (least {leaf.min():.3g}); a mean "
            f"of squares cannot be: is this the first moment, or another optimizer's state?"
        )


def check_setting(value: Any, what: str) -> None:
    """Raise OptimizerStateError where a setting, or one of a parameter, is a number that is not finite, or no number.

    None, booleans and names of variants are settings, too.
    """
    if isinstance(value, Mapping):
        for name, own in value.items():
            check_setting(own, f"{what}[{name!r}]")
    elif isinstance(value, tuple | list):
        for own in value:
            check_setting(own, what)
    elif not isinstance(value, int | float | str | None) or (
        isinstance(value, int | float) and not -LARGEST < value < LARGEST
    ):
        raise OptimizerStateError(f"{what} is {described(value)}; expected a finite number.")


def by_name(rule: Any, grads: Tree, state: OptimizerState) -> Tree:
    """Apply a rule (h, one parameter's values) → Δθ parameter by parameter."""
    return {name: rule(h, state.of(name)) for name, h in grads.items()}


def root(v: Tensor) -> Tensor:
    """√v, with derivative 0 where v is 0: there its own is infinite, times that of v, which is 0."""
    dark = v == 0
    return torch.where(dark, 0.0, torch.where(dark, 1.0, v).sqrt())
