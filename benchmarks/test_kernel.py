"""The kernel against gradients of both sides and one GEMM; influence, which needs no kernel, against its own limit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.limits import plain_backward, plain_forward
from benchmarks.models import Subject
from fkernel import func, influence, kernel, precond

T = 128
N_E, N_U = 32, 16
SHORTEST, LONGEST = 20, 250
KERNEL = ("plain backward over E and U + GEMM", "kernel")
INFLUENCE = ("plain backward over U + 3 forwards over E", "influence", "kernel @ weights")
RAGGED = ("every sequence as long as the longest", "kernel of a ragged batch")
TARGETS = {"kernel": 1.2, "influence": 1.15, "kernel of a ragged batch": 0.6}
"""As multiples of the first side of each group."""


def kernel_sides(subject: Subject, n_E: int = N_E, n_U: int = N_U, T: int = T) -> Sides:
    """K_EU with AdamW's response as P."""
    E, U, P = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), response(subject)
    X, Y = torch.randn(n_E, subject.size), torch.randn(n_U, subject.size)
    return {
        "plain backward over E and U + GEMM": lambda: (
            plain_backward(subject, E),
            plain_backward(subject, U),
            X @ Y.T,
        ),
        "kernel": lambda: kernel(subject.f, subject.params, E, U, P),
    }


def influence_sides(subject: Subject, n_E: int = N_E, n_U: int = N_U, T: int = T) -> Sides:
    """K_EU w, without K and with it."""
    E, U, P, w = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), response(subject), torch.ones(n_U)
    return {
        "plain backward over U + 3 forwards over E": lambda: (
            plain_backward(subject, U),
            [plain_forward(subject, E) for _ in range(3)],
        ),
        "influence": lambda: influence(subject.f, subject.params, E, U, P, w),
        "kernel @ weights": lambda: kernel(subject.f, subject.params, E, U, P) @ w,
    }


def ragged_sides(subject: Subject, n_E: int = N_E, n_U: int = N_U, T: int = LONGEST) -> Sides:
    """The kernel of sequences of very different lengths, and of the same with padding that counts as tokens."""
    lengths = torch.linspace(SHORTEST * T // LONGEST, T, n_E + n_U).long()
    lengths = lengths[torch.randperm(n_E + n_U, generator=torch.Generator().manual_seed(3))]
    full, P = subject.batch(n_E + n_U, T, 1), response(subject)
    real = torch.arange(T) < lengths[:, None]
    scored = real & (torch.arange(T) >= (lengths // 4).clamp(min=1)[:, None])
    # Padding as a loop without buckets has it: attended to by nothing that counts, and computed all the same.
    padded = func.Sequences(full.input_ids, full.attention_mask, scored)
    ragged = func.Sequences(full.input_ids * real, real, scored)

    def sides(batch: func.Sequences) -> tuple[func.Sequences, func.Sequences]:
        return func.Sequences(*(leaf[:n_E] for leaf in batch)), func.Sequences(*(leaf[n_E:] for leaf in batch))

    return {
        RAGGED[0]: lambda: kernel(subject.f, subject.params, *sides(padded), P, microbatch=8),
        RAGGED[1]: lambda: kernel(subject.f, subject.params, *sides(ragged), P, microbatch=8),
    }


def response(subject: Subject) -> precond.Preconditioner:
    """P_step after a batch of random gradients."""
    return precond.adamw_response(subject.adamw_state(), {**subject.vector(1, 0.1)})


@pytest.mark.parametrize("side", KERNEL)
def test_kernel(race, subject, side):
    sizes = {"n_E": N_E, "n_U": N_U, "T": T, "P": subject.size}
    race(side, f"kernel, {N_E} × {N_U}", lambda: kernel_sides(subject), TARGETS.get(side), **sizes)


@pytest.mark.parametrize("side", INFLUENCE)
def test_influence(race, subject, side):
    sizes = {"n_E": N_E, "n_U": N_U, "T": T, "P": subject.size}
    race(side, f"influence, {N_E} × {N_U}", lambda: influence_sides(subject), TARGETS.get(side), **sizes)


@pytest.mark.parametrize("side", RAGGED)
def test_ragged(race, subject, side):
    T = LONGEST
    sizes = {"n_E": N_E, "n_U": N_U, "T": f"{SHORTEST} to {T}", "P": subject.size}
    race(side, f"ragged kernel, {N_E} × {N_U}", lambda: ragged_sides(subject, T=T), TARGETS.get(side), **sizes)
