"""Two sides' gradients, one layer's at a time: what K, the step and a run's columns are contracted from.

    head ∘ after ∘ layer_L ∘ … ∘ layer_1 ∘ before:   G_E, G_U   of {after, head}, layer L, …, layer 1, {before}

E's gradients of a shard are held, all n_E of them, in storage that the next layer's overwrite; U's stream past them a
block at a time. Whoever contracts has each pair of gradients once, and drops it. A table of tokens that is the head's
too comes last, with both of its uses: it is never whole, and contracted by ranges of its rows.

Along a path, E's gradients are Σ_j q_j ∇f(e; θ + s_j Δθ): every node is a walk of its own with its own `Source`, and
what they find is added up in E's storage. Memory, with every k-th layer input of T d floats kept, P/L floats a layer:

    (n_E nodes + n_U) (L/k + k + 3) T d + (n_E + 1) P/L + what one layer needs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fkernel.func.handles import Handle, Handles, Piece, Stack, Sum, add, form, shape_of, stack, summands, tensors
from fkernel.func.layers import Cut
from fkernel.func.source import Source
from fkernel.func.walk import Walk
from fkernel.shapes import Tensor


class Side(NamedTuple):
    """One side of a contraction.

    Attributes:
        batch: n sequences as f takes them, longest first.
        nodes: (q_j, source of the parameters there); its gradients are Σ_j q_j ∇f.
        cut: the model of its f, where that is not the other side's.
    """

    batch: Any
    nodes: tuple[tuple[float, Source], ...]
    cut: Cut | None = None


class Shard(NamedTuple):
    """Both sides' gradients of some parameters, valid until the next shard is asked for.

    Attributes:
        E: {name: handle} of all of E's sequences.
        U: (which rows of U, {name: handle} of them), in U's order; to be read once, before the next shard.
    """

    E: Handles
    U: Iterator[tuple[slice, Handles]]


class Shards:
    """Iterate over shards, once: behind the layers, layer L … 1, before the layers; those with trained parameters.

    Attributes:
        values_E: f of E at each node, [nodes, n_E].
        values_U: f of U, [n_U].
    """

    def __init__(self, walks_E: list[Walk], walk_U: Walk, dense: bool) -> None:
        """Take walks that have gone forward."""
        self._walks_E, self._walk_U, self._dense = walks_E, walk_U, dense
        self.values_E, self.values_U = torch.stack([walk.values for walk in walks_E]), walk_U.values

    def __iter__(self) -> Iterator[Shard]:
        """Walk back."""
        E, U, cut = self._walks_E, self._walk_U, self._walk_U.cut
        n_U, same, room = len(self.values_U), E[0] is U, _Room(self.values_E.shape[1], self._dense)

        def whole(side_E: list[Handles], side_U: Handles) -> Iterator[Shard]:
            found = {name: _added([handles[name] for handles in side_E]) for name in side_E[0]}
            if found:
                yield Shard(found, iter([(slice(0, n_U), side_U)]))

        last = [walk.last() for walk in E]
        yield from whole(last, last[0] if same else U.last())
        del last
        for i in range(len(cut.layers) - 1, max(cut.lowest, 0) - 1, -1):
            held = room.filled(walk.layer(i) for walk in E)
            blocks = iter([(slice(0, n_U), held)]) if same else U.layer(i)
            if held:
                yield Shard(held, blocks)
            for _ in blocks:  # what nobody read has to be walked all the same
                pass
        if cut.lowest < 0:
            first = [walk.first() for walk in E]
            yield from whole(first, first[0] if same else U.first())


def shards(cut: Cut, E: Side, U: Side, *, every: int = 1, tokens: int | None = 0, dense: bool = True) -> Shards:
    """Walk both sides back together.

    Args:
        cut: the model, from `fkernel.func.cutting.cut_of`.
        E: the side whose gradients are held.
        U: the side whose gradients stream; of one node. Where it is E itself, it is computed once.
        every: of how many layer inputs one is kept; the others are computed again, which costs another forward pass.
        tokens: of a block of sequences, at most; 0: every sequence by itself. None: all at once.
        dense: whether E's gradients are written out, all of them. Factors take less memory where sequences are short,
            and are formed again for every block of U; with False they are kept where they take less than half.

    Returns:
        An iterable of `Shard`s with the values of both sides. All forward passes have run by then.

    Raises:
        NonFiniteError: a value is not finite; the row counts in the side's order.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from fkernel import func
        >>> from fkernel.func.cutting import cut_of
        >>> from fkernel.func.source import plain
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 1}
        >>> apply, params = func.make_functional(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
        >>> S, batch = func.sequence_logprob(apply), func.pad([[1, 2], [3]], [[4], [5]])
        >>> side = Side(batch, ((1.0, plain(params)),))
        >>> [len(shard.E) for shard in shards(cut_of(S, params, batch), side, side)]  # ln_f; two layers; wte and wpe
        [2, 12, 12, 2]
    """
    calls: dict[Any, Any] = {}

    def walk(side: Side, q: float, source: Source) -> Walk:
        return Walk(side.cut or cut, source, side.batch, weight=q, every=every, tokens=tokens, calls=calls)

    walks_E = [walk(E, q, source) for q, source in E.nodes]
    ((q, source),) = U.nodes
    once = E.batch is U.batch and len(E.nodes) == 1 and E.nodes[0][0] == q and E.nodes[0][1] is source
    return Shards(walks_E, walks_E[0] if once else walk(U, q, source), dense)


def _added(handles: list[Handle]) -> Handle:
    """Add handles of the same sequences up: those of a path's nodes."""
    if len(handles) == 1:
        return handles[0]
    each = [handle.parts if isinstance(handle, Stack) else (handle,) for handle in handles]
    sums = [Sum(tuple(one for part in parts for one in summands(part))) for parts in zip(*each, strict=True)]
    return sums[0] if len(sums) == 1 else Stack(tuple(sums))


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
                    (add if j else form)(handle, written[name][rows])
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
