"""log π of a response against the forward pass that it is read from."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.limits import MICROBATCH
from benchmarks.models import Subject
from fkernel import func

SIDES = ("bare forward", "sequence_logprob", "token_entropy")


def sides(subject: Subject, T: int, n: int = MICROBATCH) -> Sides:
    """S and H beside the logits alone."""
    batch = subject.batch(n, T)
    entropy = func.token_entropy(subject.apply)

    def without_graph(f):
        def call():
            with torch.no_grad():
                return f()

        return call

    return {
        "bare forward": without_graph(lambda: subject.apply(subject.params, batch.input_ids, batch.attention_mask)),
        "sequence_logprob": without_graph(lambda: subject.f(subject.params, batch)),
        "token_entropy": without_graph(lambda: entropy(subject.params, batch)),
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("T", [64, 256])
def test_logprob(race, subject, T, side):
    race(side, f"log π, T={T}", lambda: sides(subject, T), n=MICROBATCH, T=T, P=subject.size)
