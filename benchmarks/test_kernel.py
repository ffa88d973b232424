"""The kernel against gradients of both sides and one GEMM; influence, which needs no kernel, against its own limit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.limits import plain_backward, plain_forward
from benchmarks.models import Subject
from fkernel import influence, kernel, precond

T = 64
N_E, N_U = 32, 16
KERNEL = ("plain backward over E and U + GEMM", "kernel")
INFLUENCE = ("plain backward over U + 3 forwards over E", "influence", "kernel @ weights")
TARGET = 1.3
"""influence, as a multiple of its limit."""


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


def response(subject: Subject) -> precond.Preconditioner:
    """P_step after a batch of random gradients."""
    return precond.adamw_response(subject.adamw_state(), {**subject.vector(1, 0.1)})


@pytest.mark.parametrize("side", KERNEL)
def test_kernel(race, subject, side):
    race(side, f"kernel, {N_E} × {N_U}", lambda: kernel_sides(subject), n_E=N_E, n_U=N_U, T=T, P=subject.size)


@pytest.mark.parametrize("side", INFLUENCE)
def test_influence(race, subject, side):
    target = TARGET if side == "influence" else None
    race(
        side,
        f"influence, {N_E} × {N_U}",
        lambda: influence_sides(subject),
        target,
        n_E=N_E,
        n_U=N_U,
        T=T,
        P=subject.size,
    )
