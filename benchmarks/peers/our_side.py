"""This library's side of the same K: the same checkpoint, the same sequences, the same parameters, one thread.

Beside it the limit is timed: one plain batched backward pass over E and U and the ideal GEMM, with nothing kept per
sequence. What a peer's time leaves above the limit is all that could be gained on it.

Run by `benchmarks.peers.against_bergson` as `python -m benchmarks.peers.our_side FOLDER NAME …`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fkernel
from benchmarks.limits import plain_backward
from benchmarks.models import Subject
from benchmarks.peers.case import Written, read
from benchmarks.peers.turns import Answer, serve, timed
from fkernel import func, precond
from fkernel.func import Sequences
from fkernel.shapes import Tree

EPS = 1e-8
"""ε that bergson's AdamNormalizer adds to √v, whatever the optimizer's own is."""
TOKENS = 2048
"""Tokens of a microbatch of the limit; bergson's default too."""
COLUMNS = 2**16
"""Columns of a GEMM's operands, which stay in the cache: nothing about the limit should depend on memory."""


class Ours(NamedTuple):
    """A folder's content as the library takes it.

    Attributes:
        subject: the model, the parameters that K is over, and S.
        E: the evaluation sequences.
        U: the update sequences.
        exp_avg_sq: {name: [*shape]}, v of those parameters.
    """

    subject: Subject
    E: Sequences
    U: Sequences
    exp_avg_sq: Tree

    def kernel(self) -> Tensor:
        """K under the very diagonal that bergson divides by: 1/(√v + ε), without Adam's bias correction."""
        P = precond.diagonal({name: 1 / (v.sqrt() + EPS) for name, v in self.exp_avg_sq.items()})
        return fkernel.kernel(self.subject.f, self.subject.params, self.E, self.U, P)

    def limit(self) -> None:
        """Do the work that no method can avoid: ΣJ of either batch, and a GEMM of K's size, a tile at a time."""
        for batch in (self.E, self.U):
            plain_backward(self.subject, batch, max(1, TOKENS // batch.input_ids.shape[1]))
        x, y = (torch.ones(len(batch.input_ids), COLUMNS) for batch in (self.E, self.U))
        for _ in range(-(-self.subject.size // COLUMNS)):
            torch.mm(x, y.T)

    def once(self) -> Answer:
        """Compute K, the diagonal included, and the limit, and say how long each took."""
        cpu, K = timed(self.kernel)
        limit, _ = timed(self.limit)
        return {"cpu": cpu.total, "user": cpu.user, "K": K.tolist(), "limit": limit.total}


def load(folder: Path, select: Sequence[str] | None = None) -> Ours:
    """Read a folder, for K over some parameters, or over all of them.

    Args:
        folder: as `benchmarks.peers.case.write` leaves it.
        select: parameter names; None takes all.
    """
    model, given = read(folder)
    apply, params = func.make_functional(model, select=select)
    subject = Subject("Llama", apply, params, func.sequence_logprob(apply), model.config.vocab_size)
    E, U = (sequences(ids, given) for ids in (given.E, given.U))
    return Ours(subject, E, U, {name: given.exp_avg_sq[name] for name in params})


def sequences(ids: Tensor, given: Written) -> Sequences:
    """A batch without padding, whose prompts are not scored."""
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, : given.prompt] = False
    return Sequences(ids, torch.ones_like(scored), scored)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with fkernel.reuse_memory():
        serve(lambda: load(Path(sys.argv[1]), sys.argv[2:]).once)
