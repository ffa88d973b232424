"""One AdamW step, explained: its effect on log π of every sequence of E, by sequence of U.

With g = −c Σ_u w_u A_u ∇S_u, Δθ = batch + momentum + decay (`fkernel.precond.adaptive`) and the nodes θ_j = θ + s_jΔθ
of a path (`fkernel.engine.path`; by default one, halfway), ḡ_e = Σ_j q_j ∇S_e(θ_j) and

    S_e(θ + Δθ) − S_e(θ) = Σ_u C_eu + momentum_e + decay_e + O(|Δθ|³)
    C_eu = c w_u A_u ⟨ḡ_e, P_step ∇S_u(θ)⟩
    momentum_e = ⟨ḡ_e, Δθ_momentum⟩,  decay_e = ⟨ḡ_e, Δθ_decay⟩

All in nats; positive means that the log-probability of the row's sequence rises. Momentum and decay are further columns
of the contraction for C, without passes of their own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from einops import rearrange

from fkernel import func, tree
from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree, shard_tree
from fkernel.engine.batching import SortedBatch, check_sides, error_context
from fkernel.engine.layerwise import Walking
from fkernel.engine.over_ranks import over, ranks_of, whole_tree
from fkernel.engine.params_in_shards import agreed_params, agreed_state, shards_of
from fkernel.engine.path import NODES, Path, check_path
from fkernel.engine.planning import Strategy, choose, usual_microbatch
from fkernel.engine.planning.passes import Fit, bytes_of, max_microbatch, reverse
from fkernel.engine.problem import Problem, blocks, held_gradients
from fkernel.engine.recycling import kept_or_returned, return_memory
from fkernel.engine.step_on_shards import adamw_on_shards, clipped_shards, is_sharded
from fkernel.engine.sums import values, weighted_gradient
from fkernel.engine.sums_in_shards import values_of_step
from fkernel.errors import BatchError
from fkernel.func import unused_parameters
from fkernel.func.handles import ProductSpec, RowSpec
from fkernel.func.inputs import Function, check_weights, computed_like, length, translate_errors, widened
from fkernel.func.trust import true_derivative
from fkernel.precond import (
    AdamWState,
    AdamWStep,
    Diagonal,
    Grads,
    OptimizerState,
    acts_by_coordinate,
    check_covers,
    clip_gradient,
    optimizer_step,
    response,
)
from fkernel.shapes import Tensor, Tree


class StepEffect(NamedTuple):
    """The effect of one step on E, in nats.

    Attributes:
        kernel: [n_E n_U] ⟨ḡ_e, P_step ∇S_u⟩, nats per unit of c·w_u·A_u; ḡ_e at the nodes of `path`.
        contributions: [n_E n_U] C, nats: the effect of sequence u on sequence e.
        momentum: [n_E] nats, from gradients of earlier steps.
        decay: [n_E] nats, from weight decay.
        clip: c, the factor of gradient clipping.
        grad_norm: ‖∇L‖ before clipping.
        path: where E's gradients were evaluated: "midpoint", "start" or "gauss2".
    """

    kernel: Tensor
    contributions: Tensor
    momentum: Tensor
    decay: Tensor
    clip: float
    grad_norm: float
    path: str = "midpoint"

    @property
    def batch(self) -> Tensor:
        """[n_E] nats, Σ_u C_eu: the effect of the update batch."""
        return self.contributions.sum(1)

    @property
    def predicted(self) -> Tensor:
        """[n_E] nats, batch + momentum + decay: the change of S, up to the path's error."""
        return self.batch + self.momentum + self.decay

    @property
    def first_order(self) -> Tensor:
        """[n_E] nats, the parts that are linear in Δθ at the path's nodes: batch + momentum + decay."""
        return self.predicted

    @property
    def second_order(self) -> Tensor:
        """[n_E] nats, the change up to O(|Δθ|³): at the midpoint, or at two nodes, the same sum.

        Raises:
            BatchError: the path is "start", which has the first order only; add ½ `func.curvature`, or take a path.
        """
        if self.path == "start":
            raise BatchError('path="start" is the first order alone; path="midpoint" has the second order in it.')
        return self.predicted


