"""One side's gradients, layer by layer from the last to the first, by reverse passes alone.

Forward without a graph, every k-th layer input kept,      h_i = layer_i(h_{i−1})
the head by tiles of its table,                            S = Σ_t ω_t log π_t,   dx = ∂S/∂x
and back: a layer runs again, alone and with a graph,      ∂S/∂θ_i, dh_{i−1} = autograd of ⟨layer_i(h_{i−1}), dh_i⟩

A sequence by itself has its own gradients in autograd's hands, at its own length. Short sequences travel in blocks,
whose rows are told apart by what went into every layer and what came back (`fkernel.func.taps.batched`). All sequences
go back one layer together, so that whoever walks holds one layer's gradients and not a model's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fkernel.func.handles.forms import Handle, Handles, Piece, SparseRows, Sum, stack
from fkernel.func.handles.head import Head, head_scores
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.microbatch import cut as cut_lengths
from fkernel.func.inputs.objective import check_values
from fkernel.func.inputs.source import Source
from fkernel.func.layers.cut import Call, Cut, Lookup, after, before, constants_of, head_rows, layer
from fkernel.func.taps.batched import pull_rows
from fkernel.shapes import Tensor, Tree


@dataclass
class Block:
    """Sequences that travel together.

    Attributes:
        rows: which of the side's.
        ids: [n t].
        mask: [n t].
        lengths: of each.
        omega: ω of position s, which predicts token s + 1, [n t−1]; 0 outside of the response.
        eta: η of the same; None where no entropy has a weight.
        calls: how each layer is called.
        kept: {i: input of layer i, [n t d]}, those that are there.
        dh: ∂S/∂h, [n t d], where the walk is.
    """

    rows: slice
    ids: Tensor
    mask: Tensor
    lengths: list[int]
    omega: Tensor
    eta: Tensor | None
    calls: list[Call] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    dh: Tensor = field(default_factory=lambda: torch.empty(0))


class Walk:
    """A side on its way back: `last()`, then `layer(i)` for i = L−1 … 0, then `first()`; each once, each to its end.

    Attributes:
        cut: the model.
        values: S, [n] float64, of log π and H in the dtype that is computed in.
        forward: runs forward a piece at a time; it has run, unless `begin` was False.
    """

    def __init__(
        self,
        cut: Cut,
        source: Source,
        batch: Any,
        *,
        weight: float = 1.0,
        every: int = 1,
        tokens: int | None = 0,
        calls: dict[Any, list[Call]] | None = None,
        begin: bool = True,
    ) -> None:
        """Run forward, and through the head.

        Args:
            cut: the model.
            source: of its parameters.
            batch: n sequences, as f takes them; with its neighbours alike in length.
            weight: q, which gradients are multiplied by, values not.
            every: of how many layer inputs one is kept; the others are computed again.
            tokens: of a block, at most; a longer sequence goes alone, and with 0 all do.
            calls: how layers were called elsewhere, to share what is the same.
            begin: whether to run forward now; False for `values_along`, which takes several walks through each piece.
        """
        self.cut, self.source, self.weight, self.every = cut, source, weight, every
        self.blocks = _blocks(*cut.tokens.of(batch), tokens if all(cut.plans) else 0)
        self.values = torch.empty(0)
        self._heads: list[Head] = []
        self._after: Tree = {}
        self.forward = self._run({} if calls is None else calls)
        if begin:
            deque(self.forward, maxlen=0)
            check_values(self.values, "log π")

    def _run(self, calls: dict[Any, list[Call]]) -> Iterator[None]:
        """Run forward and through the head, a piece at a time."""
        yield from self._through_layers(calls)
        self._after = yield from self._through_head()

    def _through_layers(self, calls: dict[Any, list[Call]]) -> Iterator[None]:
        cut, constants = self.cut, constants_of(self.cut, None, self.source)
        leaves = {**constants, **self.source(name for name in cut.before if name not in cut.tables)}
        self.source = self._with_rows(leaves)
        with torch.no_grad():
            for block in self.blocks:
                block.kept[0], own, _ = before(cut, self.source, leaves, block.ids, block.mask)
                block.calls = _shared(calls, block.ids.shape, own)
        for i in range(len(cut.layers)):
            yield
            self._step(i, keep=not i % self.every)
        yield

    def _with_rows(self, leaves: Tree) -> Source:
        """Have the rows that the sequences look up, where tables are gathered; which, a first pass says."""
        cut, source, device = self.cut, self.source, self.blocks[0].ids.device
        if source.gather is None:
            return source
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        asked = [name for name, table in cut.tables.items() if name in cut.before or table.is_meta]
        empty = {name: source.leaf(name, nothing) for name in asked}
        ids: dict[str, list[Tensor]] = {name: [nothing] for name in asked}

        def noted(name: str, rows: Any) -> Tensor:
            ids[name].append(rows.reshape(-1))
            return empty[name].new_zeros(*rows.shape, *empty[name].shape[1:])

        with torch.no_grad():
            for block in self.blocks:
                before(cut, Source(noted), leaves, block.ids, block.mask)
        return source.with_rows({name: torch.cat(each) for name, each in ids.items()})

    def _step(self, i: int, keep: bool) -> None:
        """Take every block through layer i without a graph."""
        leaves = self._leaves(i)
        with torch.no_grad():
            for block in self.blocks:
                h = block.kept[i] if keep else block.kept.pop(i)
                block.kept[i + 1] = layer(self.cut, i, leaves, h, block.calls[i])

    def _leaves(self, i: int) -> Tree:
        names = self.cut.names[i]
        own = self.source(names)
        constants = constants_of(self.cut, i, self.source)
        return {**constants, **{names[name]: leaf.detach() for name, leaf in own.items()}}

    def _through_head(self) -> Generator[None, None, Tree]:
        """Score every token, and begin the way back: values, heads, dh; gradients of what is behind the layers."""
        cut, L = self.cut, len(self.cut.layers)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.source(cut.after).items()}
        everything = {**constants_of(cut, None, self.source), **leaves}
        found: dict[str, Tensor] = {}
        yield
        rows, size = head_rows(cut, self.source), len(cut.head.weight)
        for block in self.blocks:
            h_L = block.kept.pop(L)
            block.dh = torch.zeros_like(h_L)
            traced = []
            for n, t in enumerate(block.lengths):
                h, mask = h_L[n : n + 1, :t].detach().requires_grad_(), block.mask[n : n + 1, :t]
                with torch.enable_grad():
                    traced.append((h, after(cut, self.source, everything, h, block.ids[n : n + 1, :t], mask)))
            x = [each.detach()[0] for _, each in traced]
            head, values, slopes = head_scores(
                x, block.ids, block.omega, block.eta, rows, size, cut.tokens.temperature, self.weight
            )
            self.values = torch.cat([self.values, values]) if block.rows.start else values
            for n, ((h, each), dx) in enumerate(zip(traced, slopes, strict=True)):
                gradients = torch.autograd.grad(each, [h, *leaves.values()], dx[None], allow_unused=True)
                block.dh[n, : h.shape[1]] = gradients[0][0]
                for name, g in zip(leaves, gradients[1:], strict=True):
                    if g is not None:
                        J = found.setdefault(name, g.new_zeros(self.blocks[-1].rows.stop, *g.shape))
                        J[block.rows.start + n] = g
            if cut.trained:
                self._heads.append(head._replace(rows=_let_go))
        n = len(self.values)
        return {
            name: found.get(name, leaf.detach().new_zeros(()).expand(n, *leaf.shape)) for name, leaf in leaves.items()
        }

    def last(self) -> Handles:
        """All sequences' gradients of what is behind the layers: the head too, where it is no table of tokens."""
        cut = self.cut
        if cut.tied or not cut.trained:
            return self._after
        rows = head_rows(cut, self.source)
        return {**self._after, cut.table: stack([head._replace(rows=rows) for head in self._heads])}

    def layer(self, i: int) -> Iterator[tuple[slice, Mapping[str, Piece]]]:
        """Each block's gradients of layer i, and its dh on the way."""
        self._recompute(i)
        names, leaves = self.cut.names[i], self._leaves(i)
        for block in self.blocks:
            h = block.kept.pop(i)
            found = (self._one if len(h) == 1 else self._together)(i, leaves, h, block)
            yield block.rows, {name: found[local] for name, local in names.items()}
            del found  # or it would be alive while the next is made

    def back(self) -> Iterator[tuple[slice, Handles]]:
        """Walk all the way: (which sequences, their gradients of some parameters), every parameter of each once."""
        for piece in self.pieces():
            yield from piece

    def pieces(self) -> Iterator[Iterator[tuple[slice, Mapping[str, Handle]]]]:
        """Walk all the way, piece by piece: what is behind the layers, each layer, what is before them."""
        everything = slice(0, len(self.values))
        yield iter([(everything, self.last())])
        for i in range(len(self.cut.layers) - 1, max(self.cut.lowest, 0) - 1, -1):
            yield self.layer(i)
        if self.cut.lowest < 0:
            yield iter([(everything, self.first())])

    def _one(self, i: int, leaves: Tree, h: Tensor, block: Block) -> Mapping[str, Piece]:
        """One sequence's gradients are autograd's own."""
        own = {local: leaves[local].requires_grad_() for local in self.cut.names[i].values()}
        h.requires_grad_()
        with torch.enable_grad():
            out = layer(self.cut, i, leaves, h, block.calls[i])
        dh, *gradients = torch.autograd.grad(out, [h, *own.values()], block.dh, allow_unused=True)
        block.dh = torch.zeros_like(h) if dh is None else dh
        nothing = (
            (leaf.detach().new_zeros(()).expand(leaf.shape), g) for leaf, g in zip(own.values(), gradients, strict=True)
        )
        return {local: (zero if g is None else g)[None] for local, (zero, g) in zip(own, nothing, strict=True)}

    def _together(self, i: int, leaves: Tree, h: Tensor, block: Block) -> Mapping[str, Piece]:
        """Gradients of a block's sequences, told apart by what went into the layer's operations and came back."""
        own = {local: leaves[local] for local in self.cut.names[i].values()}
        plan = self.cut.plans[i]
        assert plan is not None

        def fn(parameters: Tree, h: Tensor) -> Tensor:
            return layer(self.cut, i, {**leaves, **parameters}, h, block.calls[i])

        handles, (dh,) = pull_rows(fn, own, (h,), block.dh, plan)
        block.dh = torch.zeros_like(h) if dh is None else dh
        return handles

    def _recompute(self, i: int) -> None:
        """Have the inputs of the layers up to i that one kept input stands for."""
        for j in range(i - i % self.every, i):
            if i not in self.blocks[0].kept:
                self._step(j, keep=True)

    def first(self) -> Handles:
        """All sequences' gradients of what is before the layers, a table that is the head's too included."""
        cut = self.cut
        dense = [name for name in cut.before if name not in cut.tables]
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.source(dense).items()}
        everything = {**constants_of(cut, None, self.source), **leaves}
        rows = head_rows(cut, self.source) if cut.tied else None
        heads = [head if rows is None else head._replace(rows=rows) for head in self._heads]
        found: dict[str, list[Handle]] = {name: [] for name in cut.before}
        for k, block in enumerate(self.blocks):
            own: dict[str, list[list[Handle]]] = {name: [] for name in cut.before}
            for n, t in enumerate(block.lengths):
                ids, mask = block.ids[n : n + 1, :t], block.mask[n : n + 1, :t]
                with torch.enable_grad():
                    h, _, made = before(cut, self.source, everything, ids, mask, only=True)
                for name, parts in _gradients(h, block.dh[n : n + 1, :t], leaves, made, cut.tables).items():
                    own[name].append(parts)
            for name, rows in own.items():
                uses = [stack([*parts]) for parts in zip(*rows, strict=True)]
                if cut.tied and name == cut.table:
                    uses.insert(0, heads[k])
                found[name].append(uses[0] if len(uses) == 1 else Sum(tuple(uses)))  # pyright: ignore  # of tables: no Stack
        return {name: stack(parts) for name, parts in found.items()}


