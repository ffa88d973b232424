"""One step of a run, taken back: from what moves E after a step to what each of the step's sequences did to E.

    m_t = β1 m_{t−1} + (1−β1) g_t,   Δθ_t = −ρ_t m_t − lr_t λ θ_t,   ρ_t = lr_t/bc1_t · 1/(√(v_t/bc2_t)+ε),   t = 1 … T

with g_t = −c_t Σ_u w_u ∇f_u(θ_t), all of AdamW's numbers by parameter and step. A gradient moves θ in its own step and,
by way of m, in all later ones. Along the steps' paths (`fkernel.engine.path`), with ḡ_et = Σ_j q_j ∇S_e(θ_t + s_jΔθ_t),

    S_e(θ_T + Δθ_T) − S_e(θ_1) ≈ Σ_t ⟨ḡ_et, Δθ_t⟩ = −Σ_t ⟨ρ_t ḡ_et, m_t⟩ + decay_e + …

The adjoint of m_t is p_et = ρ_t ḡ_et + β1 p_e,t+1, with p_e,T+1 = 0. Put ρ_t ḡ_et = p_et − β1 p_e,t+1 and the recursion
of m_t into the sum; it telescopes:

    Σ_t ⟨ρ_t ḡ_et, m_t⟩ = Σ_t ⟨p_et, m_t − β1 m_{t−1}⟩ + β1 ⟨p_e1, m_0⟩ = Σ_t (1−β1) ⟨p_et, g_t⟩ + β1 ⟨p_e1, m_0⟩

    C_eu = c_t w_u (1−β1) ⟨p_et, ∇f_u(θ_t)⟩        sequence u of step t, over steps t … T
    before_e = −β1 ⟨p_e1, m_0⟩                      what the optimizer remembered before the run
    decay_e = −Σ_t lr_t λ ⟨ḡ_et, θ_t⟩
    unexplained_e = Σ_t ⟨ḡ_et, Δθ_t − Δθ'_t⟩ − Σ_t β1 ⟨p_e,t+1, m_t − m'_t⟩

With Δθ_t and m_t as the run had them, and Δθ'_t and m'_t = β1 m_{t−1} + (1−β1) g_t as AdamW makes them of g_t, these
columns add up to Σ_t ⟨ḡ_et, Δθ_t⟩ to rounding; what is left of the change is the paths' error. Where it is known what
the optimizer executes in its own precision, that comes between: arithmetic_e is the part up to it, unexplained_e the
rest. A parameter that f never uses is skipped by the optimizer: p_t = p_{t+1}.

In code, rows hold β1 p_{t+1} between two steps and x_t = (1−β1) p_t = (1−β1) · β1 p_{t+1} + P_t ḡ_t within one, where
P_t = (1−β1) ρ_t is the step's own preconditioner (`fkernel.precond.adamw_response`).

Source: the path kernel of AdamW, F. Eichin et al., ExPLAIND (2025); the adjoint of a linear recursion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.distributed import Group, ShardedTree
from fkernel.engine.batching import SortedBatch, error_context
from fkernel.engine.gradients import Gradients, Summing, computed
from fkernel.engine.layerwise import Walking
from fkernel.engine.over_ranks import over_all, own_shard
from fkernel.engine.params_in_shards import own_part
from fkernel.engine.step_gradients import Passes, gradients_of, long_cut, microbatches, whole
from fkernel.engine.step_on_shards import norm_over
from fkernel.engine.sums import weighted_gradient
from fkernel.engine.sums_in_shards import values_of_step
from fkernel.errors import BatchError
from fkernel.func import unused_parameters
from fkernel.func.handles import Products, ProductSpec, RowSpec, materialize_into
from fkernel.func.inputs import Function
from fkernel.func.trust import true_derivative
from fkernel.precond import AdamWState, Diagonal, Grads, adamw_response, adamw_step, clip_gradient
from fkernel.shapes import Tensor, Tree


class Executed(NamedTuple):
    """A step as the optimizer takes it in its own precision; see `fkernel.precond.executed_step`.

    Attributes:
        delta: Δθ, {name: [*shape]}.
        exp_avg: m after the step.
    """

    delta: Tree
    exp_avg: Tree


@dataclass(frozen=True, eq=False)
class RunStep:
    """One step of a run, t → t+1: where it was taken, on what, and what it did.

    Attributes:
        f: (params, batch) -> [n_U], the function of U; `func.weighted_logprob` where a loss's token weights are known.
        params: θ_t, {name: [*shape]}, all parameters that the optimizer updates; float32 or float64.
        U: the batch.
        weights: [n_U] w, with ∇L = −Σ_u w_u ∇f_u: −1 where f_u is sequence u's share of the loss itself.
        state: the optimizer's before the step; its lr, β1, β2, ε and λ are those of this step.
        clip: c, the factor by which the gradient was scaled: g = c ∇L.
        delta: Δθ_t = θ_{t+1} − θ_t as it happened; None for what is executed, or else what AdamW makes of g.
        executed: the step in the training's own arithmetic; None where that is not told apart from what is unexplained.
        older: {a: what of m is of gradients a or more steps old, β1^(a−1) m_{t−a}}; {} where age is not asked for.
    """

    f: Function
    params: Tree
    U: Any
    weights: Tensor
    state: AdamWState
    clip: float = 1.0
    delta: Tree | None = None
    executed: Executed | None = None
    older: Mapping[int, Tree] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Count the optimizer's steps up to and with this one."""
        return max(self.state.step.values(), default=0) + 1


