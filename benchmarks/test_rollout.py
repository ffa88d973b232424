"""Sampling and teacher forcing of a ragged batch: neighbours in length together, against the order as they came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.models import Subject
from fkernel import func
from fkernel.func.inputs.batch import trim
from fkernel.rollout import Sampling, score
from fkernel.rollout.sampling import draw
from fkernel.rollout.scoring import statistics_of

N, MICROBATCH = 48, 8
SHORTEST, LONGEST, NEW = 20, 250, 16
SCORING = ("microbatches as they come", "score")
DRAWING = ("microbatches as they come", "draw")
TOKENIZER: Any = SimpleNamespace(eos_token_id=0, pad_token_id=0)


def ragged(longest: int) -> list[int]:
    """Lengths between the shortest and the longest, in an order that says nothing."""
    lengths = torch.linspace(max(2, SHORTEST * longest // LONGEST), longest, N).long()
    return lengths[torch.randperm(N, generator=torch.Generator().manual_seed(3))].tolist()


def scoring_sides(subject: Subject, longest: int) -> Sides:
    """log π, log q and entropy of every response token."""
    ids = subject.batch(N, longest).input_ids.tolist()
    lengths, sampling = ragged(longest), Sampling(top_p=0.9)
    responses = [row[1:length] for row, length in zip(ids, lengths, strict=True)]
    batch = func.pad([row[:1] for row in ids], responses)
    model = subject.apply.module
    parts = [trim(func.Sequences(*(leaf[i : i + MICROBATCH] for leaf in batch))) for i in range(0, N, MICROBATCH)]
    without_graph = torch.no_grad()
    return {
        SCORING[0]: without_graph(lambda: [statistics_of(subject.apply, subject.params, x, sampling) for x in parts]),
        SCORING[1]: lambda: score(model, batch, sampling, MICROBATCH),
    }


def drawing_sides(subject: Subject, longest: int) -> Sides:
    """A few tokens behind prompts of very different lengths; both sides draw with the same seeds."""
    ids = subject.batch(N, longest).input_ids.tolist()
    prompts = [row[:length] for row, length in zip(ids, ragged(longest), strict=True)]
    model, seeds, sampling = subject.apply.module, [*range(N)], Sampling(max_new_tokens=NEW)

    def as_they_come() -> None:
        for i in range(0, N, MICROBATCH):
            rows = slice(i, i + MICROBATCH)
            draw(model, TOKENIZER, prompts[rows], seeds[rows], sampling, MICROBATCH)

    return {DRAWING[0]: as_they_come, DRAWING[1]: lambda: draw(model, TOKENIZER, prompts, seeds, sampling, MICROBATCH)}


@pytest.mark.parametrize("side", SCORING)
def test_teacher_forcing(race, subject, quick, side):
    longest = 32 if quick else LONGEST
    sizes = {"n": N, "T": f"{min(ragged(longest))} to {longest}", "tokens": sum(ragged(longest)) - N, "P": subject.size}
    race(side, "teacher forcing, ragged", lambda: scoring_sides(subject, longest), **sizes)


@pytest.mark.parametrize("side", DRAWING)
def test_sampling(race, subject, quick, side):
    longest = 32 if quick else LONGEST
    sizes = {"n": N, "prompts": f"{min(ragged(longest))} to {longest}", "tokens": N * NEW, "P": subject.size}
    race(side, "sampling, ragged prompts", lambda: drawing_sides(subject, longest), **sizes)
