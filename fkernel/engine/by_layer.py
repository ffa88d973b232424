"""Two sides' gradients, one layer's at a time: what K, the step and a run's columns are contracted from.

    head ∘ after ∘ layer_L ∘ … ∘ layer_1 ∘ before:   G_E, G_U   of {after, head}, layer L, …, layer 1, {before}

One side's gradients of a shard are held, all of them, in storage that the next layer's overwrite; the other's stream
past them a block at a time. Whoever contracts has each pair of gradients once, and drops it. A table of tokens that is
the head's too comes last, with both of its uses: it is never whole, and contracted by ranges of its rows.

Along a path, a side's gradients are Σ_j q_j ∇f(θ + s_j Δθ): every node is a walk of its own with its own `Source`, and
what they find is added up, in the storage of what is held, or as a sum of handles. Memory, of n_h held sequences, with
every k-th layer input of T d floats kept, P/L floats a layer:

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
    """One side of a contraction.

    Attributes:
        batch: n sequences as f takes them, longest first.
        nodes: (q_j, source of the parameters there); its gradients are Σ_j q_j ∇f.
        cut: the model of its f, where that is not the one that `shards` is given.
    """

    batch: Any
    nodes: tuple[tuple[float, Source], ...]
    cut: Cut | None = None


class Shard(NamedTuple):
    """Both sides' gradients of some parameters, valid until the next shard is asked for.

    Attributes:
        held: {name: handle} of all of one side's sequences.
        streamed: (which rows of the other side, {name: handle} of them), in its order; to be read once, before the
            next shard.
    """

    held: Handles
    streamed: Iterator[tuple[slice, Handles]]


class Shards:
    """Iterate over shards, once: behind the layers, layer L … 1, before the layers; those with trained parameters.

    Attributes:
        values_held: f of the held side at each of its nodes, [nodes, n] float64.
        values_streamed: f of the other side, the same.
    """

    def __init__(self, held: list[Walk], streamed: list[Walk], dense: bool) -> None:
        """Take walks that have gone forward, one a node."""
        self._held, self._streamed, self._dense = held, streamed, dense
        self.values_held, self.values_streamed = (
            torch.stack([walk.values for walk in walks]) for walks in (held, streamed)
        )

    def __iter__(self) -> Iterator[Shard]:
        """Walk back."""
        held, streamed, cut = self._held, self._streamed, self._streamed[0].cut
        same, room = held is streamed, _Room(self.values_held.shape[1], self._dense)
        everything = slice(0, self.values_streamed.shape[1])

        def outside_layers(left: list[Handles], right: list[Handles]) -> Iterator[Shard]:
            if left[0]:
                gradients = _summed(left)
                yield Shard(gradients, iter([(everything, gradients if same else _summed(right))]))

        last = [walk.last() for walk in held]
        yield from outside_layers(last, last if same else [walk.last() for walk in streamed])
        del last
        for i in range(len(cut.layers) - 1, max(cut.lowest, 0) - 1, -1):
            gradients = room.filled(walk.layer(i) for walk in held)
            blocks = iter([(everything, gradients)]) if same else _together([walk.layer(i) for walk in streamed])
            if gradients:
                yield Shard(gradients, blocks)
            for _ in blocks:  # what nobody read has to be walked all the same
                pass
        if cut.lowest < 0:
            first = [walk.first() for walk in held]
            yield from outside_layers(first, first if same else [walk.first() for walk in streamed])


def shards(
    cut: Cut, held: Side, streamed: Side, *, every: int = 1, tokens: int | None = 0, dense: bool = True
) -> Shards:
    """Walk both sides back together.

    Args:
        cut: the model, from `fkernel.func.layers.cutting.cut_of`.
        held: the side whose gradients are held.
        streamed: the side whose gradients stream; where it is the held side itself, it is computed once.
        every: of how many layer inputs one is kept; the others are computed again, which costs another forward pass.
        tokens: of a block of sequences, at most; 0: every sequence by itself. None: all at once.
        dense: whether held gradients are written out, all of them. Factors take less memory where sequences are short,
            and are formed again for every block that streams; with False they are kept where they take less than half.

    Returns:
        An iterable of `Shard`s with the values of both sides. All forward passes have run by then.

    Raises:
        NonFiniteError: a value is not finite; the row counts in the side's order.

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
    """Walk a side's nodes in step, block by block, and add each block's gradients up."""
    if len(walks) == 1:
        yield from walks[0]
        return
    for blocks in zip(*walks, strict=True):
        yield blocks[0][0], _summed([handles for _, handles in blocks])
        del blocks  # or they would be alive while the next are made


def _summed(nodes: list[Handles]) -> Handles:
    """Add up gradients of the same sequences at a path's nodes."""
    return {name: _added([handles[name] for handles in nodes]) for name in nodes[0]}


def _added(handles: list[Handle]) -> Handle:
    """Add handles of the same sequences up: those of a path's nodes."""
    if len(handles) == 1:
        return handles[0]
    each = [handle.parts if isinstance(handle, Concat) else (handle,) for handle in handles]
    sums = [Sum(tuple(one for part in parts for one in summands(part))) for parts in zip(*each, strict=True)]
    return sums[0] if len(sums) == 1 else Concat(tuple(sums))


def _is_small(handle: Piece) -> bool:
    """Tell whether a handle stores less than half of what its gradients would take."""
    own = sum(leaf[0].numel() for leaf in tensors(handle))
    return not isinstance(handle, Tensor) and 2 * own < math.prod(shape_of(handle))


class _Room:
    """Storage for one layer's gradients of n sequences, which layers of the same shapes share."""

    def __init__(self, n: int, dense: bool) -> None:
        self.n, self.dense, self.storage = n, dense, dict[tuple[Any, ...], list[Tensor]]()

    def filled(self, walks: Iterable[Iterator[tuple[slice, Mapping[str, Piece]]]]) -> dict[str, Handle]:
        """Write out a layer's gradients, those of several walks added up; what is small in factors may stay so.

        Blocks come longest first, so that what is small in the first block is small in all.
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
                handles = handle = None  # or they would be alive while the next are made
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
