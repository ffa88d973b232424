"""`fkernel sample PLAN`: one batch, from a checkpoint and prompts that a file names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fkernel import checkpoint
from fkernel.errors import RolloutError
from fkernel.rollout import Gym, PromptSource, SampleGenerator, Sampling, dataset, jsonl, save_batch
from fkernel.rollout.batch import GeneratedBatch


class Strict(BaseModel):
    """Frozen; keys that are not known are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CheckpointPlan(Strict):
    """What `fkernel.checkpoint.load` is given."""

    path: str
    model: str | None = Field(None, description="a directory with config.json, for layouts without an architecture")
    base: str | None = Field(None, description="an adapter's base model")
    order: Literal["named_parameters", "all_parameters", "trainer", "trainer_before_4_51", "by_dimension"] | None = None
    decoupled: bool | None = None
    trust_remote_code: bool = False

    def load(self) -> checkpoint.Checkpoint:
        """Load it."""
        return checkpoint.load(self.path, **self.model_dump(exclude={"path"}))


class PromptsPlan(Strict):
    """Where prompts come from: exactly one of a file, a data set and a task."""

    jsonl: str | None = None
    dataset: str | None = Field(None, description="a directory of save_to_disk()")
    task: str | None = Field(None, description="a reasoning-gym task")
    split: str = "train"
    question: str = Field("question", description="column, of a file or a data set")
    answer: str = Field("answer", description="column, of a file or a data set")
    size: int = Field(1000, gt=0, description="questions, of a task")
    seed: int = Field(0, description="of a task")
    options: dict[str, Any] = Field(default_factory=dict, description="of a task")

    @model_validator(mode="after")
    def _one(self) -> PromptsPlan:
        given = [name for name in ("jsonl", "dataset", "task") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of jsonl, dataset and task, not {' and '.join(given) or 'none'}")
        return self

    def source(self) -> PromptSource:
        """Open it."""
        if self.task is not None:
            return Gym(self.task, self.split, self.size, self.seed, **self.options)
        if self.jsonl is not None:
            return jsonl(self.jsonl, self.split, self.question, self.answer)
        assert self.dataset is not None
        return dataset(self.dataset, self.split, self.question, self.answer)


class SamplingPlan(Strict):
    """How responses are drawn; see `fkernel.rollout.Sampling`."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    stop_strings: tuple[str, ...] = ()


class UpdateRequest(Strict):
    """U: `SampleGenerator.generate_update_batch`."""

    kind: Literal["update"]
    batch_size_prompts: int = Field(gt=0)
    completions_per_prompt: int = Field(gt=0)
    dataset_split: str = "train"
    seed: int = 0
    reward: str | None = "math"
    advantage: str | None = "group_mean"
    weights: str | None = "sequence"
    weight_options: dict[str, Any] = Field(default_factory=dict)

    def generate(self, hub: SampleGenerator) -> GeneratedBatch:
        """Draw it."""
        return hub.generate_update_batch(
            self.batch_size_prompts,
            self.completions_per_prompt,
            self.dataset_split,
            self.seed,
            self.reward,
            self.advantage,
            self.weights,
            **self.weight_options,
        )


class EvaluationRequest(Strict):
    """E: `SampleGenerator.generate_evaluation_batch`."""

    kind: Literal["evaluation"]
    batch_size_prompts: int = Field(gt=0)
    completions_per_prompt: int = Field(1, gt=0)
    with_replacement: bool = True
    dataset_split: str = "test"
    seed: int = 0
    reward: str | None = None

    def generate(self, hub: SampleGenerator) -> GeneratedBatch:
        """Draw it."""
        given = self.model_dump(exclude={"kind", "reward"})
        return hub.generate_evaluation_batch(**given, reward_cfg=self.reward)


class PromptIdsRequest(Strict):
    """Certain prompts: `SampleGenerator.generate_from_prompt_ids`."""

    kind: Literal["prompt_ids"]
    prompt_ids: tuple[str | int, ...] = Field(min_length=1)
    dataset_split: str = "test"
    completions_per_prompt: int = Field(1, gt=0)
    seed: int = 0
    reward: str | None = None

    def generate(self, hub: SampleGenerator) -> GeneratedBatch:
        """Draw it."""
        given = self.model_dump(exclude={"kind", "reward"})
        return hub.generate_from_prompt_ids(**given, reward_cfg=self.reward)


class CustomPromptsRequest(Strict):
    """Prompts written by hand: `SampleGenerator.generate_from_custom_prompts`."""

    kind: Literal["custom_prompts"]
    prompts: tuple[str, ...] = Field(min_length=1)
    completions_per_prompt: int = Field(1, gt=0)
    seed: int = 0

    def generate(self, hub: SampleGenerator) -> GeneratedBatch:
        """Draw it."""
        return hub.generate_from_custom_prompts(**self.model_dump(exclude={"kind"}))


class CustomSequenceRequest(Strict):
    """A prompt and a response written by hand: `SampleGenerator.build_custom_sequence`."""

    kind: Literal["custom_sequence"]
    prompt: str
    response: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    raw: bool = False
    ended: bool = True

    def generate(self, hub: SampleGenerator) -> GeneratedBatch:
        """Score it."""
        return hub.build_custom_sequence(**self.model_dump(exclude={"kind"}))


Request = Annotated[
    UpdateRequest | EvaluationRequest | PromptIdsRequest | CustomPromptsRequest | CustomSequenceRequest,
    Field(discriminator="kind"),
]


class SamplePlan(Strict):
    """One batch: of which checkpoint, from which prompts, how many, and where it is saved."""

    checkpoint: CheckpointPlan
    prompts: tuple[PromptsPlan, ...] = Field((), description="one a split")
    template: str = Field("gsm8k_r1", description="gsm8k_r1, chat or bare")
    sampling: SamplingPlan = SamplingPlan()
    microbatch: int = Field(32, gt=0)
    request: Request
    out: str = Field(description="directory that the batch is saved to; it must not exist")

    @model_validator(mode="after")
    def _splits(self) -> SamplePlan:
        splits = [prompts.split for prompts in self.prompts]
        twice = sorted({split for split in splits if splits.count(split) > 1})
        if twice:
            raise ValueError(f"two prompt sources have the split {twice[0]!r}; give each one of its own (split:)")
        return self


def sampled(plan: SamplePlan, tick: Callable[[int], Any] = lambda n: None) -> GeneratedBatch:
    """Load, draw and save what a plan asks for.

    Raises:
        FKernelError: whatever is wrong with the checkpoint, the prompts or the place to save to.
    """
    if Path(plan.out).exists():  # before an hour of sampling, not after it
        raise RolloutError(f"There is something at {plan.out} already; choose another directory (out:), or delete it.")
    sources: Mapping[str, PromptSource] = {prompts.split: prompts.source() for prompts in plan.prompts}
    loaded = plan.checkpoint.load()
    hub = SampleGenerator(
        loaded.model,
        loaded.tokenizer,
        sources,
        fingerprint=loaded.provenance.fingerprint,
        sampling=Sampling(**plan.sampling.model_dump()),
        template=plan.template,
        microbatch=plan.microbatch,
        tick=tick,
    )
    batch = plan.request.generate(hub)
    save_batch(batch, plan.out)
    return batch
