"""Gradients of two batches, one layer at a time, for contractions that never hold a whole gradient.

    head ∘ after ∘ layer_L ∘ … ∘ layer_1 ∘ before:   G_E, G_U   of {after, head}, layer L, …, layer 1, {before}

One batch's gradients of a shard are all held, in storage that the next layer reuses; the other batch's stream past
them a block at a time. Each pair of gradients is yielded once. A token embedding that is tied to the head comes last,
with the gradients of both uses: it is never written out whole, but contracted by ranges of its rows.

Along a path, gradients are Σ_j q_j ∇f(θ + s_j Δθ): every node is a `Walk` with its own `Source`, and their gradients
are added up in the storage of the held batch, or as a sum of handles. Memory, of n_h held sequences, with every k-th
layer input of T d floats kept, P/L floats a layer:

    (n_h nodes + n_s nodes) (L/k + k + 3) T d + (n_h + 1) P/L + what one layer needs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fkernel.func.handles import (
    Concat,
    Handle,
    Handles,
    Piece,
    Sum,
    add,
    materialize_into,
    shape_of,
    stack,
    summands,
    tensors,
)
from fkernel.func.inputs import Source
from fkernel.func.layers import Cut, Walk
from fkernel.shapes import Tensor


class Side(NamedTuple):
    """One batch of a contraction.

    Attributes:
        batch: n sequences as f takes them, longest first.
        nodes: (q_j, source of θ_j); the gradients are Σ_j q_j ∇f(θ_j).
        cut: the model of its f; None for the one that `shards` is given.
    """

    batch: Any
    nodes: tuple[tuple[float, Source], ...]
    cut: Cut | None = None


class Shard(NamedTuple):
    """Gradients of both batches for some parameters, valid until the next shard is yielded.

    Attributes:
        held: {name: handle} of all sequences of one batch.
        streamed: (rows of the other batch, {name: handle} of them), in its order; to be read once, before the next
            shard.
    """

    held: Handles
    streamed: Iterator[tuple[slice, Handles]]


class Shards:
    """Iterate once over shards with trained parameters: after the layers, layer L … 1, before the layers.

    Attributes:
        values_held: f of the held batch at each of its nodes, [nodes, n] float64.
        values_streamed: f of the other batch, likewise.
    """

    def __init__(self, held: list[Walk], streamed: list[Walk], dense: bool) -> None:
        """Take walks whose forward passes have run, one a node."""
        self._held, self._streamed, self._dense = held, streamed, dense
        self.values_held, self.values_streamed = (
            torch.stack([walk.values for walk in walks]) for walks in (held, streamed)
        )

    def __iter__(self) -> Iterator[Shard]:
        """Walk back."""
        held, streamed, cut = self._held, self._streamed, self._streamed[0].cut
        same, everything = held is streamed, slice(0, self.values_streamed.shape[1])

        def outside_layers(left: list[Handles], right: list[Handles]) -> Iterator[Shard]:
            if left[0]:
                gradients = _summed(left)
                yield Shard(gradients, iter([(everything, gradients if same else _summed(right))]))

        last = [walk.last() for walk in held]
        yield from outside_layers(last, last if same else [walk.last() for walk in streamed])
        del last
        yield from self._layers(everything)  # its storage is free before the first lookups' gradients are made
        if cut.lowest < 0:
            first = [walk.first() for walk in held]
            yield from outside_layers(first, first if same else [walk.first() for walk in streamed])

    def _layers(self, everything: slice) -> Iterator[Shard]:
        held, streamed, cut = self._held, self._streamed, self._streamed[0].cut
        same, room = held is streamed, _Room(self.values_held.shape[1], self._dense)
        for i in range(len(cut.layers) - 1, max(cut.lowest, 0) - 1, -1):
            gradients = room.filled(walk.layer(i) for walk in held)
            blocks = iter([(everything, gradients)]) if same else _together([walk.layer(i) for walk in streamed])
            if gradients:
                yield Shard(gradients, blocks)
            for _ in blocks:  # the walk must run even where the caller did not read it
                pass


def shards(
    cut: Cut, held: Side, streamed: Side, *, every: int = 1, tokens: int | None = 0, dense: bool = True
) -> Shards:
    """Run the backward passes of both batches together, layer by layer.

    Args:
        cut: the model, from `fkernel.func.layers.cutting.cut_of`.
        held: the batch whose gradients are held.
        streamed: the batch whose gradients stream; computed once where it equals `held`.
        every: one in so many layer inputs is kept; the others are recomputed, which costs another forward pass.
        tokens: of a block of sequences, at most; 0: one sequence at a time. None: all at once.
        dense: whether all held gradients are written out. Factors take less memory where sequences are short, but are
            multiplied out for every streamed block; with False they are kept where they take less than half.

    Returns:
        An iterable of `Shard`s with the values of both sides. All forward passes have run by then.

    Raises:
        NonFiniteError: a value is not finite; the row counts in the sorted order.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from fkernel import func
        >>> from fkernel.func.layers.cutting import cut_of
        >>> from fkernel.func.inputs.source import plain
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 1}
        >>> apply, params = func.make_functional(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
        >>> S, batch = func.sequence_logprob(apply), func.pad([[1, 2], [3]], [[4], [5]])
        >>> side = Side(batch, ((1.0, plain(params)),))
        >>> [len(shard.held) for shard in shards(cut_of(S, params, batch), side, side)]  # ln_f; two layers; wte and wpe
        [2, 12, 12, 2]
    """
    calls: dict[Any, Any] = {}

    def walks(side: Side) -> list[Walk]:
        options: Any = {"every": every, "tokens": tokens, "calls": calls}
        return [Walk(side.cut or cut, source, side.batch, weight=q, **options) for q, source in side.nodes]

    first = walks(held)
    once = held.batch is streamed.batch and held.nodes == streamed.nodes and held.cut is streamed.cut
    return Shards(first, first if once else walks(streamed), dense)


def _together(walks: list[Iterator[tuple[slice, Handles]]]) -> Iterator[tuple[slice, Handles]]:
    """Iterate over the nodes' walks together, and sum each block's gradients."""
    if len(walks) == 1:
        yield from walks[0]
        return
    for blocks in zip(*walks, strict=True):
        yield blocks[0][0], _summed([handles for _, handles in blocks])
        del blocks  # frees them before the next are computed


def _summed(nodes: list[Handles]) -> Handles:
    """Add up gradients of the same sequences at a path's nodes."""
    return {name: _added([handles[name] for handles in nodes]) for name in nodes[0]}


def _added(handles: list[Handle]) -> Handle:
    """Add up handles of the same sequences."""
    if len(handles) == 1:
        return handles[0]
    each = [handle.parts if isinstance(handle, Concat) else (handle,) for handle in handles]
    sums = [Sum(tuple(one for part in parts for one in summands(part))) for parts in zip(*each, strict=True)]
    return sums[0] if len(sums) == 1 else Concat(tuple(sums))


def _is_small(handle: Piece) -> bool:
    """Return whether a handle stores less than half as many numbers as its gradients have."""
    own = sum(leaf[0].numel() for leaf in tensors(handle))
    return not isinstance(handle, Tensor) and 2 * own < math.prod(shape_of(handle))


class _Room:
    """Storage for one layer's gradients of n sequences, which layers of the same shapes share."""

    def __init__(self, n: int, dense: bool) -> None:
        self.n, self.dense, self.storage = n, dense, dict[tuple[Any, ...], list[Tensor]]()

    def filled(self, walks: Iterable[Iterator[tuple[slice, Mapping[str, Piece]]]]) -> dict[str, Handle]:
        """Write out a layer's gradients, summed over walks; factors that are small may stay factors.

        Blocks come longest first, so factors that are small in the first block are small in all.
        """
        written: dict[str, Tensor] = {}
        factors: dict[str, dict[int, list[Any]]] = {}
        taken: dict[tuple[Any, ...], int] = {}
        for j, walk in enumerate(walks):
            for rows, handles in walk:
                for name, handle in handles.items():
                    if name in factors or (not (self.dense or name in written) and _is_small(handle)):
                        factors.setdefault(name, {}).setdefault(rows.start, []).extend(summands(handle))
                        continue
                    if name not in written:
                        written[name] = self._take(handle, taken)
                    (add if j else materialize_into)(handle, written[name][rows])
                handles = handle = None  # frees them before the next are computed
        sums = {name: [Sum(tuple(parts)) for parts in blocks.values()] for name, blocks in factors.items()}
        return {**written, **{name: stack([*blocks]) for name, blocks in sums.items()}}

    def _take(self, handle: Any, taken: dict[tuple[Any, ...], int]) -> Tensor:
        like, shape = tensors(handle)[-1], shape_of(handle)
        key = shape, like.dtype, like.device
        pool = self.storage.setdefault(key, [])
        k = taken[key] = taken.get(key, -1) + 1
        if k == len(pool):
            pool.append(like.new_empty(self.n, *shape))
        return pool[k]
