"""The step that is explained, and its preconditioner: of the whole plan, what analyses need to make them again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fkernel.study.config.base import CheckpointPlan, Strict
from fkernel.study.config.loss import LossPlan


class PreconditionerPlan(Strict):
    """P, which stands between two gradients once.

    Attributes:
        form: "post-step" divides by √v̂' with the batch's own gradient in it, as the optimizer will; "frozen" by the
            stored √v̂; "identity" by nothing.
        calibrated: whether learning rate and bias correction are part of it, so that contributions are in nats; a bare
            one is D itself, and its influences have units of their own.
        unseen: what becomes of coordinates whose second moment is 0: "error", "zero" or "eps". By default "eps" for
            post-step, as the optimizer does, and "error" for frozen.
    """

    form: Literal["post-step", "frozen", "identity"] = "post-step"
    calibrated: bool = True
    unseen: Literal["error", "zero", "eps"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> PreconditionerPlan:
        if self.form == "identity" and self.unseen is not None:
            raise ValueError("form 'identity' divides by nothing, so unseen has no meaning; leave one of the two out")
        return self


class StepPlan(Strict):
    """The optimizer step that is explained.

    Attributes:
        max_norm: gradient clipping's threshold; None for none.
        clip: the factor c itself, where the training recorded it, or where parameters that are not selected count in
            its norm; excludes max_norm.
        path: where E's gradients are taken: "midpoint", halfway along the step, so that contributions add up to the
            change; "gauss2", at two nodes, for a large step; "start", at the checkpoint: the first order.
        after: the checkpoint after the step, where it was really taken: realised changes are then measured on it, and
            not on the step executed here.
        loss: what the step was taken on, where it is not the policy gradient −Σ w A S: a clipped ratio (PPO, GRPO,
            GSPO), a penalty on the divergence from a reference beside it, or preferences (DPO).
    """

    max_norm: float | None = Field(None, gt=0)
    clip: float | None = Field(None, gt=0, le=1)
    path: Literal["midpoint", "start", "gauss2"] = "midpoint"
    after: CheckpointPlan | None = None
    loss: LossPlan | None = None

    @model_validator(mode="after")
    def _one(self) -> StepPlan:
        if self.max_norm is not None and self.clip is not None:
            raise ValueError("max_norm and clip say the same in two ways; give one of them")
        return self
