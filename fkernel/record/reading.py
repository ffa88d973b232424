"""Recording: what a run left, step by step, as batches, passes and states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fkernel.checkpoint import optimizer_state
from fkernel.engine import Microbatch
from fkernel.errors import StoreError
from fkernel.func import Weighted
from fkernel.precond import OptimizerState
from fkernel.record.directory import (
    SNAPSHOTS,
    STEPS,
    damage_told,
    numbered,
    place_of,
    read_about,
    read_snapshot,
    read_step,
    step_checksums,
)
from fkernel.record.gradients import passes_of, weighted
from fkernel.record.layout import LOSS, RecordedMicrobatch, Row, unpadded
from fkernel.record.optimizers import state_dict_of
from fkernel.record.policy import attention_of, load_policy, tokenizer_of
from fkernel.rollout import GeneratedBatch, Provenance, Sampling, SequenceRecord
from fkernel.shapes import Tree

ENTROPY = "entropy"
PARTS = (LOSS, "kl", ENTROPY)
"""Parts of a recorded loss, in their order."""
KNOWN = ("prompt", "response", "reward", "rewards", "reward_weights", "advantage", "prompt_id", "finish")
PLACE = ("sequence_id", "microbatch", "row", "group")


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One step, as it was taken.

    Attributes:
        number: optimizer steps taken before it.
        microbatches: its backward passes, padded as they were, in order.
        rows: of each sequence, in the order of the passes: sequence_id, microbatch, row, and what was given with it.
        settings: of each optimizer, of each of its groups; None for an optimizer that did not step.
        grad_norm: ‖∇L‖ as backward left it.
        clip: c; the optimizer was given c ∇L.
        loss: added up over micro-batches; None where it was not noted.
        check: how far the optimizer's gradient was from the record's, where that was computed.
        facts: whatever was noted.
        temperature: that log-probabilities are at.
        pad_id: that batches are padded with.
    """

    number: int
    microbatches: tuple[RecordedMicrobatch, ...]
    rows: tuple[Mapping[str, Any], ...]
    settings: tuple[tuple[Mapping[str, Any], ...] | None, ...]
    grad_norm: float
    clip: float
    loss: float | None
    check: Mapping[str, Any] | None
    facts: Mapping[str, Any]
    temperature: float
    pad_id: int = 0

    @property
    def lr(self) -> tuple[tuple[float, ...], ...]:
        """Learning rates by optimizer and group."""
        return tuple(tuple(float(group["lr"]) for group in groups or ()) for groups in self.settings)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Parts of the loss that are told apart, of PARTS."""
        there = {part for each in self.microbatches for part in each.parts}
        return tuple(part for part in PARTS if part in there)

    @cached_property
    def records(self) -> tuple[SequenceRecord, ...]:
        """The sequences that had a response; `batch` has what their fields are."""
        return tuple(
            self._record(row, unpadded(self.microbatches[row["microbatch"]], row["row"])) for row in self._answered
        )

    @cached_property
    def batch(self) -> GeneratedBatch:
        """The sequences that had a response; ω is the part "loss", less "kl" where that is told apart, η "entropy".

        logprobs and entropies are those of the trainer where it computed them at temperature 1, else empty; logqs are
        its log-probabilities before this step's first pass where it kept them (`old_logprobs`), else the same numbers.
        """
        return GeneratedBatch(self.records, None, Sampling(temperature=self.temperature), self.pad_id)

    @property
    def sequence_ids(self) -> list[str]:
        """Ids of the batch's sequences within the run: step, then id, as "0012/U-003-05"."""
        return [f"{self.number:04d}/{record.sequence_id}" for record in self.records]

    @property
    def weighted(self) -> Weighted:
        """The same sequences as `fkernel.func.weighted_logprob` takes them: tokens, ω, η, [n t]."""
        return weighted(passes_of(self.microbatches)[0])

    @property
    def passes(self) -> list[Microbatch]:
        """The backward passes, by rows of `batch`, as `fkernel.engine.gradient_in` takes them."""
        return passes_of(self.microbatches)[1]

    @property
    def _answered(self) -> list[Mapping[str, Any]]:
        answered = [{*each.answered} for each in self.microbatches]
        return [row for row in self.rows if row["row"] in answered[row["microbatch"]]]

    def _record(self, known: Mapping[str, Any], row: Row) -> SequenceRecord:
        stem, _, completion = known["sequence_id"].rpartition("-")
        place = hashlib.sha256(json.dumps(row.prompt_ids).encode()).hexdigest()[:12]
        mask = self.microbatches[known["microbatch"]].response_mask[known["row"]].nonzero().flatten()
        whole = len(mask) == len(row.response_ids)  # a loss that leaves tokens out computes no log π of them
        plain = self.temperature == 1 and whole
        zeros = (0.0,) * len(row.response_ids)
        ω = {name: row.weighed({other: float(other == name) for other in PARTS}).token_weights for name in self.parts}
        ω.pop(ENTROPY, None)
        rewards = known.get("rewards") or {}
        return SequenceRecord(
            sequence_id=known["sequence_id"],
            prompt_ids=row.prompt_ids,
            response_ids=row.response_ids,
            prompt=known.get("prompt") or "",
            response=known.get("response") or "",
            logprobs=row.logprobs if plain else (),
            logqs=row.others.get("old_logprobs", row.logprobs) if whole else (),
            entropies=row.entropies if plain else (),
            finish=known.get("finish", "given"),
            provenance=Provenance(
                known.get("prompt_id") or f"prompt-{place}",
                "train",
                "recording",
                int(stem.rpartition("-")[2]),
                int(completion),
            ),
            reward=known.get("reward"),
            advantage=known.get("advantage"),
            metadata={key: value for key, value in known.items() if key not in (*KNOWN, *PLACE)},
            abstained=bool(rewards) and known.get("reward") is None,
            token_weights=ω,
            entropy_weights={ENTROPY: row.entropy_weights or zeros} if ENTROPY in self.parts else {},
            rewards=rewards,
            reward_weights=known.get("reward_weights") or {},
        )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state before a step.

    Attributes:
        number: of the step.
        params: {name: [*shape]} θ, what is trained of it, in its own dtypes.
        state_dicts: of each optimizer, as `optimizer.state_dict()` gives it, with names.
    """

    number: int
    params: Tree
    state_dicts: tuple[Mapping[str, Any], ...]

    @property
    def optimizer(self) -> OptimizerState:
        """The optimizers' state in real numbers, by parameter name.

        Raises:
            OptimizerStateError: as `fkernel.checkpoint.optimizer_state`.
        """
        dicts = [*self.state_dicts]
        return optimizer_state(dicts if len(dicts) > 1 else dicts[0], self.params)


class Recording:
    """A recording, read as it is asked for.

    Attributes:
        directory: where it is.
        about: what was trained: model, shapes, optimizers, temperature, precision.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self.directory, self.about = directory, about

    @classmethod
    def open(cls, directory: str | Path) -> Recording:
        """Open a recording, while it is written too.

        Raises:
            StoreError: there is none, it is damaged, or of a newer schema.
        """
        return cls(Path(directory), read_about(Path(directory)))

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the steps that are there."""
        return numbered(self.directory, STEPS)

    @property
    def snapshots(self) -> tuple[int, ...]:
        """Steps before which the state was kept."""
        return numbered(self.directory, SNAPSHOTS)

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of steps between the first and the last that are not there."""
        steps = self.steps
        return tuple(sorted({*range(steps[0], steps[-1] + 1)} - {*steps})) if steps else ()

    def checksums(self, number: int) -> dict[str, str]:
        """Checksums of a step's files, by which it is told from another.

        Raises:
            StoreError: it is not there, or damaged.
        """
        self._need(number, self.steps, "step")
        return step_checksums(place_of(self.directory, STEPS, number))

    def check_steps(self, steps: range) -> None:
        """Raise StoreError unless all of some steps are there."""
        lacking = sorted({*steps} - {*self.steps})
        if lacking or not steps:
            raise StoreError(
                f"{str(self.directory)!r} lacks the steps {_numbers(lacking)} of {steps.start} to {steps.stop - 1}; it "
                f"holds {_numbers(self.steps)}."
            )

    def policy(
        self, *, base: str | Path | None = None, attention: str | None = "eager", trust_remote_code: bool = False
    ) -> nn.Module:
        """Build the policy that was trained; its trained parameters are those of a new one, until they are filled in.

        Args:
            base: the base model's directory, of an adapter or of a partly frozen model, where it is no longer where the
                training read it.
            attention: as transformers names it; None for the training's own.
            trust_remote_code: whether the model's own code may be executed.

        Raises:
            ModelError: the model is not transformers', its base is not there, or is another one.
        """
        options: dict[str, Any] = {"base": base, "attention": attention, "trust_remote_code": trust_remote_code}
        return load_policy(self.directory, self.about["shapes"], **options)

    @property
    def attention(self) -> str | None:
        """The attention that was trained with, as transformers names it; None where that is not known."""
        return attention_of(self.directory)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None where there was none."""
        return tokenizer_of(self.directory)

    @damage_told
    def step(self, number: int) -> RecordedStep:
        """Read a step, its checksums verified.

        Raises:
            StoreError: it is not there, or damaged.
        """
        self._need(number, self.steps, "step")
        facts, microbatches, rows = read_step(place_of(self.directory, STEPS, number))
        return RecordedStep(
            number,
            microbatches,
            rows,
            tuple(None if groups is None else tuple(groups) for groups in facts["optimizers"]),
            facts["grad_norm"],
            facts["clip"],
            facts["loss"],
            facts["check"],
            facts["facts"],
            self.about["temperature"],
        )

    @damage_told
    def snapshot(self, number: int) -> Snapshot:
        """Read the state before a step, its checksums verified.

        Raises:
            StoreError: it is not there, or damaged.
        """
        self._need(number, self.snapshots, "snapshot before step")
        facts, params, tensors = read_snapshot(place_of(self.directory, SNAPSHOTS, number))
        named = [each["groups"] for each in self.about["optimizers"]]
        pairs = zip(facts["groups"], named, strict=True)
        dicts = tuple(state_dict_of(groups, names, tensors, facts["state"]) for groups, names in pairs)
        return Snapshot(number, params, dicts)

    @damage_told
    def summary(self) -> dict[str, Any]:
        """Facts of the recording, JSON: steps, sizes, losses, learning rates, norms, what is missing.

        Raises:
            StoreError: a step is damaged.
        """
        rows = []
        for number in self.steps:
            step = self.step(number)
            tokens = sum(int(each.response_mask.sum()) for each in step.microbatches)
            rows.append(
                {
                    "step": number,
                    "sequences": len(step.rows),
                    "without_response": len(step.rows) - sum(len(each.answered) for each in step.microbatches),
                    "tokens": tokens,
                    "microbatches": len(step.microbatches),
                    "loss": step.loss,
                    "lr": [list(rates) for rates in step.lr],
                    "grad_norm": step.grad_norm,
                    "clip": step.clip,
                    "check": None if step.check is None else step.check["relative_error"],
                }
            )
        return {
            "model": self.about["model"],
            "parameters": sum(_count(shape) for shape in self.about["shapes"].values()),
            "bytes": sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file()),
            "steps": rows,
            "snapshots": list(self.snapshots),
            "missing": list(self.missing),
        }

    def _need(self, number: int, there: tuple[int, ...], what: str) -> None:
        if number not in there:
            raise StoreError(f"There is no {what} {number} in {str(self.directory)!r}; there are {_numbers(there)}.")


def _count(shape: list[int]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def _numbers(numbers: Any) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return "none" if not numbers else shown if len(numbers) <= 8 else f"{shown}, … {numbers[-1]} ({len(numbers)})"
