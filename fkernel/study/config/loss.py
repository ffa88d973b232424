"""Configuration of losses other than the policy gradient −Σ w A S (`fkernel.func.objectives`)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.values import Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Level = Literal["token", "sequence"]


class KLPlan(Strict):
    """A penalty on the divergence from a reference policy, added to the loss as the part `kl`.

    Attributes:
        beta: β; TRL's beta.
        reference: the reference policy.
        corrected: whether k3 is multiplied by the token's ratio: TRL's use_bias_correction_kl, true by default there.
    """

    beta: Positive
    reference: CheckpointPlan
    corrected: bool = True


class EntropyPlan(Strict):
    """An entropy bonus, added to the loss as the part `entropy`.

    Attributes:
        coefficient: c, as it was applied; TRL's entropy_coef.
        weight: of a token, in place of the loss weight w; TRL's is 1/(tokens that it acts on · accumulation).
    """

    coefficient: Annotated[float, Field(allow_inf_nan=False)]
    weight: Positive | None = None


class CorrectionPlan(Strict):
    """Importance of tokens that another engine sampled: exp(ℓ_old − ℓ_sampler), of U's recorded sampling probabilities.

    Attributes:
        mode: "truncate" holds it within the range, "mask" leaves out what is outside.
        level: of a token, or of a sequence.
        low: the smallest; TRL's vllm_importance_sampling_clip_min.
        high: the largest; TRL's vllm_importance_sampling_clip_max.
    """

    mode: Literal["truncate", "mask"] = "mask"
    level: Level = "sequence"
    low: float = Field(0.0, ge=0)
    high: float = Field(3.0, gt=0)


class PolicyLoss(Strict):
    """What every loss of advantages may have.

    Attributes:
        old: the policy that sampled U; None uses the recorded log-probabilities, which are at temperature 1.
        kl: a penalty beside it.
        entropy: an entropy bonus beside it.
        correction: of the mismatch between trainer and sampling engine.
        off_policy_mask: leaves out sequences of negative advantage that the policy left by more, nats a token; TRL's
            off_policy_mask_threshold.
        top_entropy: the share of tokens of highest entropy that the loss acts on, out of all of U; TRL's
            top_entropy_quantile.
    """

    kind: str
    old: CheckpointPlan | None = None
    kl: KLPlan | None = None
    entropy: EntropyPlan | None = None
    correction: CorrectionPlan | None = None
    off_policy_mask: Positive | None = None
    top_entropy: Share | None = None

    foreign: ClassVar[bool] = True
    """Whether U may be sampled by another policy than the plan's checkpoint."""

    @property
    def checkpoints(self) -> dict[str, CheckpointPlan]:
        """The loss's other checkpoints, by their key in the plan."""
        checkpoints = {"old": self.old, "kl.reference": None if self.kl is None else self.kl.reference}
        return {place: checkpoint for place, checkpoint in checkpoints.items() if checkpoint is not None}


class PolicyGradientLoss(PolicyLoss):
    """The policy gradient with something beside it: the first step on a batch, where all ratios are 1."""

    kind: Literal["policy_gradient"]  # pyright: ignore[reportIncompatibleVariableOverride]

    foreign: ClassVar[bool] = False

    @model_validator(mode="after")
    def _something(self) -> PolicyGradientLoss:
        if self == PolicyGradientLoss.model_construct(kind=self.kind):
            raise ValueError("the policy gradient alone is the loss of a plan without step.loss; say what is beside it")
        if self.old is not None:
            raise ValueError("policy_gradient is of U's own policy; for a batch of an older one take clipped_ratio")
        return self


class ClippedLoss(PolicyLoss):
    """A clipped surrogate: a later step on a batch that an older policy sampled.

    Attributes:
        low: ε below; TRL's epsilon.
        high: ε above; TRL's epsilon_high.
        delta: the largest ratio of a negative advantage, above 1 + high; TRL's delta.
    """

    low: float = Field(0.2, ge=0, le=1)
    high: float = Field(0.2, ge=0, allow_inf_nan=False)
    delta: Positive | None = None


class ClippedRatioLoss(ClippedLoss):
    """PPO's and GRPO's surrogate: one ratio per token."""

    kind: Literal["clipped_ratio"]  # pyright: ignore[reportIncompatibleVariableOverride]


class SequenceRatioLoss(ClippedLoss):
    """GSPO's surrogate: one ratio per response; clipped as in its paper by default."""

    kind: Literal["sequence_ratio"]  # pyright: ignore[reportIncompatibleVariableOverride]
    low: float = Field(3e-4, ge=0, le=1)
    high: float = Field(4e-4, ge=0, allow_inf_nan=False)


class LuspoLoss(ClippedLoss):
    """LUSPO's surrogate: GSPO's, times the response's length.

    Attributes:
        level: whose ratio.
    """

    kind: Literal["luspo"]  # pyright: ignore[reportIncompatibleVariableOverride]
    level: Level = "sequence"


class CispoLoss(PolicyLoss):
    """CISPO: the ratio is capped and held constant.

    Attributes:
        cap: the largest ratio: TRL's epsilon_high itself, not 1 + epsilon_high.
        level: whose ratio; TRL's importance_sampling_level.
    """

    kind: Literal["cispo"]  # pyright: ignore[reportIncompatibleVariableOverride]
    cap: Positive
    level: Level = "token"


class SapoLoss(PolicyLoss):
    """SAPO: a soft gate in place of clipping.

    Attributes:
        positive: temperature of positive advantages; TRL's sapo_temperature_pos.
        negative: of negative ones; TRL's sapo_temperature_neg.
        level: whose ratio.
    """

    kind: Literal["sapo"]  # pyright: ignore[reportIncompatibleVariableOverride]
    positive: Positive = 1.0
    negative: Positive = 1.05
    level: Level = "token"


class VespoLoss(PolicyLoss):
    """VESPO: a sequence is weighed by a gamma density of its ratio, held constant.

    Attributes:
        positive: (k, λ) of positive advantages; TRL's vespo_k_pos, vespo_lambda_pos.
        negative: (k, λ) of negative ones.
    """

    kind: Literal["vespo"]  # pyright: ignore[reportIncompatibleVariableOverride]
    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)


class CrossEntropyLoss(Strict):
    """Supervised fine-tuning: every response is raised, with U's loss weights, or 1/(all response tokens) without."""

    kind: Literal["cross_entropy"]

    foreign: ClassVar[bool] = True

    @property
    def checkpoints(self) -> dict[str, CheckpointPlan]:
        """None."""
        return {}


class PreferenceLoss(Strict):
    """DPO's loss: U is pairs of responses to one prompt; it sets advantages (±1) and weights, replacing U's.

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
        """The loss's other checkpoints, by their key in the plan."""
        return {"reference": self.reference}


class TokenWeightsLoss(Strict):
    """Any loss, by the weights of U's tokens: ω = ∂L/∂log π and, where entropies count, η = ∂L/∂H, of U's records.

    Records have them in named parts (`token_weights`, `entropy_weights`), each with a line of its own in the ledger.
    """

    kind: Literal["token_weights"]

    foreign: ClassVar[bool] = True

    @property
    def checkpoints(self) -> dict[str, CheckpointPlan]:
        """None: what other policies said is in the weights."""
        return {}


LossPlan = Annotated[
    PolicyGradientLoss
    | ClippedRatioLoss
    | SequenceRatioLoss
    | LuspoLoss
    | CispoLoss
    | SapoLoss
    | VespoLoss
    | CrossEntropyLoss
    | PreferenceLoss
    | TokenWeightsLoss,
    Field(discriminator="kind"),
]
"""A loss, by its kind."""
