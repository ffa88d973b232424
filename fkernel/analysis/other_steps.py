"""The effect of a step under other weights, clipping or learning rate, without new gradients.

J_Uᵀ of other weights w' is a sum of gradients that are already held, and AdamW's step on it is cheap:

    g' = −c' J_Uᵀ(w'A'),  c' = min(1, max_norm' / ‖J_Uᵀ(w'A')‖)
    exact     Δθ' = the step on g', v' and so D from g' itself
    frozen    Δθ' = the same with the D of the step that was taken: linear in c'w'A', so that differences of two
              counterfactuals are sums of contributions

A dropped sequence has weight 0; the others' weights are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fkernel import func, precond, tree
from fkernel.boundary import public
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import OptimizerStateError
from fkernel.func.inputs import Function
from fkernel.precond import AdamWStep, Grads, MixedState, OptimizerState
from fkernel.shapes import Tensor, Tree


class Counterfactual(NamedTuple):
    """Predicted change of E, [n_E] nats each.

    Attributes:
        frozen: first order, D of the step that was taken.
        exact: first order, D recomputed.
        curvature: ½ Δθ'ᵀH_eΔθ' of the exact step.
        clip: c'.
    """

    frozen: Tensor
    exact: Tensor
    curvature: Tensor
    clip: float

    @property
    def second_order(self) -> Tensor:
        """[n_E] nats, exact + curvature: the predicted change."""
        return self.exact + self.curvature


class Alternative(NamedTuple):
    """A hypothetical step, in both forms.

    Attributes:
        frozen: Δθ', D of the step that was taken.
        exact: Δθ', D recomputed.
        clip: c'.
    """

    frozen: AdamWStep
    exact: AdamWStep
    clip: float


@public
def alternative_step(
    params: Tree,
    ascent: Tree,
    state: OptimizerState,
    taken: Mapping[str, Tensor | None],
    *,
    max_norm: float | None = None,
    clip: float | None = None,
    lr: float = 1.0,
) -> Alternative:
    """Compute the step on another gradient.

    Args:
        params: θ.
        ascent: J_Uᵀ(w'A'), {name: [*shape]}; `func.weighted_sum` of gradients that are held, or `func.vjp`.
        state: the optimizer's before the step.
        taken: g = c ∇L of the step that was taken, {name: [*shape]}; None for a parameter that the loss never uses
            (`func.unused_parameters`): an optimizer skips it under any weights, momentum and decay included.
        max_norm: clipping threshold, None for none.
        clip: c', instead of max_norm.
        lr: the learning rate, relative to the step's own.

    Raises:
        OptimizerStateError: lr is negative, or max_norm not positive.

    Example:
        >>> import torch
        >>> params, g = {"w": torch.zeros(1)}, {"w": torch.tensor([-2.0])}
        >>> state = precond.adamw_init(params, lr=0.1, weight_decay=0.0)
        >>> step = alternative_step(params, {"w": torch.tensor([1.0])}, state, g)
        >>> step.exact.total["w"], step.frozen.total["w"]
        (tensor([0.1000]), tensor([0.0500]))
    """
    if not lr >= 0:
        raise OptimizerStateError(f"lr is {lr!r}; expected the learning rate over the step's own, 0 or more.")
    clipped, c, _ = precond.clip_gradient(ascent, max_norm, clip=clip)
    g: Grads = {**clipped, **{name: None for name, leaf in taken.items() if leaf is None}}
    rates = at_rate(state, lr)
    exact, real = (precond.optimizer_step(params, {**each}, rates) for each in (g, taken))
    frozen = real._replace(batch=precond.response(rates, {**taken}, params)(tree.scale(c, ascent)))
    return Alternative(frozen, exact, c)


def at_rate(state: OptimizerState, lr: float) -> OptimizerState:
    """The same state with its learning rates times a factor.

    Example:
        >>> import torch
        >>> at_rate(precond.adamw_init({"w": torch.zeros(1)}, lr=0.5), 2.0).lr
        {'w': 1.0}
    """
    if isinstance(state, MixedState):
        return MixedState(tuple(at_rate(part, lr) for part in state.parts))
    single: Any = state
    scaled = {name: lr * rate for name, rate in single.lr.items()} if isinstance(single.lr, Mapping) else lr * single.lr
    return replace(single, lr=scaled)


@public
def counterfactual(
    f: Function, params: Tree, E: Any, alternative: Alternative, *, microbatch: int | None = None
) -> Counterfactual:
    """Predict the effect of a hypothetical step.

    Args:
        f: S, (params, batch) -> [n].
        params: θ.
        E: the sequences.
        alternative: the step.
        microbatch: as in `fkernel.kernel`.

    Raises:
        As `func.jvp`.

    Example:
        >>> import torch
        >>> f = lambda params, x: x @ params["w"]
        >>> step = AdamWStep(*({"w": torch.full((2,), v)} for v in (1.0, 0.5, 0.0)))
        >>> counterfactual(f, {"w": torch.zeros(2)}, torch.eye(2), Alternative(step, step, 1.0)).second_order
        tensor([1.5000, 1.5000])
    """
    m = usual_microbatch(microbatch, E)
    along, exact = func.jvp(f, m), alternative.exact.total
    return Counterfactual(
        along(params, E, alternative.frozen.total),
        along(params, E, exact),
        0.5 * func.curvature(f, m)(params, E, exact),
        alternative.clip,
    )
