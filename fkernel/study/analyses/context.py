"""The inputs of an analysis: of a request, or of U itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fkernel import func, tree
from fkernel.distributed import ShardedTree
from fkernel.engine import evaluated, realised_change
from fkernel.precond import AdamWStep
from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.config.capture import CapturePlan
from fkernel.study.loss_terms import PART
from fkernel.study.rows import MemoryBudget, Policy
from fkernel.study.workspace import KernelWorkspace


@dataclass(eq=False)
class RequestContext:
    """The inputs of a request's analyses, and the effects computed so far.

    Attributes:
        batch: E.
        E: its tokens, on the parameters' device.
        workspace: U.
        policy: the checkpoint.
        taken: Δθ; None where there is no optimizer state, or P is not calibrated.
        grant: the microbatch and the memory limit.
        capture: what is stored.
        weights: [n_U] c·w·A of this request.
        advantages: others than the step's own, as `KernelWorkspace.weights_with` takes them; or None.
        strict: whether an id that this request lacks is an error.
        effects: those computed so far, by name.
    """

    batch: GeneratedBatch
    E: Any
    workspace: KernelWorkspace
    policy: Policy
    taken: AdamWStep | None
    grant: MemoryBudget
    capture: CapturePlan
    weights: Tensor
    advantages: Any = None
    strict: bool = True
    effects: dict[str, Any] = field(default_factory=dict)

    @property
    def overridden(self) -> bool:
        """Whether the request's advantages differ from the step's."""
        return self.advantages is not None

    @property
    def step(self) -> AdamWStep:
        """Δθ.

        Raises:
            AnalysisUnavailable: there is none.
        """
        if self.taken is None:
            raise AnalysisUnavailable(
                "it needs the step: a checkpoint with optimizer state, and a calibrated preconditioner"
            )
        return self.taken

    def effect(self, name: str) -> Tensor:
        """One of the effects, [n_E] nats.

        Raises:
            AnalysisUnavailable: it was not computed.
        """
        if name not in self.effects and self.overridden:
            raise AnalysisUnavailable("the request has other advantages than the step that was taken")
        if name not in self.effects:
            raise AnalysisUnavailable(
                f"it needs {name}: ask for capture: {{{name}: true}}, of a checkpoint with optimizer state"
            )
        return self.effects[name]

    @cached_property
    def after(self) -> Tree:
        """The selected parameters after the step: loaded, or else θ + Δθ as it was executed."""
        step, θ = self.policy.step or self.step.total, self.policy.params
        return self.policy.after or (θ.moved(step) if isinstance(θ, ShardedTree) else tree.add(θ, step))

    @property
    def like(self) -> Tensor:
        """A parameter, for its device and dtype."""
        return next(iter(self.policy.params.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.like.dtype

    @cached_property
    def vectors(self) -> dict[str, Tree]:
        """{name: v}: the effect of v is ⟨ḡ_e, v⟩. Momentum and decay; parts of the loss; what arithmetic and more did.

        Of a request with other advantages than the step's, the parts that no column has.
        """
        vectors: dict[str, Tree] = (
            {} if self.taken is None else {"momentum": self.taken.momentum, "decay": self.taken.decay}
        )
        loss = self.workspace.loss
        parts = {} if loss is None else loss.beside_columns if self.overridden else loss.parts
        P, c = self.workspace.P, self.workspace.clip
        vectors |= {PART + part: P(tree.scale(c, v)) for part, v in parts.items()}
        return vectors if self.overridden else {**vectors, **self.policy.departures}

    def measured(self, f: Any, E: Any, before: Tensor | None = None) -> dict[str, Tensor]:
        """Measure the step's effect on a function of (params, batch), as the capture asks; {} where there is no step.

        realised = f(θ', φ') − f(θ, φ),  unselected = f(θ', φ') − f(θ', φ);  θ: selected parameters, φ: the others
        curvature = ½ Δθᵀ∇²f(θ)Δθ

        Args:
            f: (params, batch) -> [n].
            E: its batch.
            before: [n] f(θ, φ) float64; None for S of the request itself.

        Returns:
            {"curvature": [n], "realised": [n]}, and {"unselected": [n]} where unselected parameters changed.
        """
        effects: dict[str, Tensor] = {}
        if self.taken is None or self.overridden:
            return effects
        if self.capture.curvature:
            curvature = func.curvature(f, self.grant.microbatch)
            effects["curvature"] = 0.5 * curvature(self.policy.params, E, self.taken.total)
        if not self.capture.realised:
            return effects
        m, rest = self.grant.microbatch, self.policy.unselected()
        own = (evaluated(f, self.after, E, m) - (self.before if before is None else before)).to(self.dtype)
        if not rest.after:
            return effects | {"realised": own}
        others = realised_change(f, {**self.after, **rest.before}, {**self.after, **rest.after}, E, microbatch=m)
        return effects | {"realised": own + others, "unselected": others}

    @cached_property
    def before(self) -> Tensor:
        """[n_E] S before the step, at the study's temperature, float64."""
        return evaluated(self.policy.f, self.policy.params, self.E, self.grant.microbatch)

    @cached_property
    def gradient(self) -> Tree:
        """g = c ∇L of the step."""
        return tree.scale(-self.workspace.clip, self.workspace.ascent(self.policy.params))


@dataclass(frozen=True, eq=False)
class UpdateContext:
    """The inputs of analyses of U itself.

    Attributes:
        workspace: U.
        policy: the checkpoint.
        grant: the microbatch and the memory limit.
        step: Δθ; None where there is no optimizer state.
        seed: of random draws.
    """

    workspace: KernelWorkspace
    policy: Policy
    grant: MemoryBudget
    step: AdamWStep | None
    seed: int

    @property
    def after(self) -> Tree | None:
        """The selected parameters after the step; None without a step."""
        return self.policy.after or (self.step and tree.add(self.policy.params, self.step.total))
