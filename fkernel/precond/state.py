"""AdamWState: everything AdamW remembers of the past, keyed by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from fkernel import tree
from fkernel.boundary import described, public
from fkernel.errors import OptimizerStateError, TreeError
from fkernel.precond.base import LARGEST, OptimizerState, check_moment
from fkernel.shapes import Tree


@dataclass(frozen=True, eq=False)
class AdamWState(OptimizerState):
    """AdamW's state before step t → t+1; every field is {name: …}, so parameter groups need no special case.

    Attributes:
        step: t, the number of steps already taken; 0 before the first.
        exp_avg: m, the raw (not bias-corrected) first moment, of the parameter's shape.
        exp_avg_sq: v, the raw second moment, of the parameter's shape; non-negative.
        lr: learning rate of the step t → t+1.
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        eps: ε ≥ 0, added outside of the root.
        weight_decay: λ, decoupled (Loshchilov & Hutter 2019).

    Raises:
        OptimizerStateError: fields name different parameters, shapes disagree, v is negative, or a number is out of
            range or not finite.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    SQUARES: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    step: dict[str, int]
    exp_avg: Tree
    exp_avg_sq: Tree
    lr: dict[str, float]
    beta1: dict[str, float]
    beta2: dict[str, float]
    eps: dict[str, float]
    weight_decay: dict[str, float]

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(given := getattr(self, field.name), Mapping):
                raise OptimizerStateError(
                    f"{field.name} is a {type(given).__name__}; expected {{name: …}} with one value a parameter, such "
                    f"as dict.fromkeys(params, …)."
                )
            try:
                tree.check_names(getattr(self, field.name), self.exp_avg, field.name, "exp_avg")
            except TreeError as error:
                raise OptimizerStateError(str(error)) from None
        for name in self.exp_avg:
            _check_moments(name, self)
            _check_numbers(name, self)

    @property
    def names(self) -> list[str]:
        """The parameters, in order."""
        return list(self.exp_avg)


