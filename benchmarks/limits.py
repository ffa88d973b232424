"""The limits: the same quantities without anything per sequence and without any check, as fast as torch alone is.

Nothing here calls the library, except for the forward function that both sides of a ratio share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.models import Subject
from fkernel.func import Sequences
from fkernel.shapes import Tree

MICROBATCH = 8


def plain_backward(subject: Subject, batch: Sequences, microbatch: int = MICROBATCH) -> Tree:
    """Σ_x ∇S(x): per microbatch one forward pass, one sum, one `torch.autograd.grad`."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in subject.params.items()}
    total: Tree = {}
    for chunk in chunks(batch, microbatch):
        S = subject.f.fn(leaves, chunk).sum()
        grads = dict(zip(leaves, torch.autograd.grad(S, [*leaves.values()]), strict=True))
        total = {name: total[name].add_(g) if total else g for name, g in grads.items()}
    return total


def plain_forward(subject: Subject, batch: Sequences, microbatch: int = MICROBATCH) -> Tensor:
    """S of every sequence, [n], without a graph."""
    with torch.no_grad():
        return torch.cat([subject.f.fn(subject.params, chunk) for chunk in chunks(batch, microbatch)])


def loop_of_grads(subject: Subject, batch: Sequences) -> Tree:
    """J, {name: [n, *shape]}, by one `torch.autograd.grad` a sequence: what one writes without a library."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in subject.params.items()}
    rows = [torch.autograd.grad(subject.f.fn(leaves, x).sum(), [*leaves.values()]) for x in chunks(batch, 1)]
    return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}


def concatenated(rows: Tree) -> Tensor:
    """Lay rows {name: [n, *shape]} side by side, [n, P]."""
    return torch.cat([leaf.flatten(1) for leaf in rows.values()], 1)


def chunks(batch: Sequences, size: int) -> list[Sequences]:
    """Cut a batch into microbatches."""
    return [Sequences(*parts) for parts in zip(*(leaf.split(size) for leaf in batch), strict=True)]