@public
def loss_gradient(
    f: Function,
    params: Tree,
    U: Any,
    weights: Tensor,
    *,
    max_norm: float | None = None,
    microbatch: int | None = None,
) -> tuple[Tree, float, float]:
    """Compute the clipped gradient that the optimizer receives.

    g = c ∇L,  L = −Σ_u w_u A_u S_u,  c = min(1, max_norm / (‖∇L‖ + 1e−6))

    Args:
        f: S, (params, batch) -> [n].
        params: θ before the step.
        U: the update batch.
        weights: [n_U], w_u·A_u: loss weight times advantage.
        max_norm: clipping threshold, None for none.
        microbatch: as in `fkernel.kernel`.

    Returns:
        (g {name: [*shape]}, c, ‖∇L‖ before clipping). A parameter that f never uses has zeros here and None in torch,
        whose optimizer skips it: `func.unused.unused_parameters` returns those.

    Raises:
        As `func.vjp`; OptimizerStateError where max_norm is not positive.

    Example:
        >>> import torch
        >>> f = lambda params, x: x @ params["w"]
        >>> loss_gradient(f, {"w": torch.zeros(2)}, torch.eye(2), torch.tensor([3.0, 4.0]), max_norm=10.0)
        ({'w': tensor([-3., -4.])}, 1.0, 5.0)
    """
    check_weights(weights, length(U))
    with error_context("U"):
        ascent = func.vjp(f, usual_microbatch(microbatch, U))(params, U, weights)
    return clip_gradient(ascent, max_norm)


@public
def explain_step(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    weights: Tensor,
    state: OptimizerState,
    *,
    path: Path = "midpoint",
    max_norm: float | None = None,
    memory: int | str | None = None,
    microbatch: int | None = None,
    rows: Function | None = None,
    mesh: Any = None,
) -> tuple[StepEffect, AdamWStep]:
    """Predict the effect of AdamW's step on U, sequence by sequence, before it is taken.

    S_e(θ+Δθ) − S_e(θ) = Σ_u C_eu + momentum_e + decay_e + O(|Δθ|³), as derived in `fkernel.engine.step`.

    Args:
        f: S, (params, batch) -> [n], nats.
        params: θ before the step; all parameters that the optimizer updates.
        E: the sequences whose change is to be explained.
        U: the update batch.
        weights: [n_U], w_u·A_u: loss weight times advantage (1/n_U times the advantage where the loss is a mean).
        state: the optimizer's before the step: `AdamWState`, or any of `fkernel.precond.updates`. With a mesh an
            `AdamWState` may be of this rank's shards (`fkernel.engine.step_on_shards`).
        path: where E's gradients are evaluated: "midpoint", halfway along the step, so that contributions add up to the
            change; "gauss2", at two nodes, more accurate for a large step at 1.5 times the cost; "start", at θ: first
            order.
        max_norm: the gradient-clipping threshold, None for none.
        memory: budget as in `kernel`, including the step's vectors, about seven of the parameters' size.
        microbatch: as in `fkernel.kernel`.
        rows: f of E, where it differs from U's: an observable; the effect is then in its unit.
        mesh: as in `fkernel.kernel`; the result is on every rank.

    Returns:
        (StepEffect, AdamWStep): the effect on E in nats, and Δθ in its three parts; 0 of a parameter that f never uses,
        which torch's optimizer skips, momentum and decay included. Of this rank's shards where the state is.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError, OptimizerStateError: invalid input.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> params = {"w": torch.zeros(2)}
        >>> state = precond.adamw_init(params, lr=0.1, weight_decay=0.0)
        >>> effect, step = explain_step(f, params, torch.eye(2), torch.eye(2), torch.tensor([1.0, -1.0]), state)
        >>> effect.contributions
        tensor([[ 0.1000, -0.0000],
                [ 0.0000, -0.1000]])
    """
    given = {"E": E, "U": U, "weights": weights}
    given["path, max_norm, memory and microbatch"] = [path, max_norm, str(memory), microbatch]
    with over(mesh, "explain_step", given) as group:
        params = agreed_params(f, params, group)
        state = agreed_state(state, params, group)
        check_path(path)
        check_sides(f, params, E, U, rows, layers=True)
        sharded = group is not None and is_sharded(state, params)
        check_covers(state, list(params), shards_of(params, group) if group and sharded else params, "params")
        check_weights(weights, length(U))
        strategy, m = _planned(f, params, E, U, state, path, memory, usual_microbatch(microbatch, E, U), group)
        f_E = f if rows is None else rows
        promised = memory is not None
        with kept_or_returned(group):
            return _explained(f, f_E, params, E, U, weights, state, path, max_norm, m, strategy, promised, group)


def _planned(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    state: OptimizerState,
    path: str,
    memory: int | str | None,
    microbatch: int,
    group: Group | None,
) -> tuple[Strategy, int]:
    """Choose a strategy, and the microbatch of passes that hold no gradients."""
    # In memory beside the kernel: P_step, the three parts of Δθ and the nodes; before it g, and the sum of the parts.
    vectors = 5 + len(NODES[path])

    def passes() -> Fit:
        return max_microbatch(memory, microbatch, f, params, (E, U), (reverse,), vectors=2, least=vectors + 1)

    reserved, dense = vectors * bytes_of(params), not acts_by_coordinate(state)
    strategy = choose(
        f, params, E, U, memory, microbatch, dense, False, reserved, lambda: passes().needed, ranks_of(group)
    )
    return strategy, microbatch if strategy.name == "layers" else passes().microbatch


