"""The research code's method, written anew: a sequence at a time, a dictionary of tensors each, a double loop of dots.

    g_x      one forward and one backward pass over a batch of 1, for every x of E and of U
    P g_u    elementwise, name by name
    K[e, u] = Σ_name Σ (g_e[name] · (P g_u)[name])       a Python loop over e, u and name

The mathematics is this library's (P stands on one side only, and the scores are the same function), so that K must
agree and nothing but the method is compared. Nothing here calls the library, except for the forward function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fkernel
from benchmarks.limits import chunks
from benchmarks.models import THREADS, Subject, build
from benchmarks.peers.comparison import Comparison, relative_difference
from benchmarks.ratios import interleaved
from fkernel import precond
from fkernel.func import Sequences
from fkernel.func.inputs.objective import Function
from fkernel.shapes import Tree

NAME = "research code's method"
TARGET = 0.1
"""Ours over theirs, at 64 × 128 on the demo policy's shape: ten times as fast."""


def gradients(f: Function, params: Tree, batch: Sequences) -> list[Tree]:
    """∇f of each sequence, n dictionaries {name: [*shape]}: a forward and a backward pass for each alone."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    return [
        dict(zip(leaves, torch.autograd.grad(f(leaves, x).sum(), [*leaves.values()]), strict=True))
        for x in chunks(batch, 1)
    ]


def dot(x: Tree, y: Tree) -> float:
    """⟨x, y⟩, one tensor after the other.

    Example:
        >>> dot({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.full((2,), 2.0), "b": torch.ones(1)})
        5.0
    """
    return sum(float((x[name] * y[name]).sum()) for name in x)


def kernel(f: Function, params: Tree, E: Sequences, U: Sequences, diagonal: Tree) -> Tensor:
    """K_EU by the loops above.

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}, θ.
        E: n_E sequences, the rows.
        U: n_U sequences, the columns.
        diagonal: {name: [*shape]}, of P.

    Returns:
        [n_E n_U] in the parameters' dtype.
    """
    towards_E = gradients(f, params, E)
    moves = [{name: diagonal[name] * leaf for name, leaf in g.items()} for g in gradients(f, params, U)]
    K = [[dot(g, move) for move in moves] for g in towards_E]
    return torch.tensor(K, dtype=next(iter(params.values())).dtype)


def sides(subject: Subject, n_E: int, n_U: int, T: int) -> dict[str, Any]:
    """Both methods, with AdamW's frozen diagonal as P."""
    E, U, P = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), precond.adam(subject.adamw_state())
    diagonal = P({name: torch.ones_like(leaf) for name, leaf in subject.params.items()})
    return {
        NAME: lambda: kernel(subject.f.fn, subject.params, E, U, diagonal),
        "fkernel": lambda: fkernel.kernel(subject.f, subject.params, E, U, P),
    }


def compare(shape: str, n_E: int, n_U: int, T: int, rounds: int, target: float | None = None) -> Comparison:
    """Time both methods in turns, in this process.

    Args:
        shape: of `benchmarks.models.SHAPES`.
        n_E: sequences of E.
        n_U: sequences of U.
        T: tokens of each.
        rounds: how many times each is timed.
        target: the largest ratio ours/theirs that is asked for.
    """
    subject = build(shape)
    found: dict[str, Tensor] = {}

    def keeping(name: str, side: Any) -> Any:
        return lambda: found.update({name: side()})

    torch.set_num_threads(THREADS)
    calls = {name: keeping(name, side) for name, side in sides(subject, n_E, n_U, T).items()}
    with fkernel.reuse_memory():  # both take memory that is warm
        theirs, ours = interleaved(calls, rounds).values()
    difference = relative_difference(found["fkernel"], found[NAME])
    sizes = {"shape": shape, "n_E": n_E, "n_U": n_U, "T": T, "P": subject.size, "threads": THREADS}
    return Comparison(NAME, sizes, theirs, ours, rounds, target, difference, {"clock": "wall"})
