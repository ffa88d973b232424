"""What an analysis of a request is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fkernel import tree
from fkernel.engine import realised_change
from fkernel.engine.layered import evaluated
from fkernel.precond import AdamWStep
from fkernel.rollout.batch import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.outcome import Finding
from fkernel.study.requests import CapturePlan
from fkernel.study.rows import Grant, Policy
from fkernel.study.workspace import KernelWorkspace


@dataclass(eq=False)
class Situation:
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
        found: effects that are known so far, by name.
    """

    batch: GeneratedBatch
    E: Any
    workspace: KernelWorkspace
    policy: Policy
    taken: AdamWStep | None
    grant: Grant
    capture: CapturePlan
    weights: Tensor
    advantages: Any = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def overridden(self) -> bool:
        """Whether the request has other advantages than the step that was taken."""
        return self.advantages is not None

    @property
    def step(self) -> AdamWStep:
        """Δθ.

        Raises:
            Lacking: there is none.
        """
        if self.taken is None:
            raise Lacking("it needs the step: a checkpoint with optimizer state, and a calibrated preconditioner")
        return self.taken

    def effect(self, name: str) -> Tensor:
        """One of the effects, [n_E] nats.

        Raises:
            Lacking: it was not computed.
        """
        if name not in self.found and self.overridden:
            raise Lacking("the request has other advantages than the step that was taken")
        if name not in self.found:
            raise Lacking(f"it needs {name}: ask for capture: {{{name}: true}}, of a checkpoint with optimizer state")
        return self.found[name]

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
        """Of what is found."""
        return self.like.dtype

    @cached_property
    def vectors(self) -> dict[str, Tree]:
        """{what: v}: ⟨ḡ_e, v⟩ is what it did to E; momentum and decay, and the KL term where the loss has one."""
        found = {} if self.taken is None else {"momentum": self.taken.momentum, "decay": self.taken.decay}
        return found if self.added is None else found | {"penalty": self.added}

    def realised(self, f: Any, E: Any, before: Tensor | None = None) -> dict[str, Tensor]:
        """Measure what the step really did to any f: the change of the whole model, and what of it was not selected.

        realised = f(θ', φ') − f(θ, φ),  unselected = f(θ', φ') − f(θ', φ);  θ: selected parameters, φ: the others

        Args:
            f: (params, batch) -> [n].
            E: its batch.
            before: [n] f(θ, φ) float64, where it is known.

        Returns:
            {"realised": [n]}, and {"unselected": [n]} where parameters moved that the plan does not select.
        """
        m, rest = self.grant.microbatch, self.policy.unselected()
        before = evaluated(f, self.policy.params, E, m) if before is None else before
        own = (evaluated(f, self.after, E, m) - before).to(self.dtype)
        if not rest.after:
            return {"realised": own}
        others = realised_change(f, {**self.after, **rest.before}, {**self.after, **rest.after}, E, microbatch=m)
        return {"realised": own + others, "unselected": others}

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
        ascent = self.workspace.gradients.weighted_sum(self.workspace.weights.to(self.like))
        return tree.scale(-1.0, self.workspace.with_penalty(ascent, self.workspace.clip))


class Lacking(Exception):
    """An analysis lacks what it needs; the message says what."""


def left_out(why: Lacking) -> Finding:
    """Record that an analysis was asked for and could not be made."""
    return Finding({}, {"left_out": str(why)})
