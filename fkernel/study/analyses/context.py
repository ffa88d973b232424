"""What an analysis is given: a request that is being answered, or U itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fkernel import func, tree
from fkernel.engine import evaluated, realised_change
from fkernel.precond import AdamWStep
from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.config.capture import CapturePlan
from fkernel.study.rows import MemoryBudget, Policy
from fkernel.study.workspace import KernelWorkspace


@dataclass(eq=False)
class RequestContext:
    """A request in the middle of being answered.

    Attributes:
        batch: E.
        E: its tokens, where the parameters are.
        workspace: U.
        policy: the checkpoint.
        taken: Δθ; None where there is no optimizer state, or P is not calibrated.
        grant: what may be under way at once.
        capture: what is kept.
        weights: [n_U] c·w·A of this request.
        advantages: others than the step's own, as `KernelWorkspace.weights_with` takes them; or None.
        strict: whether an id that this request lacks is an error.
        effects: those that are known so far, by name.
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
        """Whether the request has other advantages than the step that was taken."""
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
        """The selected parameters after the step: where it was really taken, or as it is executed here."""
        return self.policy.after or tree.add(self.policy.params, self.step.total)

    @property
    def like(self) -> Tensor:
        """A parameter: where numbers are, and in what dtype."""
        return next(iter(self.policy.params.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed."""
        return self.like.dtype

    @cached_property
    def vectors(self) -> dict[str, Tree]:
        """{what: v}: ⟨ḡ_e, v⟩ is what it did to E; momentum and decay, and the KL term where the loss has one."""
        vectors = {} if self.taken is None else {"momentum": self.taken.momentum, "decay": self.taken.decay}
        return vectors if self.added is None else vectors | {"penalty": self.added}

    def measured(self, f: Any, E: Any, before: Tensor | None = None) -> dict[str, Tensor]:
        """Measure what the step did to any f, as far as it is to be captured; nothing where there is no step.

        realised = f(θ', φ') − f(θ, φ),  unselected = f(θ', φ') − f(θ', φ);  θ: selected parameters, φ: the others
        curvature = ½ Δθᵀ∇²f(θ)Δθ

        Args:
            f: (params, batch) -> [n].
            E: its batch.
            before: [n] f(θ, φ) float64; None for S of the request itself.

        Returns:
            {"curvature": [n], "realised": [n]}, and {"unselected": [n]} where parameters moved that the plan does not
            select.
        """
        found: dict[str, Tensor] = {}
        if self.taken is None or self.overridden:
            return found
        if self.capture.curvature:
            curvature = func.curvature(f, self.grant.microbatch)
            found["curvature"] = 0.5 * curvature(self.policy.params, E, self.taken.total)
        if not self.capture.realised:
            return found
        m, rest = self.grant.microbatch, self.policy.unselected()
        own = (evaluated(f, self.after, E, m) - (self.before if before is None else before)).to(self.dtype)
        if not rest.after:
            return found | {"realised": own}
        others = realised_change(f, {**self.after, **rest.before}, {**self.after, **rest.after}, E, microbatch=m)
        return found | {"realised": own + others, "unselected": others}

    @cached_property
    def before(self) -> Tensor:
        """[n_E] S before the step, at the study's temperature, float64."""
        return evaluated(self.policy.f, self.policy.params, self.E, self.grant.microbatch)

    @cached_property
    def added(self) -> Tree | None:
        """P c · the KL term's share of the ascent: what it moves the parameters by; None where the loss has none."""
        loss = self.workspace.loss
        if loss is None or loss.penalty is None:
            return None
        return self.workspace.P(tree.scale(self.workspace.clip, loss.penalty))

    @cached_property
    def gradient(self) -> Tree:
        """g = c ∇L of the step that was taken."""
        return tree.scale(-self.workspace.clip, self.workspace.ascent(self.policy.params))


@dataclass(frozen=True, eq=False)
class UpdateContext:
    """U, where it is asked about itself.

    Attributes:
        workspace: U.
        policy: the checkpoint.
        grant: what may be under way at once.
        step: Δθ; None where there is no optimizer state.
        seed: of what is drawn.
    """

    workspace: KernelWorkspace
    policy: Policy
    grant: MemoryBudget
    step: AdamWStep | None
    seed: int

    @property
    def after(self) -> Tree | None:
        """The selected parameters after the step; None where there is none."""
        return self.policy.after or (self.step and tree.add(self.policy.params, self.step.total))
