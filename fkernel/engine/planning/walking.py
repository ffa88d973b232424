"""Cost of a layer-by-layer walk, counted without running it: one layer's pass at a few lengths.

With n sequences of T tokens, hidden states of d floats, L layers of which every k-th input is kept, P parameters, p of
them in the largest layer, V tokens in the vocabulary, h sequences of one batch held at a time and s of the other:

    bytes     Σ_{h and s} (L/k + k + 3) T d + (h + 1) p + the largest layer's pass + tiles of the head
    flops     per sequence L · (forward + forward and backward), once more forward where k > 1, and 8 T V d in the head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn

from fkernel.engine.planning.curve import Curve
from fkernel.engine.planning.machine import Rates
from fkernel.engine.planning.work import Work, count_cost
from fkernel.func.handles import LOGITS_BYTES
from fkernel.func.inputs import plain
from fkernel.func.layers import Call, Cut, before, constants_of, layer
from fkernel.shapes import Tensor, Tree

HOLES = 1.3
"""Memory of a layer's pass relative to its peak of live tensors."""


class Walk(NamedTuple):
    """Cost of one sequence's walk, by its tokens.

    Attributes:
        width: d.
        depth: L.
        largest: parameters of the largest layer that are differentiated.
        head: V d.
        forward: a pass through all layers, without a graph.
        backward: a forward and backward pass of every layer, one at a time.
        peak: peak bytes of the largest layer's pass.
        blocks: whether several sequences can be processed together with separate gradients.
        looked_up: parameters of tables that are looked up in and are not the head's.
        tied: whether the head's table is looked up in.
    """

    width: int
    depth: int
    largest: int
    head: int
    forward: Curve
    backward: Curve
    peak: Curve
    blocks: bool
    looked_up: int = 0
    tied: bool = False

    def memory(
        self,
        tokens: dict[str, list[int]],
        itemsize: int,
        every: int,
        block: int,
        held: str = "E",
        tile: int | None = None,
        streamed: int | None = None,
    ) -> int:
        """Predict the bytes of a walk over two batches.

        Args:
            tokens: {"E": tokens of each sequence, "U": …}, longest first.
            itemsize: bytes of a float.
            every: one in so many layer inputs is kept.
            block: tokens of sequences that are processed together; 0: one at a time.
            held: the batch whose gradients of a layer are held.
            tile: tokens of it that are held at a time; None for all.
            streamed: tokens of the other batch that are processed at a time; None for all.
        """
        kept = self.depth / every + (every if every > 1 else 0) + 4
        state, layer = kept * self.width * itemsize, self.largest * itemsize
        own, others = tokens[held], tokens["U" if held == "E" else "E"]
        T = max(own[0], others[0])
        m = max(1, block // T)
        holding = max(state * sum(own[rows]) + layer * len(own[rows]) for rows in tiles_of(own, tile))
        passing = max(state * sum(others[rows]) for rows in tiles_of(others, streamed))
        logits = min(LOGITS_BYTES, m * T * itemsize * (self.head // self.width))
        return int(holding + passing + m * layer + HOLES * m * self.peak(T).peak + 3 * logits)

    def seconds(
        self,
        tokens: dict[str, list[int]],
        size: int,
        itemsize: int,
        rates: Rates,
        every: int,
        block: int,
        held: str = "E",
        tile: int | None = None,
        streamed: int | None = None,
    ) -> float:
        """Predict the seconds; arguments as in `memory`, plus the model's size and the machine's rates."""
        own, others = tokens[held], tokens["U" if held == "E" else "E"]
        # Each batch is recomputed for every part of the other.
        tiles, parts = len(tiles_of(own, tile)), len(tiles_of(others, streamed))
        total = parts * _walking(self, tuple(own), rates, every) + tiles * _walking(self, tuple(others), rates, every)
        m = max(1, block // max(own[0], others[0]))
        if block:  # a block's gradients are formed of factors
            total += 2.0 * (sum(own) * ceil(len(others) / m) + tiles * sum(others)) * size / rates.forming
        # Held gradients are read once for every streamed block.
        return total + len(own) * size * itemsize * ceil(len(others) / m) / rates.moved


@lru_cache(64)
def _walking(walk: Walk, counts: tuple[int, ...], rates: Rates, every: int) -> float:
    """Predict the seconds of one batch's walk; cached, since many forms of a strategy share it."""
    each = {
        t: rates.seconds(walk.backward(t)) + (2 if every > 1 else 1) * rates.seconds(walk.forward(t)) for t in {*counts}
    }
    return sum(each[t] + 8.0 * t * walk.head / rates.flops for t in counts)


def tiles_of(tokens: Sequence[int], tile: int | None) -> list[slice]:
    """Cut a batch, longest first, into tiles of at most `tile` tokens; a longer sequence is a tile by itself.

    Example:
        >>> tiles_of([4, 3, 2, 2], 6)
        [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    if tile is None:
        return [slice(0, len(tokens))]
    tiles, start, held = list[slice](), 0, 0
    for i, t in enumerate(tokens):
        if i > start and held + t > tile:
            tiles.append(slice(start, i))
            start, held = i, 0
        held += t
    return [*tiles, slice(start, len(tokens))]


def walk_of(cut: Cut, params: Tree, tokens: dict[str, list[int]], wide: nn.Module | None = None) -> Walk:
    """Count one layer of each kind, on the greatest length and, for ragged batches, on two shorter ones.

    Args:
        cut: the model in pieces.
        params: θ.
        tokens: {"E": tokens of each sequence, "U": …}, longest first.
        wide: the model that is counted, on the meta device, where `cut` and `params` are of one of its kind with
            narrower layers: what calls the layers does not depend on their width, so that it is run on the narrow one.
    """
    T = max(tokens["E"][0], tokens["U"][0])
    lengths = [T] if len({*tokens["E"], *tokens["U"]}) == 1 else [T, max(2, T // 2), max(2, T // 4)]
    counted = {t: _counted(*_called(cut, params, t, wide)) for t in sorted({*lengths}, reverse=True)}
    forward, backward, peak = (Curve(tuple((t, each[k]) for t, each in counted.items())) for k in range(3))
    sized: Tree = params if wide is None else dict(wide.named_parameters())
    sizes = [sum(sized[name].numel() for name in names) for names in cut.names]
    table = (cut if wide is None else _widened(cut, wide)).head.weight
    looked_up = sum(sized[name].numel() for name in cut.tables if name != cut.table and name in sized)
    tied = cut.table in cut.tables
    return Walk(
        table.shape[1], len(cut.layers), max(sizes, default=0), table.numel(), forward, backward, peak, all(cut.plans),
        looked_up, tied,
    )  # fmt: skip


def _widened(cut: Cut, wide: nn.Module) -> Cut:
    """Return the same cut through a model of the same modules."""
    paths = {id(part): path for path, part in cut.module.named_modules()}
    layers = tuple(wide.get_submodule(paths[id(part)]) for part in cut.layers)
    head: Any = wide.get_submodule(paths[id(cut.head)])
    return replace(cut, module=wide, layers=layers, head=head)


def _called(cut: Cut, params: Tree, t: int, wide: nn.Module | None) -> tuple[Cut, Tree, Tensor, list[Call]]:
    """Run what comes before the layers on t tokens: the cut, its parameters, h_0, how each layer is called."""
    source = plain(params)
    ids = torch.zeros(1, t, dtype=torch.int64, device=next(iter(params.values())).device)
    outer = {**constants_of(cut, None, source), **source(name for name in cut.before if name not in cut.tables)}
    with torch.no_grad():
        h, calls, _ = before(cut, source, outer, ids, torch.ones_like(ids))
    if wide is None:
        return cut, params, h, calls
    there = _widened(cut, wide)
    return there, dict(wide.named_parameters()), h.new_empty(1, t, there.head.in_features), calls


def _counted(cut: Cut, params: Tree, h: Tensor, calls: list[Call]) -> tuple[Work, Work, Work]:
    """Count the work of all layers forward, of all forward and backward, and of the one with the largest peak."""
    source = plain(params)
    known: dict[Any, tuple[Work, Work]] = {}
    each = []
    for i, call in enumerate(calls):
        kind = type(cut.layers[i]), tuple((local, params[name].shape) for name, local in cut.names[i].items())
        if kind not in known:
            own = {cut.names[i][name]: leaf for name, leaf in source(cut.names[i]).items()}
            constants = constants_of(cut, i, source)

            def forward(own: Tree, h: Tensor, i: int = i, call: Any = call, constants: Tree = constants) -> Tensor:
                with torch.no_grad():
                    return layer(cut, i, {**constants, **own}, h, call)

            def backward(own: Tree, h: Tensor, i: int = i, call: Any = call, constants: Tree = constants) -> Any:
                leaves = [leaf.detach().requires_grad_() for leaf in own.values()]
                x = h.detach().requires_grad_()
                with torch.enable_grad():
                    given = {**constants, **dict(zip(own, leaves, strict=True))}
                    # torch's FlopCounterMode wraps module inputs, and accepts no leaf of the graph.
                    out = layer(cut, i, given, x.view_as(x), call)
                return torch.autograd.grad(out, [x, *leaves], torch.ones_like(out), allow_unused=True)

            known[kind] = count_cost(forward, own, h, place=h.device), count_cost(backward, own, h, place=h.device)
        each.append(known[kind])
    return _added([a for a, _ in each]), _added([b for _, b in each]), max((b for _, b in each), key=lambda w: w.peak)


def _added(works: list[Work]) -> Work:
    flops, weights, moved, calls, peak, kept = map(sum, zip(*works, strict=True))
    return Work(flops, weights, moved, int(calls), int(peak), int(kept))