class StepColumns(NamedTuple):
    """What one step's parts did, nats, float64.

    Attributes:
        contributions: [n_E n_U] of its sequences, in this step and in those after it.
        own: [n_E] of its gradient, in this step.
        momentum: [n_E] of what the optimizer remembered, in this step.
        decay: [n_E] of weight decay.
        arithmetic: [n_E] of what was executed and is not AdamW's in real numbers, in this step.
        unexplained: [n_E] of a move that was not executed.
        arithmetic_later: [n_E] of the same two by way of m, in the steps after it.
        unexplained_later: [n_E]
        older: [n_E A] of momentum, in this step, what is of gradients of each age or more.
    """

    contributions: Tensor
    own: Tensor
    momentum: Tensor
    decay: Tensor
    arithmetic: Tensor
    unexplained: Tensor
    arithmetic_later: Tensor
    unexplained_later: Tensor
    older: Tensor


class _Start(NamedTuple):
    """Where a step began: θ, m, and the steps that had been taken."""

    params: Tree
    exp_avg: Tree
    step: dict[str, int]


class Adjoints:
    """β1 p_{t+1} of every sequence of E, taken back step by step.

    Attributes:
        side: E, sorted, with its f.
        rows: {name: [n_E *shape]}, changed in place.
    """

    _later: _Start | None
    _dealt: Group | None  # the ranks that vectors are split over; None where they are shards already, or one process's

    def __init__(self, side: SortedBatch, passes: Passes) -> None:
        """Start behind the last step, where nothing moves E any more."""
        self.side, self.passes, self.rows = side, passes, dict[str, Tensor]()
        self._later, self._cuts, self._dealt = None, list[slice](), passes.group

    def back(self, step: RunStep) -> tuple[StepColumns, Tree]:
        """Take one step back; return its columns, and the Δθ that was accounted for.

        Raises:
            BatchError: the step does not end where the one given before it begins.
            TreeError, ModelError, NonFiniteError, OptimizerStateError: as `fkernel.engine.step.explain_step`.
        """
        g, J = self._gradient(step)
        θ = own_part(step.params)
        described = adamw_step(θ, g, step.state)
        exact = Executed(described.total, _next_moment(step.state, g))
        executed = step.executed or exact
        step = step if step.delta is not None else replace(step, delta=executed.delta)
        assert step.delta is not None
        later = {
            what: torch.zeros(len(self.side), dtype=torch.float64, device="cpu")
            for what in ("arithmetic", "unexplained")
        }
        if self._later is None:
            self._begin(step.params, step.delta, {})
            own = own_shard(θ, self._dealt)
            self.rows = {name: leaf.new_zeros(len(self.side), *leaf.shape) for name, leaf in own.items()}
        else:
            _check_follows(step, self._later, g)
            later["arithmetic"] = -self.along(_difference(exact.exp_avg, executed.exp_avg))
            later["unexplained"] = -self.along(_difference(executed.exp_avg, self._later.exp_avg))
        used = [name for name in self.rows if g[name] is not None]
        for name in used:
            self.rows[name].mul_(1 - step.state.beta1[name])
        own, momentum, decay = described
        vectors = {"own": own, "momentum": momentum, "decay": decay}
        aged = {f"older {age}": replace(step.state, exp_avg=m) for age, m in sorted(step.older.items())}
        vectors |= {what: adamw_step(θ, g, state).momentum for what, state in aged.items()}
        vectors["arithmetic"] = _difference(exact.delta, executed.delta)
        vectors["unexplained"] = _difference(executed.delta, step.delta)
        del exact, executed, described
        here = self._add_step(step, vectors, g)
        older = torch.stack([here.pop(what) for what in aged], 1) if aged else torch.zeros(len(self.side), 0)
        C = self._contributions(step, J)
        for name in used:
            self.rows[name].mul_(step.state.beta1[name] / (1 - step.state.beta1[name]))
        self._later = _Start(step.params, step.state.exp_avg, step.state.step)
        return StepColumns(
            C, **here, **{f"{what}_later": each for what, each in later.items()}, older=older
        ), step.delta

    def resume(self, step: RunStep, rows: Tree) -> None:
        """Go on behind a step that was taken back before, with the rows that it left."""
        delta = step.delta if step.delta is not None or step.executed is None else step.executed.delta
        delta = adamw_step(own_part(step.params), self._gradient(step)[0], step.state).total if delta is None else delta
        self._begin(step.params, delta, dict(rows))
        self._later = _Start(step.params, step.state.exp_avg, step.state.step)

    def _begin(self, params: Tree, delta: Tree, rows: Tree) -> None:
        assert self.side.f is not None
        self.rows, self._cuts = rows, microbatches(self.side, params, self.passes, len(self.side))
        self._dealt = None if isinstance(params, ShardedTree) else self.passes.group
        with error_context("E"):
            batch = self.side.batch
            self.side.f = true_derivative(self.side.f, params, batch, delta, values_of_step(params, batch, delta))

    def along(self, vector: Tree) -> Tensor:
        """Compute ⟨β1 p_e, v⟩, [n_E] float64 in the caller's order."""
        spec = ProductSpec(x=RowSpec({"v": own_shard(vector, self._dealt)}))
        products = Products(spec, len(self.side), 0, self.side.order.device)
        products.add(self.rows, self.rows, own_y=False)
        return self._in_order(over_all(products.whole("x", "v"), self.passes.group))

    def _add_step(self, step: RunStep, vectors: dict[str, Tree], g: Grads) -> dict[str, Tensor]:
        """Add P ḡ to the rows; compute ḡ along the parts of Δθ, each [n_E]."""
        P = adamw_response(step.state, g)
        assert isinstance(P, Diagonal)
        assert P.d is not None
        group, D = self.passes.group, own_shard(P.d, self._dealt)
        own = {what: own_shard(vector, self._dealt) for what, vector in vectors.items()}
        products = Products(ProductSpec(x=RowSpec(own)), len(self.side), 0, self.side.order.device)
        with error_context("E"):
            for rows, handles in gradients_of(self.side, self._cuts, step.params, step.delta, self.passes):
                for name, handle in handles.items():
                    mine = self.rows[name][rows]
                    J = torch.empty_like(mine)
                    materialize_into(handle, J)
                    products.add({name: J}, {name: J}, rows=rows, own_y=False)
                    mine.addcmul_(D[name].to(J), J)
                del handles
        sums = over_all(torch.stack([products.whole("x", what) for what in vectors]), group)
        return {what: self._in_order(values) for what, values in zip(vectors, sums, strict=True)}

    def _contributions(self, step: RunStep, J: Gradients | None) -> Tensor:
        """Compute c w_u ⟨x_e, ∇f_u⟩, [n_E n_U] in the callers' orders."""
        U = SortedBatch("U", step.U, step.f)
        products = Products(ProductSpec({"": None}), len(self.side), len(U), U.order.device)
        if J is None:
            cuts = microbatches(U, step.params, self.passes, len(self.side))
            again = gradients_of(U, cuts, step.params, None, self.passes._replace(path="start"))
        else:
            again = whole(J)
        with error_context("U", U.order):
            for columns, handles in again:
                products.add({name: self.rows[name] for name in handles}, handles, columns)
        K = torch.empty(len(self.side), len(U), dtype=torch.float64, device="cpu")
        K[self.side.order.cpu()[:, None], U.order.cpu()] = over_all(products.kernel(), self.passes.group).cpu()
        return K * (step.clip * step.weights.to(K))

    def _gradient(self, step: RunStep) -> tuple[Grads, Gradients | None]:
        """Compute g = c ∇L, None where f never uses a parameter; and U's gradients, None where they are walked."""
        side, w, J = SortedBatch("U", step.U, step.f), step.weights.to(next(iter(step.params.values()))), None
        group, in_shards = self.passes.group, isinstance(step.params, ShardedTree)
        walking = in_shards or long_cut(side, step.params) is not None
        cuts = [] if walking else microbatches(side, step.params, self.passes, len(self.side))
        if walking or group is not None:
            how = self.passes.in_shards if in_shards else Walking() if walking else cuts[0].stop
            ascent = weighted_gradient(step.f, step.params, step.U, w, how, group)
        else:
            J = computed(side, ((1.0, step.params),), cuts, self.passes.memory is not None)
            summing = Summing(J, w, self.passes.kept)
            for i in range(len(cuts)):
                summing.gradients.read(i)
            ascent, J = summing.whole(J), J.remembering(summing.held, 0)
        with error_context("U"):
            unused = unused_parameters(step.f, step.params, step.U)
        return {**clip_gradient(ascent, clip=step.clip)[0], **dict.fromkeys(unused)}, J

    def _in_order(self, values: Tensor) -> Tensor:
        """Put values of sorted sequences into the caller's order."""
        return torch.empty(len(self.side), dtype=torch.float64, device="cpu").index_copy_(
            0, self.side.order.cpu(), values.cpu()
        )


