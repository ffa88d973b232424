"""Parts that all plans share: the checkpoint, prompt sources, sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator

from fkernel import checkpoint, func
from fkernel.checkpoint import read_json
from fkernel.errors import PlanError, listing
from fkernel.record import Recording, checkpoint_before
from fkernel.rollout import Gym, PromptSource, SampleGenerator, Sampling, dataset, jsonl
from fkernel.shapes import Tree
from fkernel.study.config.values import Place, Strict


class CheckpointPlan(Strict):
    """The arguments of `fkernel.checkpoint.load`; or a recording, and the step before which its state is taken.

    Attributes:
        path: a directory, a file, or "hub:org/name".
        recording: a directory that a Recorder wrote, instead of `path`.
        step: of the recording.
        model: for layouts without an architecture: a directory with config.json.
        base: an adapter's base model, where the adapter does not record a directory that is here.
        names: the parameters' names in the optimizer's order, where the state records none: a list of names, one list
            per group, or the path of a JSON file of either. Other parameters were frozen.
        order: the optimizer's order of the parameters, where several known ones fit.
        decoupled: whether weight decay is AdamW's, where the state does not say.
        optimizer: false to skip the optimizer's state, such as one of an unsupported layout; no step is predicted then.
        trust_remote_code: whether the model's own code may be executed.
    """

    path: Place | None = None
    recording: Place | None = Field(None, description="a recording's directory, instead of path")
    step: int | None = Field(None, ge=0, description="the step of the recording that begins here")
    model: Place | None = Field(None, description="a directory with config.json, for layouts without an architecture")
    base: Place | None = Field(None, description="an adapter's base model")
    names: str | tuple[str, ...] | tuple[tuple[str, ...], ...] | None = Field(
        None, description="the parameters in the optimizer's order: names, one list per group, or a JSON file of either"
    )
    order: Literal["named_parameters", "all_parameters", "trainer", "trainer_before_4_51", "by_dimension"] | None = None
    decoupled: bool | None = None
    optimizer: bool = Field(True, description="false to skip the optimizer's state")
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _where(self) -> CheckpointPlan:
        one_of(self, "path", "recording")
        if (self.recording is None) != (self.step is None):
            raise ValueError("step is a recording's, and a recording needs one: {recording: DIR, step: 12}")
        return self

    @property
    def place(self) -> str:
        """Its directory or file."""
        return str(self.path or self.recording)

    def load(self, dtype: torch.dtype = torch.float32) -> checkpoint.Checkpoint:
        """Load it.

        Raises:
            FKernelError: as `fkernel.checkpoint.load`, or the file of names cannot be read; as
                `fkernel.record.checkpoint_before` of a recording.
        """
        if self.recording is not None:
            assert self.step is not None
            own = self.model_dump(include={"base", "optimizer", "trust_remote_code"})
            return checkpoint_before(Recording.open(self.recording), self.step, dtype=dtype, **own)
        assert self.path is not None
        names: Any = self.names
        if isinstance(names, str):
            names = read_json(Path(names), "names of the optimizer's parameters")
        return checkpoint.load(
            self.path, dtype=dtype, names=names, **self.model_dump(exclude={"path", "recording", "step", "names"})
        )

    def load_weights(self, dtype: torch.dtype = torch.float32) -> checkpoint.Checkpoint:
        """Load it without its optimizer's state."""
        return self.model_copy(update={"optimizer": False, "names": None}).load(dtype)

    def load_policy(self, beside: Tree, place: str | None = None, masters: bool = False) -> tuple[func.Apply, Tree]:
        """Load another policy: its function, and all of its parameters with the device and dtype of `beside`.

        Args:
            beside: parameters of the plan's policy.
            place: key in the plan, of a checkpoint that must have all of these parameters.
            masters: whether to take the optimizer's float32 masters where it keeps any: they are what a step moves.

        Raises:
            PlanError: it lacks one.
        """
        leaf = next(iter(beside.values()))
        model = (self.load(leaf.dtype) if masters else self.load_weights(leaf.dtype)).model.to(leaf.device)
        apply, params = func.make_functional(model, select=lambda name: True)
        if place is not None and (missing := sorted({*beside} - {*params})):
            raise PlanError(f"{place}: {self.place} has no {listing(missing)}; is it the same model's?")
        return apply, params