def _gradients(h: Tensor, dh: Tensor, leaves: Tree, made: list[Lookup], tables: Tree) -> dict[str, list[Handle]]:
    """One sequence's gradients of what is before the layers: every use of a table in turn, the others dense."""
    traced = [use for use in made if use.rows.requires_grad]
    inputs = [*(use.rows for use in traced), *leaves.values()]
    if not inputs:
        return {}
    gradients = torch.autograd.grad(h, inputs, dh, allow_unused=True)
    parts: dict[str, list[Handle]] = {}
    for use, g in zip(traced, gradients[: len(traced)], strict=True):
        δ = torch.zeros_like(use.rows) if g is None else g
        parts.setdefault(use.name, []).append(
            SparseRows(use.ids.reshape(1, -1), δ.reshape(1, -1, δ.shape[-1]), len(tables[use.name]))
        )
    for (name, leaf), g in zip(leaves.items(), gradients[len(traced) :], strict=True):
        parts[name] = [(torch.zeros_like(leaf) if g is None else g)[None]]
    return parts


def _let_go(rows: Any) -> Tensor:
    """A head's table between its two uses: one that is gathered takes no memory meanwhile."""
    raise AssertionError("a head's gradients are formed when `last` or `first` has returned them")


def _blocks(sequences: Sequences, omega: Tensor, eta: Tensor | None, tokens: int | None) -> list[Block]:
    """Cut a side into blocks, and its weights down to the positions that predict a token of the response."""
    counts = sequences.attention_mask.long().sum(1).tolist()

    def predicting(weights: Tensor) -> Tensor:
        return torch.where(sequences.response_mask.bool(), weights, weights.new_zeros(()))[:, 1:]

    ω, η = predicting(omega), None if eta is None else predicting(eta)
    blocks = []
    for rows in cut_lengths(counts, tokens):
        t = max(counts[rows])
        ids, mask = sequences.input_ids[rows, :t], sequences.attention_mask[rows, :t]
        own = ω[rows, : t - 1], None if η is None else η[rows, : t - 1]
        blocks.append(Block(rows, ids, mask, counts[rows], *own))
    return blocks


def _shared(known: dict[Any, list[Call]], shape: Any, calls: list[Call]) -> list[Call]:
    """Take the calls of an earlier block of this shape, where they are the same: masks are [t, t], and many."""
    earlier = known.setdefault(shape, calls)
    if earlier is calls:
        return calls
    ours, theirs = (pytree.tree_leaves([call[:2] for call in each]) for each in (calls, earlier))
    seen: dict[tuple[int, int], bool] = {}

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return a is b or (type(a) is type(b) and a == b)
        key = id(a), id(b)
        if key not in seen:
            seen[key] = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return seen[key]

    alike = len(ours) == len(theirs) and all(map(same, ours, theirs))
    return earlier if alike else calls
