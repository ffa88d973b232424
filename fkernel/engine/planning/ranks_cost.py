"""What a step explained on W ranks costs each of them, layer by layer, from counted work: a prediction, not a run.

With n sequences in all, P parameters of b bytes, p of them in the largest layer or table, T tokens, d floats a token, L
layers, and collectives in buckets of B bytes, or of one sequence's gradients of a layer or table where those are more:

    flops        (n passes + 2 n_E n_U P)/W
    sent         rows n P b (W − 1)/W²,  Jᵀw 2 P b (W − 1)/W and Δθ P b (W − 1)/W,  K 16 n_E n_U (W − 1)/W
    memory       θ P b,  Jᵀw, Δθ and the path's node 3 P b,  moments, D and the step's parts 6 P b/W
                 held rows of a layer h p b/W, with h = n_E sequences, and own ones of a layer in whole h p b/W
                 what collectives copy 3 B
                 layer inputs (n/W) (L + 3) T d b,  the largest layer's pass

Jᵀw is let go before Δθ is there, but the allocator takes little of what it leaves again (measured on CPUs,
`benchmarks/results/ranks.json`), so that all three count.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from fkernel.distributed import BUCKET
from fkernel.engine.planning.workloads import Workload
from fkernel.errors import ModelError


class Gpu(NamedTuple):
    """What a GPU is taken to sustain.

    Attributes:
        memory: bytes.
        flops: of float32 matrix products, without TF32, a second.
        wire: bytes that it sends a second.
    """

    memory: float
    flops: float
    wire: float


GPUS = {
    "a100": Gpu(80e9, 15e12, 20e9),
    "h100": Gpu(80e9, 50e12, 40e9),
    "h200": Gpu(141e9, 50e12, 40e9),
}
"""Assumptions: about three quarters of what their maker says, and one network adapter a GPU."""


WHOLE = "whole vectors of the step"
"""What is of θ's size on every rank: Jᵀw, Δθ and the path's node."""


CERTIFICATES = 19.0
"""How often θ in shards is gathered for certificates, whatever the batches' sizes: 13 for the derivative along the
step, 6 for the cut's pieces against the whole, which is certified once for a function (counted)."""


class RanksCost(NamedTuple):
    """Each rank's cost.

    Attributes:
        ranks: W.
        flops: floating-point operations.
        sent: bytes on the wire, by what they are.
        memory: bytes, by what holds them.
    """

    ranks: int
    flops: float
    sent: dict[str, float]
    memory: dict[str, float]

    def seconds(self, gpu: Gpu) -> float:
        """Predict the time, computing and sending one after the other."""
        return self.flops / gpu.flops + sum(self.sent.values()) / gpu.wire


def cost_in_shards(load: Workload, ranks: int) -> RanksCost:
    """Predict the same where θ is in shards too.

        memory    θ P b/W;  moments, D, g and the step's parts 7 P b/W;  a piece of θ, its copy, and a node's, 4 p b
        sent      Jᵀw P b (W − 1)/W;  θ for each of three walks, and for a sequence that tells which parameters the loss
                  uses, forward and back 8 P b (W − 1)/W;  certificates 19 P b (W − 1)/W

    Raises:
        ModelError: as `cost_on_ranks`.
    """
    cost, b = cost_on_ranks(load, ranks), load.itemsize
    walk, P = load.walk, load.size
    assert not isinstance(walk, str)
    away, piece = (ranks - 1) / ranks, max(walk.largest, walk.head) * b
    shards = {"parameters, in shards": P * b / ranks, "state, in shards": 7.0 * P * b / ranks, "gathered": 4.0 * piece}
    others = {what: each for what, each in cost.memory.items() if what not in ("parameters", WHOLE, *shards)}
    return cost._replace(
        sent={**cost.sent, "vectors": 9.0 * P * b * away, "certificates": CERTIFICATES * P * b * away},
        memory={**shards, **others},
    )


def cost_on_ranks(load: Workload, ranks: int) -> RanksCost:
    """Predict what an explained step costs each of `ranks`.

    Raises:
        ModelError: the model cannot be computed layer by layer, or there is no rank.
    """
    walk = load.walk
    if isinstance(walk, str):
        raise ModelError(f"a step on several ranks is estimated layer by layer, and the model cannot be: {walk}.")
    if ranks < 1:
        raise ModelError(f"--processes is {ranks}; expected at least 1.")
    b, P, counts = load.itemsize, load.size, load.tokens
    n_E, n_U = len(counts["E"]), len(counts["U"])
    each = [t for own in counts.values() for t in own]
    passes = sum(walk.forward(t).flops + walk.backward(t).flops + 8.0 * t * walk.head for t in each)
    passes += sum(walk.forward(t).flops + walk.backward(t).flops + 8.0 * t * walk.head for t in counts["U"])  # for g
    away = (ranks - 1) / ranks
    piece = max(walk.largest, walk.head) * b
    inputs = sum(each) / ranks * (walk.depth + 3) * walk.width * b
    return RanksCost(
        ranks,
        (passes + 2.0 * n_E * n_U * P) / ranks,
        {"rows": len(each) * P * b * away / ranks, "vectors": 3.0 * P * b * away, "K": 16.0 * n_E * n_U * away},
        {
            "parameters": P * b,
            WHOLE: 3.0 * P * b,
            "state, in shards": 6.0 * P * b / ranks,
            "held rows, in shards": n_E * piece / ranks,
            "own rows of a layer": float(ceil(n_E / ranks) * walk.largest * b),
            "exchange": 3.0 * max(piece, min(BUCKET, P * b)) if ranks > 1 else 0.0,
            "layer inputs": inputs,
            "a layer's pass": float(walk.peak(load.longest).peak),
        },
    )