def _next_moment(state: AdamWState, g: Grads) -> Tree:
    """Compute m' = β1 m + (1−β1) g; m where g is None."""
    moments = dict(state.exp_avg)
    for name, own in g.items():
        if own is not None:
            moments[name] = state.beta1[name] * moments[name] + (1 - state.beta1[name]) * own
    return moments


def _difference(x: Tree, y: Tree) -> Tree:
    """Compute y − x; 0 of one stored tensor where both are the same, which costs no memory."""
    if x is y:
        return {name: leaf.new_zeros(()).expand(leaf.shape) for name, leaf in x.items()}
    return tree.map(lambda one, other: other.to(one) - one, x, y)


def _check_follows(step: RunStep, later: _Start, g: Grads) -> None:
    """Raise BatchError unless the later step began where this one ended."""
    assert step.delta is not None
    advice = "give the run's steps from the last to the first, each with its own state and, where known, its delta."
    tree.check_same(later.params, step.params, "the later step's params", "params")
    for name, t in step.state.step.items():
        if later.step[name] != (expected := t + (g[name] is not None)):
            raise BatchError(
                f"before it the optimizer had taken {t} steps with {name!r}, and before the next one "
                f"{later.step[name]}; expected {expected}. Steps are left out, the parameter was frozen meanwhile, or "
                f"the optimizer's state began anew: account for the steps before that, or after; or {advice}"
            )
    θ, group = own_part(step.params), step.params.group if isinstance(step.params, ShardedTree) else None
    gap = tree.axpy(-1.0, step.delta, tree.axpy(-1.0, θ, own_part(later.params)))
    size, moved, whole = (_norm(vector, group) for vector in (gap, step.delta, θ))
    if size > 1e-3 * moved + 4 * max(torch.finfo(leaf.dtype).eps for leaf in gap.values()) * whole:
        raise BatchError(f"it ends at parameters {size:.2g} (norm) away from where the one after it begins; {advice}")


def _norm(vector: Tree, group: Group | None) -> float:
    """‖x‖; from this rank's shards of it, with a group."""
    return float(tree.norm(vector)) if group is None else norm_over(vector, group)
