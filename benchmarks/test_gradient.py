"""Derivatives against plain passes of torch's: how much does it cost to know every sequence's gradient?"""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.limits import MICROBATCH, loop_of_grads, plain_backward, plain_forward
from benchmarks.models import Subject
from fkernel import func

ROWS = ("plain batched backward", "per_sequence_grad", "loop of autograd.grad")
REVERSE = ("plain batched backward", "vjp")
FORWARD = ("plain forward", "jvp", "curvature")
TARGET = 1.5
"""per_sequence_grad, as a multiple of one plain batched backward, from T = 64 on."""


def row_sides(subject: Subject, T: int, n: int = MICROBATCH) -> Sides:
    """J of n sequences, one microbatch of them."""
    batch = subject.batch(n, T)
    J = func.per_sequence_grad(subject.f, MICROBATCH)
    return {
        "plain batched backward": lambda: plain_backward(subject, batch),
        "per_sequence_grad": lambda: J(subject.params, batch),
        "loop of autograd.grad": lambda: loop_of_grads(subject, batch),
    }


def reverse_sides(subject: Subject, T: int, n: int = MICROBATCH) -> Sides:
    """Jᵀ1."""
    batch = subject.batch(n, T)
    vjp = func.vjp(subject.f, MICROBATCH)
    return {
        "plain batched backward": lambda: plain_backward(subject, batch),
        "vjp": lambda: vjp(subject.params, batch, torch.ones(n)),
    }


def forward_sides(subject: Subject, T: int, n: int = MICROBATCH) -> Sides:
    """Jv and vᵀHv beside f itself."""
    batch, v = subject.batch(n, T), subject.vector(1, 1e-3)
    jvp, curvature = func.jvp(subject.f, MICROBATCH), func.curvature(subject.f, MICROBATCH)
    return {
        "plain forward": lambda: plain_forward(subject, batch),
        "jvp": lambda: jvp(subject.params, batch, v),
        "curvature": lambda: curvature(subject.params, batch, v),
    }


@pytest.mark.parametrize("side", ROWS)
@pytest.mark.parametrize("T", [64, 128, 256])
def test_per_sequence_grad(race, subject, T, side):
    target = TARGET if side == "per_sequence_grad" else None
    race(side, f"per_sequence_grad, T={T}", lambda: row_sides(subject, T), target, n=MICROBATCH, T=T, P=subject.size)


@pytest.mark.parametrize("side", REVERSE)
def test_vjp(race, subject, side):
    race(side, "vjp, T=128", lambda: reverse_sides(subject, 128), n=MICROBATCH, T=128, P=subject.size)


@pytest.mark.parametrize("side", FORWARD)
def test_forward_mode(race, subject, side):
    race(side, "jvp and curvature, T=128", lambda: forward_sides(subject, 128), n=MICROBATCH, T=128, P=subject.size)