@public
def adamw_init(
    params: Tree,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> AdamWState:
    """Make the state before the first step: m = v = 0, t = 0, one group (defaults as in torch.optim.AdamW).

    Args:
        params: {name: [*shape]}, the parameters that the optimizer will move.
        lr: learning rate.
        betas: (β1, β2).
        eps: ε.
        weight_decay: λ, decoupled.

    Example:
        >>> state = adamw_init({"w": torch.ones(2)}, lr=1e-3)
        >>> state.step, state.beta2
        ({'w': 0}, {'w': 0.999})
    """
    check_tree(params, "params")
    tree.check_tensors(params, "params")
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise OptimizerStateError(f"betas is {betas!r}; expected two numbers, (β1, β2).")
    zeros = tree.zeros_like(params)

    def each(value: float) -> dict[str, float]:
        return dict.fromkeys(params, value)

    step = dict.fromkeys(params, 0)
    return AdamWState(step, zeros, zeros, each(lr), each(betas[0]), each(betas[1]), each(eps), each(weight_decay))


def check_state(state: Any, kind: type | None = None) -> None:
    """Raise OptimizerStateError unless it is an `AdamWState`, or of another kind; say how to make one of torch's."""
    if isinstance(state, kind or AdamWState):
        return
    if kind not in (None, OptimizerState):
        raise OptimizerStateError(
            f"The optimizer state is a {type(state).__name__}; expected fkernel.precond.updates.{kind.__name__}, whose "
            f"fields are {{name: …}} of what torch's state_dict has by number, as fkernel.checkpoint.optimizer_state "
            f"makes it."
        )
    one = "an AdamWState" if kind is None else "an AdamWState, or another optimizer's"
    one += ", which is keyed by the parameters' names"
    other = "" if kind is None else " (optimizer_state, where it is not AdamW)"
    if isinstance(state, torch.optim.Optimizer):
        raise OptimizerStateError(
            f"The optimizer state is a torch.optim.{type(state).__name__}; expected {one}. Make it with "
            f"fkernel.checkpoint.adamw_state(optimizer.state_dict(), dict(model.named_parameters()), model=model)"
            f"{other}."
        )
    if isinstance(state, Mapping) and "param_groups" in state:
        raise OptimizerStateError(
            f"The optimizer state is a state_dict of torch's; expected {one}. Make it with "
            f"fkernel.checkpoint.adamw_state(state_dict, dict(model.named_parameters()), model=model){other}."
        )
    raise OptimizerStateError(
        f"The optimizer state is a {type(state).__name__}; expected {one}: fkernel.checkpoint.load(path).optimizer, "
        f"fkernel.checkpoint.adamw_state(optimizer.state_dict(), …){other}, or fkernel.precond.adamw_init(params, lr) "
        f"before the first step."
    )


def check_tree(x: Any, what: str) -> None:
    """Raise TreeError unless something is a tree, {name: tensor}; say which part of a tuple is one."""
    if isinstance(x, Mapping):
        tree.check_tensors({name: leaf for name, leaf in x.items() if leaf is not None}, what)  # None: no gradient
        return
    if isinstance(x, tuple) and x and isinstance(x[0], Mapping):
        parts = getattr(x, "_fields", None)
        advice = (
            f"give one of its parts, {', '.join(parts)}, or their sum (total)"
            if parts
            else "fkernel.loss_gradient returns (g, c, ‖∇L‖): take g, clip, norm = loss_gradient(…), and give g"
        )
        raise TreeError(f"{what} is a {type(x).__name__} of {len(x)}; expected {{name: tensor}}: {advice}.")
    advice = "; dict(model.named_parameters()) is one" if isinstance(x, torch.nn.Module) else ""
    raise TreeError(f"{what} is a {type(x).__name__}; expected {{name: tensor}}{advice}.")


@public
def check_covers(state: OptimizerState, names: list[str], shapes: Tree, what: str) -> None:
    """Raise TreeError unless the state and another tree are about the same parameters, shapes included.

    Args:
        state: of the optimizer, whichever.
        names: the tree's.
        shapes: {name: tensor} of the tree, for their shapes.
        what: what a message calls the tree.

    Example:
        >>> w = {"w": torch.ones(2)}
        >>> check_covers(adamw_init(w, lr=0.1), ["w"], w, "the gradients")
    """
    check_state(state, OptimizerState)
    if state.names:
        tree.check_names(names, state.names, what, "the optimizer state")
    for name in names:
        misfit = state.misfit(name, tuple(shapes[name].shape)) if name in shapes else ""
        if misfit:
            raise TreeError(
                f"{what}[{name!r}] has shape {list(shapes[name].shape)}, {misfit}; a transposed or foreign state is "
                f"never fitted by force."
            )


def _check_moments(name: str, state: AdamWState) -> None:
    m, v = state.exp_avg[name], state.exp_avg_sq[name]
    check_moment(m, f"exp_avg[{name!r}]")
    check_moment(v, f"exp_avg_sq[{name!r}]", square=True)
    if m.shape != v.shape:
        raise OptimizerStateError(
            f"exp_avg_sq[{name!r}] has shape {list(v.shape)}, exp_avg[{name!r}] has {list(m.shape)}; both have the "
            f"parameter's."
        )


def _check_numbers(name: str, state: AdamWState) -> None:
    step = state.step[name]
    if not isinstance(step, int | float) or not 0 <= step < 2**63 or step != int(step):
        raise OptimizerStateError(
            f"step[{name!r}] is {described(step)}; expected a whole number of steps taken, 0 or more."
        )
    finite = float("inf")
    ranges = {"lr": (0.0, finite), "beta1": (0.0, 1.0), "beta2": (0.0, 1.0), "eps": (0.0, finite)}
    ranges["weight_decay"] = (0.0, finite)
    for field, (low, high) in ranges.items():
        value = getattr(state, field)[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value < min(high, LARGEST):
            raise OptimizerStateError(f"{field}[{name!r}] is {described(value)}; expected {low} ≤ {field} < {high}.")
