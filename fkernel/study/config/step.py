"""Configuration of the optimizer step that is explained, and of its preconditioner."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.loss import LossPlan
from fkernel.study.config.values import Strict


class PreconditionerPlan(Strict):
    """P, in K = ∇S_eᵀ P ∇S_u.

    Attributes:
        form: "post-step" divides by √v̂' after the batch's own gradient is added, as the optimizer does; "frozen" by the
            stored √v̂; "identity" does not divide.
        calibrated: whether P includes learning rate and bias correction, so that contributions are in nats; otherwise
            P = D, and contributions are not in nats.
        unseen: what to do with coordinates whose second moment is 0: "error", "zero" or "eps". By default "eps" for
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


class OptimizerPlan(BaseModel):
    """An optimizer before its first step.

    Attributes:
        kind: of `fkernel.precond.updates.OPTIMIZERS`: adamw, adam, sgd, rmsprop, lion, …
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings, as its class names them."""
        return {
            name: tuple(value) if isinstance(value, list) else value for name, value in (self.model_extra or {}).items()
        }


class MicrobatchPlan(Strict):
    """One backward pass of the training.

    Attributes:
        sequence_ids: its sequences of U, in order.
        prompt_width: tokens to which prompts were padded on their left, as TRL pads them; None: all padding is right.
        width: tokens in all; None for the longest sequence's.
    """

    sequence_ids: tuple[str, ...] = Field(min_length=1)
    prompt_width: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)


class StepPlan(Strict):
    """The optimizer step that is explained.

    Attributes:
        max_norm: the gradient-clipping threshold; None for no clipping.
        clip: the clipping factor c itself, where training recorded it, or where unselected parameters count in its
            norm; excludes max_norm.
        path: where E's gradients are evaluated: "midpoint", halfway along the step, so that contributions add up to the
            change; "gauss2", at two nodes, for a large step; "start", at the checkpoint (first order).
        parts: what the effect of the batch is split by, beside the parts that a loss has: "signs", sequences raised and
            sequences lowered; "rewards", the reward functions of U, whose advantages are linear in them.
        rule: of U's advantages, where `parts` is "rewards" and U is given: raw, group_mean, rloo or grpo.
        autocast: "bfloat16" where the training's passes ran under autocast: the step is executed in it too, and its
            distance from the exact one is the effect `arithmetic`. Weights and moments in half precision, or 8-bit
            states, are told from the checkpoint.
        microbatches: the training's backward passes: how many sequences each had, in U's order, or the passes one by
            one, as they were recorded; None for all of U in one.
        attention: the attention that was trained with, as transformers names it.
        head: how the gradient of the language-model head was added up: "trl", in float32, or "linear", in the autocast
            dtype.
        optimizer: the optimizer of a run's first step, where the checkpoint has no state yet: {kind: adamw, lr: 1e-5,
            …}, settings as its class names them; kinds are those of `fkernel.precond.updates`.
        after: the checkpoint after the step, if training took it: realised changes are then measured on it instead of
            on θ + Δθ.
        loss: the training loss, where it is not the policy gradient −Σ w A S: a named one, or any, by token weights.
    """

    max_norm: float | None = Field(None, gt=0)
    clip: float | None = Field(None, gt=0, le=1)
    path: Literal["midpoint", "start", "gauss2"] = "midpoint"
    parts: Literal["signs", "rewards"] | None = None
    rule: Literal["raw", "group_mean", "rloo", "grpo"] | None = None
    autocast: Literal["bfloat16"] | None = None
    microbatches: Annotated[int, Field(gt=0)] | tuple[MicrobatchPlan, ...] | None = None
    attention: str = "sdpa"
    head: Literal["trl", "linear"] = "trl"
    optimizer: OptimizerPlan | None = None
    after: CheckpointPlan | None = None
    loss: LossPlan | None = None

    @model_validator(mode="after")
    def _one(self) -> StepPlan:
        if self.parts is not None and self.loss is not None and self.loss.kind in ("token_weights", "preference"):
            raise ValueError(
                f"step.parts splits advantages, and the loss {self.loss.kind!r} is not made of U's; leave it out"
            )
        if self.max_norm is not None and self.clip is not None:
            raise ValueError("max_norm and clip say the same in two ways; give one of them")
        return self
