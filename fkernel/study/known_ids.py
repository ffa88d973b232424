"""What is known of a plan's batches before anything is sampled: saved ones, ids; and ids that no sequence has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from fkernel.errors import listing
from fkernel.record import Recording
from fkernel.rollout import GeneratedBatch, load_batch, probe_name
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import FromFile, Payload, Recorded, UpdateBatch
from fkernel.study.draws import CustomSequenceDraw

PREFIXES = {"update": "U", "evaluation": "E", "prompt_ids": "P", "custom_prompts": "C"}
"""Of the ids of sampled batches, by kind."""


def saved_batch(source: Any, checkpoint: CheckpointPlan) -> GeneratedBatch | None:
    """Read a batch that is a file's, a recording's or given as it is; None where the batch is still to be made.

    Args:
        source: a plan's `update`, or one of its requests.
        checkpoint: the plan's; a recorded batch that names no recording or step is that of the checkpoint's.

    Raises:
        FKernelError: the file or the recording cannot be read.
    """
    if isinstance(source, Payload):
        return source.batch
    if isinstance(source, FromFile):
        return load_batch(source.path)
    if isinstance(source, Recorded):
        place = source.recording or checkpoint.recording
        number = checkpoint.step if source.step is None else source.step
        return None if place is None or number is None else Recording.open(place).step(number).batch
    return None


def ids_of(source: Any, saved: GeneratedBatch | None = None, own: Sequence[str] | None = None) -> list[str] | None:
    """The ids of a batch before it is made; None where only making it tells.

    Args:
        source: a plan's `update`, or one of its requests.
        saved: its batch, where that is saved.
        own: the ids of U, for a request that is U itself.

    Example:
        >>> from fkernel.study.draws import EvaluationDraw
        >>> ids_of(EvaluationDraw(kind="evaluation", batch_size_prompts=2))
        ['E-000-00', 'E-001-00']
    """
    if saved is not None:
        return saved.ids
    if isinstance(source, UpdateBatch) and source.is_own:
        return None if own is None else [*own]
    if isinstance(source, CustomSequenceDraw):
        return [source.name or probe_name(0)]
    if isinstance(source, Payload):
        return source.names or None
    if source.kind not in PREFIXES:
        return None
    prefix, completions = PREFIXES[source.kind], int(source.completions_per_prompt or 1)
    return [f"{prefix}-{g:03d}-{k:02d}" for g in range(int(source.size) // completions) for k in range(completions)]


def unknown_tokens(place: str, batch: GeneratedBatch, vocabulary: int) -> list[str]:
    """Say which token of a saved batch is beyond a model's vocabulary: a line, or none.

    Args:
        place: of the batch in the plan.
        batch: the batch.
        vocabulary: tokens that the model has.
    """
    for record in batch:
        for token in (*record.prompt_ids, *record.response_ids):
            if not 0 <= token < vocabulary:
                return [
                    f"{place}: {record.sequence_id} has the token {token}, and the checkpoint's vocabulary ends before "
                    f"{vocabulary}; the batch is of another model, or was made with another tokenizer."
                ]
    return []


def unknown_ids(plan: FisherKernelPlan, U: Sequence[str] | None, of_requests: Sequence[list[str] | None]) -> list[str]:
    """Say which ids of a plan no sequence has, one line each.

    Args:
        plan: the plan.
        U: ids of the update batch; None where they are not known yet, as any of the requests'.
        of_requests: ids of each request.
    """
    lines = []
    for i, (request, E) in enumerate(zip(plan.requests, of_requests, strict=True)):
        place = f"requests.{i}"
        lines += _unmatched(f"{place}.sequence_ids", request.sequence_ids or (), E, "this request")
        if isinstance(request.advantages, dict):
            lines += _unmatched(f"{place}.advantages", request.advantages, U, "U")
        kept = _kept(E, request.sequence_ids)
        if request.capture is not None:
            lines += _of_capture(f"{place}.capture", request.capture, kept, U)
        if request.analyses is not None:
            lines += _of_analyses(f"{place}.analyses", request.analyses, kept, U)
    every = None if None in of_requests else [name for ids in of_requests for name in ids or ()]
    lines += _of_capture("capture", plan.capture, every, U)
    return lines + _of_analyses("analyses", plan.analyses, None, U)


def _of_capture(place: str, capture: Any, E: Sequence[str] | None, U: Sequence[str] | None) -> list[str]:
    lines = _unmatched(f"{place}.pairs", [row for row, _ in capture.pairs], E, "the request")
    lines += _unmatched(f"{place}.pairs", [column for _, column in capture.pairs], U, "U")
    for j, block in enumerate(capture.submatrices):
        lines += _unmatched(f"{place}.submatrices.{j}.columns", block.columns, U, "U")
    return lines


def _of_analyses(place: str, analyses: Any, E: Sequence[str] | None, U: Sequence[str] | None) -> list[str]:
    lines = []
    for each in analyses.counterfactuals:
        here = f"{place}.counterfactuals.{each.name}"
        if isinstance(each.advantages, dict):
            lines += _unmatched(f"{here}.advantages", each.advantages, U, "U")
        for key in ("drop", "flip", "scale"):
            lines += _unmatched(f"{here}.{key}", getattr(each, key), U, "U")
    for each in analyses.observables:
        named = [name for pair in each.pairs or () for name in pair]
        lines += _unmatched(f"{place}.observables.{each.name}.pairs", named, E, "this request")
    return lines


def _unmatched(place: str, patterns: Iterable[str], ids: Sequence[str] | None, whose: str) -> list[str]:
    if ids is None:
        return []
    wrong = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in ids)]
    return [f"{place}: {pattern!r} names no sequence of {whose}; it has {listing([*ids])}." for pattern in wrong]


def _kept(ids: list[str] | None, patterns: Sequence[str] | None) -> list[str] | None:
    if ids is None or patterns is None:
        return ids
    return [name for name in ids if any(fnmatchcase(name, pattern) for pattern in patterns)]
