"""Configuration of U and of requests: one batch each, sampled, read from a file, or passed in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, model_validator

from fkernel.errors import PlanError
from fkernel.record import Recording
from fkernel.rollout import (
    CustomSample,
    GeneratedBatch,
    SampleGenerator,
    check_recorded,
    dotted,
    load_batch,
    probe_name,
    score,
)
from fkernel.study.analyses.registry import RequestAnalyses
from fkernel.study.config.base import one_of
from fkernel.study.config.capture import CapturePlan
from fkernel.study.config.dump import TrainerDump
from fkernel.study.config.values import Name, Place, Strict
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
    """A batch that `save_batch` wrote; sampled by the plan's checkpoint, except a U whose `step.loss` allows any.

    Attributes:
        path: its directory.
    """

    kind: Literal["from_file"]
    path: Place

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it."""
        return load_batch(self.path, checkpoint=generator.fingerprint)

    def of_any(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it; any policy may have sampled it."""
        return load_batch(self.path)


class Recorded(BatchSource):
    """The batch of a recorded step, as it was used; where both are left out, that of the plan's checkpoint.

    What the recording knows of the step is filled in where the plan's `step` is silent.

    Attributes:
        recording: a directory that a Recorder wrote.
        step: optimizer steps taken before it.
    """

    kind: Literal["recorded"]
    recording: Place | None = None
    step: int | None = Field(None, ge=0)

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it."""
        assert self.recording is not None
        assert self.step is not None
        batch = Recording.open(self.recording).step(self.step).batch
        if all(record.logprobs and record.entropies for record in batch):
            return batch
        known = score(
            generator.model, batch.sequences, batch.sampling or generator.sampling
        )  # at temperature 1, which the trainer had not
        pairs = zip(batch, known, strict=True)
        records = (replace(record, logprobs=one.logprobs, entropies=one.entropies) for record, one in pairs)
        return replace(batch, records=tuple(records))


class SamplePayload(Strict):
    """A prompt and a response written by hand.

    Attributes:
        name: its id in results; "probe-1", … by default, in U "U-000-00", ….
        prompt: is put into the template, unless raw.
        response: its text.
        metadata: kept with the sequence.
        raw: whether the prompt is the whole text that the policy reads.
        ended: whether the response ends with the end-of-sequence token.
        reward: shown with it; in U advantages are made of it.
    """

    name: Name | None = None
    prompt: str
    response: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    raw: bool = False
    ended: bool = True
    reward: float | None = None


class Payload(BatchSource):
    """Sequences that are passed in: exactly one of samples, a callback, or (from Python) a batch.

    Attributes:
        samples: written by hand.
        callback: dotted name of a function: SampleGenerator → GeneratedBatch.
        batch: a GeneratedBatch, from Python only.
    """

    kind: Literal["payload"]
    samples: tuple[SamplePayload, ...] | None = Field(None, min_length=1)
    callback: str | None = None
    batch: Any = None

    @model_validator(mode="after")
    def _one(self) -> Payload:
        one_of(self, "samples", "callback", "batch")
        if not isinstance(self.batch, GeneratedBatch | None):
            raise ValueError("a batch is handed in from Python, as a GeneratedBatch; in a file, give samples")
        twice = [name for name, times in Counter(self.names).items() if times > 1]
        if twice:
            raise ValueError(f"two samples have the name {twice[0]!r}; give each one of its own (name:)")
        return self

    @property
    def names(self) -> list[str]:
        """The samples' ids."""
        return [sample.name or self.numbered(i) for i, sample in enumerate(self.samples or ())]

    def numbered(self, place: int) -> str:
        """The id of a sample without a name, by its place from 0."""
        return f"U-{place:03d}-00"

    @field_serializer("batch")
    def _shown(self, batch: GeneratedBatch | None) -> Any:
        return None if batch is None else {"ids": batch.ids}

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Score the samples, call the callback, or return the batch."""
        what = "the batch that was handed in" if self.callback is None else f"the batch of {self.callback}"
        return _ours(self.of_any(generator, seed), generator, what)

    def of_any(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """As `generate`; any policy may have sampled the batch."""
        if self.batch is not None:
            return self.batch
        if self.callback is not None:
            batch = dotted(self.callback, "a function that makes a batch: SampleGenerator -> GeneratedBatch")(generator)
            if not isinstance(batch, GeneratedBatch):
                raise PlanError(f"{self.callback} returned a {type(batch).__name__}; expected a GeneratedBatch.")
            return batch
        assert self.samples is not None
        pairs = zip(self.samples, self.names, strict=True)
        return GeneratedBatch.merge([_scored(sample, name, generator) for sample, name in pairs])


def _scored(sample: SamplePayload, name: str, generator: SampleGenerator) -> GeneratedBatch:
    """Score one sample."""
    given = CustomSample(**sample.model_dump(exclude={"reward", "name"}))
    batch = generator.build_custom_sequence(given, name=name)
    return replace(batch, records=(replace(batch.records[0], reward=sample.reward),))


def _ours(batch: GeneratedBatch, generator: SampleGenerator, what: str) -> GeneratedBatch:
    """Check that the policy sampled a batch: by its fingerprint, or else by its log-probabilities."""
    if batch.checkpoint is None:
        for record, scored in zip(batch, score(generator.model, batch.sequences, generator.sampling), strict=True):
            check_recorded(record.logprobs, scored.logprobs, record.sequence_id)
        return replace(batch, checkpoint=generator.fingerprint)
    if batch.checkpoint != generator.fingerprint:
        raise PlanError(
            f"{what} is of the checkpoint {batch.checkpoint[:12]}, the plan's is "
            f"{(generator.fingerprint or 'none')[:12]}: "
            f"its log-probabilities are another policy's."
        )
    return batch


UpdateSource = Annotated[UpdateDraw | FromFile | Recorded | TrainerDump | Payload, Field(discriminator="kind")]
"""Where U comes from."""


class BatchRequest(BatchSource):
    """Keys of all requests, beside those of their batch.

    Attributes:
        name: its name in results; unique. By default its kind, numbered where there are several; probe-1, … of
            sequences written by hand (custom_sequence), whose id it is too.
        sequence_ids: keep these sequences only; `*` matches any characters.
        advantages: other advantages of U for this request: a rule's name, or {id: advantage} for some of U. P does not
            change, so that results are linear in them; there is no realised change to compare with.
        capture: instead of the plan's.
        analyses: instead of the plan's.
    """

    name: Name | None = None
    sequence_ids: tuple[str, ...] | None = Field(None, min_length=1)
    advantages: str | dict[str, float] | None = None
    capture: CapturePlan | None = None
    analyses: RequestAnalyses | None = None


class UpdateBatch(UpdateRules, BatchRequest):
    """U itself, with the workspace's gradients; or another update batch, where sizes are given.

    Attributes:
        batch_size_prompts: prompts of another update batch.
        completions_per_prompt: responses to each.
    """

    batch_size_prompts: int | None = Field(None, gt=0)
    completions_per_prompt: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _both(self) -> UpdateBatch:
        if (self.batch_size_prompts is None) != (self.completions_per_prompt is None):
            raise ValueError("give batch_size_prompts and completions_per_prompt, or neither for U itself")
        return self

    @property
    def size(self) -> int:
        """How many sequences are sampled; 0 for U itself."""
        return (self.batch_size_prompts or 0) * (self.completions_per_prompt or 0)

    @property
    def is_own(self) -> bool:
        """Whether it is the workspace's own U."""
        return self.batch_size_prompts is None

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Sample another update batch."""
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


class RecordedBatch(Recorded, BatchRequest):
    """A request of kind recorded: the sequences of any recorded step, scored by the plan's checkpoint."""

    @model_validator(mode="after")
    def _which(self) -> RecordedBatch:
        if self.recording is None or self.step is None:
            raise ValueError("name the recording and the step: {kind: recorded, recording: DIR, step: 12}")
        return self

    def generate(self, generator: SampleGenerator, seed: int = 0) -> GeneratedBatch:
        """Read it, and score it: another policy may have sampled it."""
        batch = super().generate(generator, seed)
        scored = score(generator.model, batch.sequences, generator.sampling)
        records = (replace(record, **own._asdict()) for record, own in zip(batch, scored, strict=True))
        return replace(batch, records=tuple(records))


class PayloadBatch(Payload, BatchRequest):
    """A request of kind payload."""

    def numbered(self, place: int) -> str:
        """The id of a sample without a name, by its place from 0: "probe-1", …."""
        return probe_name(place)


AnyRequest = Annotated[
    UpdateBatch
    | EvaluationBatch
    | PromptIdsBatch
    | CustomPromptsBatch
    | CustomSequenceBatch
    | FromFileBatch
    | RecordedBatch
    | PayloadBatch,
    Field(discriminator="kind"),
]
