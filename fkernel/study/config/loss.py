"""Which loss the step was taken on, where it is not the policy gradient −Σ w A S (`fkernel.func.losses`)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fkernel.study.config.base import CheckpointPlan, Strict


class KLPlan(Strict):
    """A penalty on the divergence from a reference policy, which the loss adds; its effect is reported as `penalty`.

    Attributes:
        beta: β; TRL's beta.
        reference: the reference policy.
        corrected: whether k3 is multiplied with the token's ratio: TRL's use_bias_correction_kl, true by default there.
    """

    beta: float = Field(gt=0, allow_inf_nan=False)
    reference: CheckpointPlan
    corrected: bool = True


class PolicyGradientLoss(Strict):
    """The policy gradient with a penalty: the first step from a batch, whose ratios are 1.

    Attributes:
        kl: the penalty.
    """

    kind: Literal["policy_gradient"]
    kl: KLPlan

    foreign: ClassVar[bool] = False
    """Whether U may be of another policy than the plan's checkpoint."""

    @property
    def checkpoints(self) -> dict[str, CheckpointPlan]:
        """The other policies that it knows, by their place in the loss."""
        return {"kl.reference": self.kl.reference}


class _RatioLoss(Strict):
    """A clipped surrogate: a later step from a batch that an older policy sampled.

    Attributes:
        low: ε below; TRL's epsilon.
        high: ε above; TRL's epsilon_high.
        old: the policy that sampled U; None takes the log-probabilities of U's records, which are at temperature 1.
        kl: the penalty; None for none.
    """

    low: float = Field(0.2, ge=0, le=1)
    high: float = Field(0.2, ge=0, allow_inf_nan=False)
    old: CheckpointPlan | None = None
    kl: KLPlan | None = None

    foreign: ClassVar[bool] = True

    @property
    def checkpoints(self) -> dict[str, CheckpointPlan]:
        """The other policies that it knows, by their place in the loss."""
        found = {"old": self.old, "kl.reference": None if self.kl is None else self.kl.reference}
        return {place: one for place, one in found.items() if one is not None}


class ClippedRatioLoss(_RatioLoss):
    """PPO's and GRPO's surrogate: a ratio for every token."""

    kind: Literal["clipped_ratio"]


class SequenceRatioLoss(_RatioLoss):
    """GSPO's surrogate: one ratio for a whole response; clipped as in its paper unless the plan says."""

    kind: Literal["sequence_ratio"]
    low: float = Field(3e-4, ge=0, le=1)
    high: float = Field(4e-4, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _token_ratios(self) -> SequenceRatioLoss:
        if self.kl is not None and self.kl.corrected:
            raise ValueError(
                "kl.corrected multiplies with a token's ratio, and sequence_ratio has none; say kl: {corrected: false}"
            )
        return self


class PreferenceLoss(Strict):
    """DPO's: U is pairs of responses to one prompt; the loss sets advantages (±1) and weights, whatever U's are.

    Attributes:
        beta: β; TRL's beta.
        reference: the reference policy.
        pairs: [id of the chosen, id of the rejected]. None: every prompt of U has two responses, and the one with the
            higher reward was chosen.
    """

    kind: Literal["preference"]
    beta: float = Field(0.1, gt=0, allow_inf_nan=False)
    reference: CheckpointPlan
    pairs: tuple[tuple[str, str], ...] | None = Field(None, min_length=1)

    foreign: ClassVar[bool] = True

    @property
    def checkpoints(self) -> dict[str, CheckpointPlan]:
        """The other policies that it knows, by their place in the loss."""
        return {"reference": self.reference}


LossPlan = Annotated[
    PolicyGradientLoss | ClippedRatioLoss | SequenceRatioLoss | PreferenceLoss, Field(discriminator="kind")
]
"""A loss, by its kind."""
