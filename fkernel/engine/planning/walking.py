"""What a walk by layers takes, counted before it is made: one layer's pass at a few lengths, without storage.

With n sequences of T tokens, hidden states of d floats, L layers of which every k-th input is kept, P parameters, p of
them in the largest layer, V tokens in the vocabulary:

    bytes     Σ_n (L/k + k + 3) T d + (n_E + 1) p + the largest layer's pass + tiles of the head and of the contraction
    flops     per sequence L · (forward + forward and backward), once more forward where k > 1, and 8 T V d in the head
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import torch

from fkernel.engine.planning.curve import Curve
from fkernel.engine.planning.machine import Rates
from fkernel.func.head import LOGITS_BYTES
from fkernel.func.layers import Cut, before, constants_of, layer
from fkernel.func.source import plain
from fkernel.func.work import Work, work_of
from fkernel.shapes import Tensor, Tree

HOLES = 1.3
"""Memory that a layer's pass takes, over what is alive in it at once."""


class Walk(NamedTuple):
    """One sequence's walk, by its tokens.

    Attributes:
        width: d.
        depth: L.
        largest: parameters of the largest layer that are differentiated.
        head: V d.
        forward: a pass through all layers, without a graph.
        backward: a pass through all layers and back, each by itself.
        peak: bytes alive in the largest layer's pass, at most.
        blocks: whether sequences of a block can be told apart.
    """

    width: int
    depth: int
    largest: int
    head: int
    forward: Curve
    backward: Curve
    peak: Curve
    blocks: bool

    def memory(self, tokens: dict[str, list[int]], itemsize: int, every: int, block: int) -> int:
        """Predict the bytes that a walk of two sides takes, sequences by themselves or in blocks of so many tokens."""
        kept = self.depth / every + (every if every > 1 else 0) + 4
        states = kept * self.width * itemsize * (sum(tokens["E"]) + sum(tokens["U"]))
        T = max(tokens["E"][0], tokens["U"][0])
        m = max(1, block // T)
        layers = (len(tokens["E"]) + m) * self.largest * itemsize
        logits = min(LOGITS_BYTES, m * T * itemsize * (self.head // self.width))
        return int(states + layers + HOLES * m * self.peak(T).peak + 3 * logits)

    def seconds(
        self,
        tokens: dict[str, list[int]],
        size: int,
        itemsize: int,
        rates: Rates,
        every: int,
        block: int,
    ) -> float:
        """Predict the seconds."""
        total = 0.0
        for t in (*tokens["E"], *tokens["U"]):
            total += rates.seconds(self.backward(t)) + (2 if every > 1 else 1) * rates.seconds(self.forward(t))
            total += 8.0 * t * self.head / rates.flops
        n_E, n_U = len(tokens["E"]), len(tokens["U"])
        m = max(1, block // max(tokens["E"][0], tokens["U"][0]))
        if block:  # a block's gradients are formed of factors
            total += 2.0 * (sum(tokens["E"]) * ceil(n_U / m) + sum(tokens["U"])) * size / rates.forming
        # E's gradients pass through the processor once for every block of U.
        return total + n_E * size * itemsize * ceil(n_U / m) / rates.moved


def walk_of(cut: Cut, params: Tree, tokens: dict[str, list[int]]) -> Walk:
    """Count one layer of each kind, on a sequence of the greatest length and, of ragged sides, on two shorter ones."""
    T = max(tokens["E"][0], tokens["U"][0])
    lengths = [T] if len({*tokens["E"], *tokens["U"]}) == 1 else [T, max(2, T // 2), max(2, T // 4)]
    counted = {t: _counted(cut, params, t) for t in sorted({*lengths}, reverse=True)}
    forward, backward, peak = (Curve(tuple((t, each[k]) for t, each in counted.items())) for k in range(3))
    sizes = [sum(params[name].numel() for name in names) for names in cut.names]
    table = cut.head.weight
    return Walk(
        table.shape[1], len(cut.layers), max(sizes, default=0), table.numel(), forward, backward, peak, all(cut.plans)
    )


def _counted(cut: Cut, params: Tree, t: int) -> tuple[Work, Work, Work]:
    """Work of all layers forward, of all forward and backward, and of the one whose pass is largest."""
    source = plain(params)
    ids = torch.zeros(1, t, dtype=torch.int64, device=next(iter(params.values())).device)
    outer = {**constants_of(cut, None), **source(name for name in cut.before if name not in cut.tables)}
    with torch.no_grad():
        h, calls, _ = before(cut, source, outer, ids, torch.ones_like(ids))
    known: dict[Any, tuple[Work, Work]] = {}
    each = []
    for i, call in enumerate(calls):
        kind = type(cut.layers[i]), tuple((local, params[name].shape) for name, local in cut.names[i].items())
        if kind not in known:
            own = {local: source.leaf(name, None) for name, local in cut.names[i].items()}

            def forward(own: Tree, h: Tensor, i: int = i, call: Any = call) -> Tensor:
                with torch.no_grad():
                    return layer(cut, i, {**constants_of(cut, i), **own}, h, call)

            def backward(own: Tree, h: Tensor, i: int = i, call: Any = call) -> Any:
                leaves = [leaf.detach().requires_grad_() for leaf in own.values()]
                x = h.detach().requires_grad_()
                with torch.enable_grad():
                    given = {**constants_of(cut, i), **dict(zip(own, leaves, strict=True))}
                    # torch's counter watches what modules are given, and takes no leaf of the graph.
                    out = layer(cut, i, given, x.view_as(x), call)
                return torch.autograd.grad(out, [x, *leaves], torch.ones_like(out), allow_unused=True)

            known[kind] = work_of(forward, own, h), work_of(backward, own, h)
        each.append(known[kind])
    return _added([a for a, _ in each]), _added([b for _, b in each]), max((b for _, b in each), key=lambda w: w.peak)


def _added(works: list[Work]) -> Work:
    flops, weights, moved, calls, peak, kept = map(sum, zip(*works, strict=True))
    return Work(flops, weights, moved, int(calls), int(peak), int(kept))