class PromptsPlan(Strict):
    """Where prompts come from: exactly one of a file, a data set and a task.

    Attributes:
        jsonl: a file with an object a line.
        dataset: a directory of `datasets`' save_to_disk().
        task: a reasoning-gym task.
        split: by which requests name it.
        question: column with the question, of a file or a data set.
        answer: column with the answer, for rewards.
        size: questions, of a task.
        seed: of a task.
        options: of a task.
    """

    jsonl: Place | None = None
    dataset: Place | None = Field(None, description="a directory of save_to_disk()")
    task: str | None = Field(None, description="a reasoning-gym task")
    split: str = "train"
    question: str = Field("question", description="column, of a file or a data set")
    answer: str = Field("answer", description="column, of a file or a data set")
    size: int = Field(1000, gt=0, description="questions, of a task")
    seed: int = Field(0, description="of a task")
    options: dict[str, Any] = Field(default_factory=dict, description="of a task")

    @model_validator(mode="after")
    def _one(self) -> PromptsPlan:
        one_of(self, "jsonl", "dataset", "task")
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
    """How responses are sampled; see `fkernel.rollout.Sampling`.

    Attributes:
        temperature: by which logits are divided.
        top_p: the smallest set of tokens of this probability is kept; 1 for all.
        top_k: so many tokens are kept; 0 for all.
        max_new_tokens: the most tokens of a response.
        stop_strings: texts that end a response.
    """

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    stop_strings: tuple[str, ...] = ()


def one_of(model: BaseModel, *names: str) -> None:
    """Raise ValueError unless exactly one of some fields is given."""
    given = [name for name in names if getattr(model, name) is not None]
    if len(given) != 1:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(f"give exactly one of {listed}, not {' and '.join(given) or 'none'}")


class SourcePlan(Strict):
    """A checkpoint, prompts and sampling: the arguments of `SampleGenerator`.

    Attributes:
        checkpoint: the policy.
        prompts: prompt sources, one per split.
        template: from a question to the prompt's text: gsm8k_r1, chat (the tokenizer's), or bare for the text itself.
        sampling: how responses are sampled.
    """

    checkpoint: CheckpointPlan
    prompts: tuple[PromptsPlan, ...] = Field((), description="one per split")
    template: str = Field("gsm8k_r1", description="gsm8k_r1, chat or bare")
    sampling: SamplingPlan = SamplingPlan()

    @model_validator(mode="after")
    def _splits(self) -> SourcePlan:
        splits = [prompts.split for prompts in self.prompts]
        twice = sorted({split for split in splits if splits.count(split) > 1})
        if twice:
            raise ValueError(f"two prompt sources have the split {twice[0]!r}; give each one of its own (split:)")
        return self

    def sources(self) -> Mapping[str, PromptSource]:
        """Open the prompt sources, {split: source}."""
        return {prompts.split: prompts.source() for prompts in self.prompts}

    def generator(
        self,
        loaded: checkpoint.Checkpoint,
        sources: Mapping[str, PromptSource],
        microbatch: int = 32,
        on_progress: Callable[[int], Any] = lambda n: None,
    ) -> SampleGenerator:
        """The sample generator of U and E."""
        return SampleGenerator(
            loaded.as_it_ran(),
            loaded.tokenizer,
            sources,
            fingerprint=loaded.provenance.fingerprint,
            sampling=Sampling(**self.sampling.model_dump()),
            template=self.template,
            microbatch=microbatch,
            on_progress=on_progress,
        )
