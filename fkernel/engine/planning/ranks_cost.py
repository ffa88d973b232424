"""What a step explained on W ranks costs each of them, layer by layer, from counted work: a prediction, not a run.

With n sequences in all, P parameters of b bytes, p of them in a layer or table, T tokens, d floats a token, L layers,
and collectives of x bytes, the rows of as many of a rank's sequences as fit a bucket, at least of one:

    flops        (n passes + 2 n_E n_U P)/W
    sent         rows n P b (W − 1)/W²,  Jᵀw 2 P b (W − 1)/W and Δθ P b (W − 1)/W,  K 16 n_E n_U (W − 1)/W
    memory       θ and Δθ 2 P b,  moments, D and the step's parts 6 P b/W,  and what is largest of
                   the certificate     the path's node P b
                   a layer             held rows n_E p b/W, own ones in whole ⌈n_E/W⌉ p b, θ's layer p b, a pass,
                                       what is exchanged 2 x, inputs of layers (n/W) (L + 3) T d b
                   the head's table    the same without own rows, which are factors

What is of one phase is free in the next (`engine.recycling.release_memory`). What the allocator keeps between blocks is
not counted, nor what libraries take (`docs/scale.md`).
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

        memory    θ P b/W;  moments, D, Δθ and its parts 7 P b/W;  and what is largest of
                    the step            its gradient, and D twice, 2 P b/W
                    a layer             as above, gathered twice 2 p b
                    the head's table    as above, gathered for E and for U 2 p b
        sent      Jᵀw P b (W − 1)/W, and what `gathered_in_shards` says

    Raises:
        ModelError: as `cost_on_ranks`.
    """
    cost, vector = cost_on_ranks(load, ranks), load.size * load.itemsize
    shards = {"parameters, in shards": vector / ranks, "state, in shards": 7.0 * vector / ranks}
    phases = {"the step's gradient, in shards": 2.0 * vector / ranks}, *_walks(load, ranks, 2)
    step, certificates = gathered_in_shards(load)
    away = load.itemsize * (ranks - 1) / ranks
    return cost._replace(
        sent={**cost.sent, "vectors": (load.size + step) * away, "certificates": certificates * away},
        memory={**shards, **_largest(phases)},
    )


def gathered_in_shards(load: Workload) -> tuple[int, int]:
    """Count the parameters in shards that are gathered, for a step and for its certificates, whatever the batches.

    Of P parameters, with layers and the head's table l, tables that are looked up in apart, of which a walk fetches the
    rows alone; a plain pass gathers each where it is used, tables too, and a tied one twice: F = P, or P and the table:

        a walk, forward and back   2 l
        a plain pass               F forward, l back for each sequence that is taken back by itself
        the step                   three walks, and a plain pass, which tells which parameters the loss uses
        certificates, the cut      two plain passes forward, another forward and back, a walk, layers once
        along the step             a plain pass, back for each of two sequences of E;  θ and Δθ for the differences 2 l
    """
    walk = load.walk
    assert not isinstance(walk, str)
    l, few = load.size - walk.looked_up, min(2, len(load.tokens["E"]))
    forward = load.size + (walk.head if walk.tied else 0)
    cut = 3 * forward + l + 2 * l + (l - walk.head)
    return 3 * 2 * l + forward + l, cut + forward + few * l + 2 * l


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
    held = {"parameters": P * b, "Δθ": 1.0 * P * b, "state, in shards": 6.0 * P * b / ranks}
    return RanksCost(
        ranks,
        (passes + 2.0 * n_E * n_U * P) / ranks,
        {"rows": len(each) * P * b * away / ranks, "vectors": 3.0 * P * b * away, "K": 16.0 * n_E * n_U * away},
        {**held, **_largest(({"the path's node": 1.0 * P * b}, *_walks(load, ranks, 1)))},
    )


def _walks(load: Workload, ranks: int, copies: int) -> tuple[dict[str, float], dict[str, float]]:
    """Predict a rank's bytes while the largest layer is contracted, and while the head's table is."""
    walk, b, counts = load.walk, load.itemsize, load.tokens
    assert not isinstance(walk, str)
    n_E = len(counts["E"])
    inputs = sum(sum(own) for own in counts.values()) / ranks * (walk.depth + 3) * walk.width * b

    def phase(parameters: int, own: int, passing: int) -> dict[str, float]:
        each = parameters * b
        few = min(ceil(n_E / ranks), max(1, BUCKET // max(1, each)))  # of a rank's sequences, as many as fit a bucket
        return {
            "gathered" if copies > 1 else "a node's layer": 1.0 * copies * each,
            "held rows, in shards": n_E * each / ranks,
            "own rows of a layer": 1.0 * own * each,
            "exchange": 2.0 * few * each if ranks > 1 else 0.0,
            "layer inputs": inputs,
            "a layer's pass": float(passing),
        }

    layer = phase(walk.largest, ceil(n_E / ranks), walk.peak(load.longest).peak)
    return layer, phase(walk.head, 0, 0)


def _largest(phases: tuple[dict[str, float], ...]) -> dict[str, float]:
    """What takes most of phases of which none holds what another does."""
    return max(phases, key=lambda phase: sum(phase.values()))