def _explained(
    f: Function,
    f_E: Function,
    params: Tree,
    E: Any,
    U: Any,
    weights: Tensor,
    state: OptimizerState,
    path: str,
    max_norm: float | None,
    m: int,
    strategy: Strategy,
    promised: bool,
    group: Group | None,
) -> tuple[StepEffect, AdamWStep]:
    side_U, kept, w = SortedBatch("U", U, f), None, widened(weights.to(next(iter(params.values())).device))
    sharded, in_shards = group is not None and is_sharded(state, params), isinstance(params, ShardedTree)
    if strategy.name == "layers":
        together = strategy.tile if strategy.held == "U" else strategy.block  # as many as the contraction walks
        how = Walking(strategy.tokens or 0, strategy.every, together)
        ascent = weighted_gradient(f, params, U, w, how, group)
    elif strategy.held == "U" and strategy.tile is None:  # U's gradients are held anyway, and give g
        kept = held_gradients(side_U, params, strategy, promised, group)
        ascent = kept.weighted_sum(w)
        ascent = ascent if group is None or sharded else whole_tree(ascent, group, params)
    else:
        ascent = weighted_gradient(f, params, U, weights, m, group)
    if group is not None and sharded:
        ascent = ascent if kept is not None or in_shards else shard_tree(group, ascent)
        g, clip, norm = clipped_shards(ascent, max_norm, group)
    else:
        g, clip, norm = clip_gradient(ascent, max_norm)
    del ascent
    θ = params if in_shards else {name: widened(leaf) for name, leaf in params.items()}
    with error_context("U"):
        given: Grads = {**g, **dict.fromkeys(unused_parameters(f, θ, U))}
    if group is not None and isinstance(state, AdamWState) and sharded:
        own = {name: widened(leaf) for name, leaf in shards_of(θ, group).items()}
        step, P = adamw_on_shards(own, given, state)
        total = step.total if in_shards else whole_tree(step.total, group, params)
        del own
    else:
        step, P = optimizer_step(θ, given, state), response(state, given, θ)
        total = step.total
    del g, given
    # What the step left is returned before the certificate's passes, and what they leave before the contraction.
    with nullcontext() if group is None else return_memory(), error_context("E"), translate_errors(params):
        S = true_derivative(f_E, θ, E, total, values_of_step(θ, E, total))
    del θ
    D, general = (P.d, None) if isinstance(P, Diagonal) else (None, P)
    spec = ProductSpec({"": D}, RowSpec({"momentum": step.momentum, "decay": step.decay}))
    side_E = SortedBatch("E", E, S)
    problem = Problem(
        params, side_E, side_U, spec, path, total, kept, general, promised=promised, group=group, sharded=sharded
    )
    leaf = computed_like(params)
    K, momentum, decay = (each.to(leaf.device, leaf.dtype) for each in _contracted(problem, strategy))
    C = K * rearrange(clip * weights.to(K), "u -> 1 u")
    return StepEffect(K, C, momentum, decay, clip, norm, path), step


def _contracted(problem: Problem, strategy: Strategy) -> tuple[Tensor, Tensor, Tensor]:
    """Compute K, momentum and decay in one pass over the blocks."""
    assert problem.U is not None
    K = torch.empty(len(problem.E), len(problem.U), dtype=torch.float64, device="cpu")
    along = torch.empty(2, len(problem.E), dtype=torch.float64, device="cpu")
    for block in blocks(problem, strategy):
        K[block.at] = block.kernel()
        along[:, block.at] = torch.stack([block.rows("momentum"), block.rows("decay")])
    return K, along[0], along[1]


@public
def realised_change(
    f: Function, before: Tree, after: Tree, E: Any, *, microbatch: int | None = None, mesh: Any = None
) -> Tensor:
    """Compute the realised change of a step: ΔS_e = S_e(θ + Δθ) − S_e(θ).

    Args:
        f: S, (params, batch) -> [n].
        before: θ.
        after: θ + Δθ; the same names, shapes and dtypes.
        E: the sequences.
        microbatch: as in `fkernel.kernel`.
        mesh: as in `fkernel.kernel`; both trees may be in shards.

    Returns:
        [n_E] nats.

    Raises:
        TreeError: the two trees do not name the same parameters.
        BatchError, NonFiniteError: as f.

    Example:
        >>> import torch
        >>> f = lambda params, x: x @ params["w"]
        >>> realised_change(f, {"w": torch.zeros(2)}, {"w": torch.ones(2)}, torch.eye(2))
        tensor([1., 1.])
    """
    m = usual_microbatch(microbatch, E)
    with over(mesh, "realised_change", {"E": E, "microbatch": microbatch}) as group:
        θ, moved = (agreed_params(f, params, group) for params in (before, after))
        tree.check_same(moved, θ, "after", "before")
        with error_context("E"):
            change = values(f, moved, E, m, group) - values(f, θ, E, m, group)
        return change.to(computed_like(θ))
