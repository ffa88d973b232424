"""What may be asked of a workspace: one batch E each, of the kinds of the sample generator, saved, or handed in."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, model_validator

from fkernel.errors import PlanError
from fkernel.rollout import CustomSample, GeneratedBatch, SampleGenerator, check_recorded, dotted, load_batch, score
from fkernel.study.analyses.registry import RequestAnalyses
from fkernel.study.config.base import Strict, one_of
from fkernel.study.config.capture import CapturePlan
from fkernel.study.draws import (
    BatchSource,
    CustomPromptsDraw,
    CustomSequenceDraw,
    EvaluationDraw,
    PromptIdsDraw,
    UpdateDraw,
    UpdateRules,
)


class FromFile(BatchSource):
    """A batch that `save_batch` wrote; of the plan's checkpoint, but for a U whose loss (`step.loss`) takes any."""

    kind: Literal["from_file"]
    path: str

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it."""
        return load_batch(self.path, checkpoint=generator.fingerprint)

    def of_any(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it, of whatever policy it is."""
        return load_batch(self.path)


class SamplePayload(Strict):
    """A prompt and a response, as `CustomSample` takes them, and a reward."""

    prompt: str
    response: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    raw: bool = False
    ended: bool = True
    reward: float | None = None


class Payload(BatchSource):
    """Sequences that are handed in: written out, made by a function, or (from Python) a batch; exactly one of them."""

    kind: Literal["payload"]
    samples: tuple[SamplePayload, ...] | None = Field(None, min_length=1)
    callback: str | None = Field(None, description="dotted name of a function: SampleGenerator -> GeneratedBatch")
    batch: Any = Field(None, description="from Python only")

    @model_validator(mode="after")
    def _one(self) -> Payload:
        one_of(self, "samples", "callback", "batch")
        if not isinstance(self.batch, GeneratedBatch | None):
            raise ValueError("a batch is handed in from Python, as a GeneratedBatch; in a file, give samples")
        return self

    @field_serializer("batch")
    def _shown(self, batch: GeneratedBatch | None) -> Any:
        return None if batch is None else {"ids": batch.ids}

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Score what was written, call the function, or take the batch."""
        what = "the batch that was handed in" if self.callback is None else f"the batch of {self.callback}"
        return _ours(self.of_any(generator, seed), generator, what)

    def of_any(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Do the same, and take a batch of whatever policy it is."""
        if self.batch is not None:
            return self.batch
        if self.callback is not None:
            found = dotted(self.callback, "a function that makes a batch: SampleGenerator -> GeneratedBatch")(generator)
            if not isinstance(found, GeneratedBatch):
                raise PlanError(f"{self.callback} returned a {type(found).__name__}; expected a GeneratedBatch.")
            return found
        assert self.samples is not None
        return GeneratedBatch.merge([_scored(sample, generator) for sample in self.samples])


def _scored(sample: SamplePayload, generator: SampleGenerator) -> GeneratedBatch:
    """Score what was written."""
    batch = generator.build_custom_sequence(CustomSample(**sample.model_dump(exclude={"reward"})))
    return replace(batch, records=(replace(batch.records[0], reward=sample.reward),))


def _ours(batch: GeneratedBatch, generator: SampleGenerator, what: str) -> GeneratedBatch:
    """Hold a batch that was handed in against the policy: by its fingerprint, or else by its log-probabilities."""
    if batch.checkpoint is None:
        for record, known in zip(batch, score(generator.model, batch.sequences, generator.sampling), strict=True):
            check_recorded(record.logprobs, known.logprobs, record.sequence_id)
        return replace(batch, checkpoint=generator.fingerprint)
    if batch.checkpoint != generator.fingerprint:
        raise PlanError(
            f"{what} is of the checkpoint {batch.checkpoint[:12]}, the plan's is "
            f"{(generator.fingerprint or 'none')[:12]}: "
            f"its log-probabilities are another policy's."
        )
    return batch


UpdateSource = Annotated[UpdateDraw | FromFile | Payload, Field(discriminator="kind")]
"""Where U comes from."""


class BatchRequest(BatchSource):
    """What every request may say beside how its batch is made.

    Attributes:
        name: what results call it; unique. By default its kind, numbered where there are several.
        sequence_ids: keep these sequences only; `*` stands for any characters.
        advantages: other advantages of U for this request: a rule's name, or {id: advantage} for some of U. P stays as
            it is, so that the answer is linear in them, and there is no realised change to compare with.
        capture: instead of the plan's.
        analyses: instead of the plan's.
    """

    name: str | None = Field(None, min_length=1, pattern=r"^[\w.-]+$")
    sequence_ids: tuple[str, ...] | None = Field(None, min_length=1)
    advantages: str | dict[str, float] | None = None
    capture: CapturePlan | None = None
    analyses: RequestAnalyses | None = None


class UpdateBatch(UpdateRules, BatchRequest):
    """U itself, with the gradients that the workspace holds; or another batch drawn as one, where sizes are given."""

    batch_size_prompts: int | None = Field(None, gt=0)
    completions_per_prompt: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _both(self) -> UpdateBatch:
        if (self.batch_size_prompts is None) != (self.completions_per_prompt is None):
            raise ValueError("give batch_size_prompts and completions_per_prompt, or neither for U itself")
        return self

    @property
    def size(self) -> int:
        """Count what is drawn: nothing, where it is U itself."""
        return (self.batch_size_prompts or 0) * (self.completions_per_prompt or 0)

    @property
    def is_own(self) -> bool:
        """Whether it is the workspace's own U."""
        return self.batch_size_prompts is None

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Draw another one."""
        own = set(BatchRequest.model_fields)
        return UpdateDraw.model_validate(self.model_dump(exclude=own)).generate(generator, seed)


class EvaluationBatch(EvaluationDraw, BatchRequest):
    """A request of kind evaluation."""


class PromptIdsBatch(PromptIdsDraw, BatchRequest):
    """A request of kind prompt_ids."""


class CustomPromptsBatch(CustomPromptsDraw, BatchRequest):
    """A request of kind custom_prompts."""


class CustomSequenceBatch(CustomSequenceDraw, BatchRequest):
    """A request of kind custom_sequence."""


class FromFileBatch(FromFile, BatchRequest):
    """A request of kind from_file."""


class PayloadBatch(Payload, BatchRequest):
    """A request of kind payload."""


AnyRequest = Annotated[
    UpdateBatch
    | EvaluationBatch
    | PromptIdsBatch
    | CustomPromptsBatch
    | CustomSequenceBatch
    | FromFileBatch
    | PayloadBatch,
    Field(discriminator="kind"),
]
