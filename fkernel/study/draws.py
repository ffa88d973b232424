"""Configuration of the sample generator's five kinds of batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fkernel.errors import PlanError
from fkernel.rollout import GeneratedBatch, SampleGenerator, probe_name
from fkernel.study.config.values import MANY, Name, Strict


class BatchSource(Strict):
    """One batch to be sampled or scored; `seed: null` uses the plan's."""

    @property
    def size(self) -> int:
        """How many sequences are sampled; 0 for none or unknown."""
        return 0

    @model_validator(mode="after")
    def _countable(self) -> BatchSource:
        if self.size > MANY:
            raise ValueError(f"these are {self.size} sequences; a batch has at most {MANY}")
        return self

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Sample, score or read the batch."""
        raise TypeError(f"{type(self).__name__} does not say how it is drawn.")

    def of_any(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """As `generate`; a given batch may be of another policy, where the step's loss allows that."""
        return self.generate(generator, seed)


class UpdateRules(BatchSource):
    """How an update batch is rewarded and weighted.

    Attributes:
        dataset_split: of the plan's prompts.
        seed: of the draw; None for the plan's.
        reward: the reward function: math, exact, gym or a dotted name; or {name: function} of several, whose values are
            recorded.
        reward_weights: {name: weight} of several; 1 each by default.
        advantage: the rule by which rewards become advantages: group_mean, grpo, rloo, raw or a dotted name.
        weights: the rule by which the loss divides, of `fkernel.rollout.loss_weights`: sequence, grpo, group_token,
            bnpo, dapo or dr_grpo.
        weight_options: of that rule.
    """

    kind: Literal["update"]
    dataset_split: str = "train"
    seed: int | None = None
    reward: str | dict[str, str] | None = "math"
    reward_weights: dict[str, float] = Field(default_factory=dict)
    advantage: str | None = "group_mean"
    weights: str | None = "sequence"
    weight_options: dict[str, Any] = Field(default_factory=dict)


class UpdateDraw(UpdateRules):
    """An update batch that is sampled from the checkpoint.

    Attributes:
        batch_size_prompts: prompts.
        completions_per_prompt: responses to each.
    """

    batch_size_prompts: int = Field(gt=0)
    completions_per_prompt: int = Field(gt=0)

    @property
    def size(self) -> int:
        """Prompts times completions."""
        return self.batch_size_prompts * self.completions_per_prompt

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Sample it."""
        return generator.generate_update_batch(
            self.batch_size_prompts,
            self.completions_per_prompt,
            self.dataset_split,
            seed if self.seed is None else self.seed,
            self.reward,
            self.advantage,
            self.weights,
            self.reward_weights or None,
            **self.weight_options,
        )


def check_rewards(draw: UpdateDraw, generator: SampleGenerator, batch: GeneratedBatch, weighed: bool = False) -> None:
    """Compare the stored rewards and advantages of U with what the same functions return now.

    Args:
        draw: the plan's, whose functions have no file to hash.
        generator: with U's prompts.
        batch: U, as stored.
        weighed: whether the step's loss sets the advantages.

    Raises:
        PlanError: they differ.
    """
    compared: list[tuple[str, Any, list[Any], list[Any]]] = []
    if draw.reward is not None:
        now = generator.rewards_of(batch, draw.reward, draw.reward_weights or None)
        compared.append(("reward", draw.reward, [r.reward for r in batch], now))
    if draw.reward is not None and draw.advantage is not None and not weighed:
        again = batch.with_advantages(draw.advantage)
        compared.append(("advantage", draw.advantage, [r.advantage for r in batch], [r.advantage for r in again]))
    for what, name, before, now in compared:
        for record, was, is_now in zip(batch, before, now, strict=True):
            if was != is_now:
                raise PlanError(
                    f"The {what} of {record.sequence_id} by {name} is {is_now}, and the workspace was made with {was}: "
                    f"the function was edited, or does not give the same twice. Choose another directory "
                    f"(storage.workspace, or out:), or delete the workspace to have U drawn anew."
                )


class EvaluationDraw(BatchSource):
    """Responses to prompts of a split, sampled from the checkpoint.

    Attributes:
        batch_size_prompts: prompts.
        completions_per_prompt: responses to each.
        with_replacement: whether a prompt may be drawn twice.
        dataset_split: of the plan's prompts.
        seed: of the draw; None for the plan's.
        reward: the reward function, as of an update batch; None for none.
    """

    kind: Literal["evaluation"]
    batch_size_prompts: int = Field(gt=0)
    completions_per_prompt: int = Field(1, gt=0)
    with_replacement: bool = True
    dataset_split: str = "test"
    seed: int | None = None
    reward: str | None = None

    @property
    def size(self) -> int:
        """Prompts times completions."""
        return self.batch_size_prompts * self.completions_per_prompt

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Sample it."""
        return generator.generate_evaluation_batch(
            self.batch_size_prompts,
            self.completions_per_prompt,
            self.with_replacement,
            self.dataset_split,
            seed if self.seed is None else self.seed,
            self.reward,
        )


class PromptIdsDraw(BatchSource):
    """Responses to certain prompts of a split, sampled from the checkpoint.

    Attributes:
        prompt_ids: global_prompt_ids, or positions in the split.
        dataset_split: of the plan's prompts.
        completions_per_prompt: responses to each.
        seed: of the draw; None for the plan's.
        reward: the reward function, as of an update batch; None for none.
    """

    kind: Literal["prompt_ids"]
    prompt_ids: tuple[str | int, ...] = Field(min_length=1)
    dataset_split: str = "test"
    completions_per_prompt: int = Field(1, gt=0)
    seed: int | None = None
    reward: str | None = None

    @property
    def size(self) -> int:
        """Prompts times completions."""
        return len(self.prompt_ids) * self.completions_per_prompt

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Sample it."""
        seed = seed if self.seed is None else self.seed
        return generator.generate_from_prompt_ids(
            self.prompt_ids, self.dataset_split, self.completions_per_prompt, seed, self.reward
        )


class CustomPromptsDraw(BatchSource):
    """Responses to prompts written by hand, sampled from the checkpoint.

    Attributes:
        prompts: their texts, which are put into the template.
        completions_per_prompt: responses to each.
        seed: of the draw; None for the plan's.
    """

    kind: Literal["custom_prompts"]
    prompts: tuple[str, ...] = Field(min_length=1)
    completions_per_prompt: int = Field(1, gt=0)
    seed: int | None = None

    @property
    def size(self) -> int:
        """Prompts times completions."""
        return len(self.prompts) * self.completions_per_prompt

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Sample it."""
        seed = seed if self.seed is None else self.seed
        return generator.generate_from_custom_prompts(self.prompts, self.completions_per_prompt, seed)


class CustomSequenceDraw(BatchSource):
    """A prompt and a response written by hand.

    Attributes:
        name: of the sequence; "probe-1" by default.
        prompt: is put into the template, unless raw.
        response: its text.
        metadata: kept with the sequence.
        raw: whether the prompt is the whole text that the policy reads.
        ended: whether the response ends with the end-of-sequence token.
    """

    kind: Literal["custom_sequence"]
    name: Name | None = None
    prompt: str
    response: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    raw: bool = False
    ended: bool = True

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Score it."""
        return generator.build_custom_sequence(
            self.prompt, self.response, self.metadata, raw=self.raw, ended=self.ended, name=self.name or probe_name(0)
        )


AnyDraw = Annotated[
    UpdateDraw | EvaluationDraw | PromptIdsDraw | CustomPromptsDraw | CustomSequenceDraw,
    Field(discriminator="kind"),
]
