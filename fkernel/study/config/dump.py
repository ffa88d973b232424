"""Configuration of a batch that a trainer dumped, and of what its files do not say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fkernel.record.dumps import Options, locate
from fkernel.rollout import GeneratedBatch, SampleGenerator
from fkernel.study.config.loss import (
    CispoLoss,
    ClippedRatioLoss,
    LuspoLoss,
    PolicyLoss,
    Positive,
    SapoLoss,
    SequenceRatioLoss,
    VespoLoss,
)
from fkernel.study.config.values import Place
from fkernel.study.draws import BatchSource
from fkernel.study.dumped import with_loss

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PlainPolicyGradient(PolicyLoss):
    """The policy gradient −Σ w A log π: every loss of ratios where the checkpoint itself is the policy before them."""

    kind: Literal["policy_gradient"]  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _of_its_own(self) -> PlainPolicyGradient:
        if self.old is not None:
            raise ValueError("policy_gradient has no ratio, so that old has no meaning; take clipped_ratio")
        return self


class DriftLoss(PolicyLoss):
    """prime-rl's losses, whose ratio is to the sampling engine.

    Attributes:
        adv_tau: by which advantages are multiplied.
        kl_tau: weight of the squared log-ratio, the part `kl`.
    """

    adv_tau: NotNegative = 1.0
    kl_tau: NotNegative = 1e-3

    @model_validator(mode="after")
    def _alone(self) -> DriftLoss:
        beside = ("old", "kl", "entropy", "correction", "off_policy_mask", "top_entropy")
        if given := [name for name in beside if getattr(self, name) is not None]:
            raise ValueError(f"prime-rl's losses have no {given[0]}; leave it out")
        return self


class DppoLoss(DriftLoss):
    """prime-rl's default.

    Attributes:
        low: its dppo_mask_low.
        high: its dppo_mask_high.
    """

    kind: Literal["dppo"]  # pyright: ignore[reportIncompatibleVariableOverride]
    low: NotNegative = 0.2
    high: NotNegative = 0.2


class IpoLoss(DriftLoss):
    """prime-rl's "ipo".

    Attributes:
        threshold: its ipo_threshold.
    """

    kind: Literal["ipo"]  # pyright: ignore[reportIncompatibleVariableOverride]
    threshold: NotNegative = 0.1


DumpedLoss = Annotated[
    PlainPolicyGradient
    | ClippedRatioLoss
    | SequenceRatioLoss
    | LuspoLoss
    | CispoLoss
    | SapoLoss
    | VespoLoss
    | DppoLoss
    | IpoLoss,
    Field(discriminator="kind"),
]
"""A loss that token weights are made of, by its kind."""


class TrainerDump(BatchSource):
    """The batch of a step as a trainer dumped it; its token weights ω are made of the loss that is named here.

    Attributes:
        path: a file, or the folder that it lies in.
        step: as the trainer numbers its files; None where there is one.
        trainer: whose dump it is, where file names do not tell.
        loss: the loss of the step. Log-probabilities before the first step on the batch are the file's, where it has
            them, and ratios are then 1; those of `old`, where it names a checkpoint.
        old: "sampler" where the ratio is to the engine that sampled, whose log-probabilities the file has.
        weights: what the loss divides by, over the whole step: a rule of `fkernel.rollout.loss_weights`, or the weight
            of every token, a number.
        weight_options: of the rule.
        advantage: the rule by which rewards become advantages, where the file has none.
        batch_size: sequences of the optimizer step.
        reward_weights: {column: weight} of TRL's reward functions.
        chat_template_kwargs: of TRL's trainer.
        mask_truncated: whether responses that were cut off had no part in TRL's loss (mask_truncated_completions).
        dataset_split: of the plan's prompts, among which verl's are looked up.
        minibatch: which of the steps on slime's rollout, from 0.
        ranks: how many rank files prime-rl wrote, where a rank had nothing to write.
    """

    kind: Literal["trainer_dump"]
    path: Place
    step: int | None = Field(None, ge=0)
    trainer: Literal["trl", "nemo_rl", "prime_rl", "open_instruct", "slime", "verl"] | None = None
    loss: DumpedLoss | None = None
    old: Literal["sampler"] | None = None
    weights: Literal["sequence", "grpo", "group_token", "bnpo", "dapo", "dr_grpo"] | Positive | None = None
    weight_options: dict[str, Any] = Field(default_factory=dict)
    advantage: str | None = None
    batch_size: int | None = Field(None, gt=0)
    reward_weights: dict[str, float] = Field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    mask_truncated: bool | None = None
    dataset_split: str = "train"
    minibatch: int | None = Field(None, ge=0)
    ranks: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> TrainerDump:
        if self.old is not None and self.loss is not None and self.loss.old is not None:
            raise ValueError("old and loss.old name the policy of the ratio in two ways; give one of them")
        return self

    def read(self, generator: SampleGenerator) -> GeneratedBatch:
        """Read it, without a loss."""
        dump = locate(self.path, self.step, self.trainer)
        prompts = generator.prompt_tokens(self.dataset_split) if "prompts" in dump.lacks else None
        options = Options(
            tokenizer=generator.tokenizer,
            vocabulary=generator.model.config.get_text_config().vocab_size,
            max_new_tokens=generator.sampling.max_new_tokens,
            prompts=prompts,
            reward_weights=self.reward_weights or None,
            chat_template_kwargs=self.chat_template_kwargs or None,
            ranks=self.ranks,
            minibatch=self.minibatch,
        )
        return dump.batch(options)

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it, and make its token weights."""
        return with_loss(self.read(generator), self, generator)
