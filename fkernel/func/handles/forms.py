"""Gradient handles: per-sequence gradients as what they are made of, instead of P floats a sequence.

    dense      g [n, *shape]                              itself
    Factored   inputs a [n t i], cotangents δ [n t o]     g_n = Σ_t δ_nt a_ntᵀ             shape [o, i]
    Rows       ids i [n t], cotangents δ [n t d]          g_n[v] = Σ_{t: i_nt = v} δ_nt    shape [v, d]
    Head       inputs x [n s d] and their softmax         g_n[v] = Σ_s δ_nsv x_ns; see `fkernel.func.handles.head`
    Sum        some of the above                          their sum (a tied table)
    Stack      any of the above                           those of successive sequences

Storage a sequence falls from P floats to t·Σ(i+o). A handle is formed for a range of its leading dimension at a time,
in storage that the caller owns. Nothing is approximated: with a diagonal between two factored gradients no closed form
exists, so the tiles are what must be computed.

Source: I. Goodfellow, "Efficient per-example gradient computations" (2015), for the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fkernel.func.handles.head import Head, add_head
from fkernel.shapes import Tensor, Tree


class Factored(NamedTuple):
    """A linear layer's gradients, g_n = Σ_t δ_nt a_ntᵀ.

    Attributes:
        inputs: a, [n t i].
        cotangents: δ, [n t o].
    """

    inputs: Tensor
    cotangents: Tensor


class SparseRows(NamedTuple):
    """A table's gradients, g_n[v] = Σ_{t: i_nt = v} δ_nt.

    Attributes:
        ids: i, [n t] int64.
        cotangents: δ, [n t d].
        size: v, rows of the table.
    """

    ids: Tensor
    cotangents: Tensor
    size: int


class Sum(NamedTuple):
    """Gradients that are a sum of handles of one shape, as those of a tied table are."""

    parts: tuple[Summand, ...]


class Concat(NamedTuple):
    """Handles of successive sequences, kept where their microbatches left them: copying them would touch them twice.

    Layers that share an input (queries, keys and values) go on sharing it.
    """

    parts: tuple[Piece, ...]


Summand = Tensor | Factored | SparseRows | Head
Piece = Summand | Sum
"""What one microbatch leaves behind."""
Handle = Piece | Concat
Handles = Mapping[str, Handle]
"""Per-sequence gradients by parameter, each leaf in whatever form is smallest."""


def shape_of(handle: Handle) -> tuple[int, ...]:
    """Tell the parameter's shape.

    Example:
        >>> shape_of(Factored(torch.ones(2, 5, 3), torch.ones(2, 5, 4)))
        (4, 3)
    """
    match handle:
        case Sum(parts) | Concat(parts):
            return shape_of(parts[0])
        case Factored(inputs, cotangents):
            return (cotangents.shape[-1], inputs.shape[-1])
        case SparseRows(_, cotangents, size):
            return (size, *cotangents.shape[2:])
        case Head():
            return (handle.size, handle.x.shape[-1])
        case _:
            return tuple(handle.shape[1:])


def count(handle: Handle) -> int:
    """Count the sequences of a handle."""
    return sum(count(part) for part in handle.parts) if isinstance(handle, Concat) else len(tensors(handle)[0])


def at(handle: Piece, rows: slice | Tensor) -> Piece:
    """Take some sequences of one microbatch's handle."""
    match handle:
        case Sum(parts):
            return Sum(tuple(_rows_of(part, rows) for part in parts))
        case _:
            return _rows_of(handle, rows)


def _rows_of(handle: Summand, rows: slice | Tensor) -> Summand:
    match handle:
        case Factored(inputs, cotangents):
            return Factored(inputs[rows], cotangents[rows])
        case SparseRows(ids, cotangents, size):
            return SparseRows(ids[rows], cotangents[rows], size)
        case Head():
            return handle.changed(lambda leaf: leaf[rows])
        case _:
            return handle[rows]


def tensors(handle: Handle) -> list[Tensor]:
    """List what a handle stores."""
    match handle:
        case Sum(parts) | Concat(parts):
            return [leaf for part in parts for leaf in tensors(part)]
        case Factored(inputs, cotangents):
            return [inputs, cotangents]
        case SparseRows(ids, cotangents, _):
            return [ids, cotangents]
        case Head():
            return [*handle[:4]]
        case _:
            return [handle]


def is_bounded(handle: Summand) -> bool:
    """Tell from factors alone that their products are finite: |Σ_t δ_t a_tᵀ| ≤ Σ_t 1 · max|δ| · max|a|.

    A NaN or an infinity in a factor makes the bound non-finite, so a True needs no look at the (much larger) products.
    """
    if isinstance(handle, Tensor):
        return False
    if isinstance(handle, Head):  # |δ| ≤ |ω|/τ
        largest = _largest(handle.omega) / handle.temperature * _largest(handle.x) * handle.x[0, :, 0].numel()
        return largest + _largest(handle.lse) < torch.finfo(handle.x.dtype).max
    largest = _largest(handle.cotangents) * handle.cotangents[..., 0].numel()
    if isinstance(handle, Factored):
        largest *= _largest(handle.inputs)
    return largest < torch.finfo(handle.cotangents.dtype).max


def _largest(x: Tensor) -> float:
    """max |x|, NaN where there is one; aminmax is ten times faster here than the infinity norm."""
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))


def summands(handle: Piece) -> tuple[Summand, ...]:
    """List the summands of one microbatch's handle."""
    return handle.parts if isinstance(handle, Sum) else (handle,)


def summed_up(parts: list[Factored | SparseRows], like: Tensor, n: int) -> Piece:
    """Make one handle of the uses of a parameter; of none, zero rows that take no storage."""
    if not parts:
        return like.new_zeros(()).expand(n, *like.shape)
    # Lookups come last: they add to few rows of storage that a tied head, where there is one, has written whole.
    ordered = sorted(parts, key=lambda part: isinstance(part, SparseRows))
    return ordered[0] if len(ordered) == 1 else Sum(tuple(ordered))


def compress(handle: Piece, like: Tensor) -> Piece:
    """Write a handle out where its factors are no smaller than the gradients themselves."""
    if isinstance(handle, Tensor) or sum(leaf[0].numel() for leaf in tensors(handle)) < like.numel():
        return handle
    out = like.new_empty(count(handle), *like.shape)
    if not isinstance(out, FakeTensor):  # a tensor without storage holds nothing to write
        materialize_into(handle, out)
    return out


def stack(parts: list[Handle]) -> Handle:
    """Make one handle of those of successive sequences.

    Example:
        >>> stack([torch.zeros(2, 3), torch.zeros(1, 3)]).shape
        torch.Size([3, 3])
    """
    flat = [piece for part in parts for piece in (part.parts if isinstance(part, Concat) else (part,))]
    if len(flat) == 1:
        return flat[0]
    vectors = [part for part in flat if isinstance(part, Tensor) and part.ndim < 3]
    if len(vectors) == len(flat):  # of biases and norms, which are small
        return torch.cat(vectors)
    rows = [part for part in flat if isinstance(part, SparseRows)]
    if len(rows) == len(flat):  # together, so that `compressed` sees all of a batch's ids
        t = max(part.ids.shape[1] for part in rows)
        return SparseRows(
            torch.cat([F.pad(part.ids, (0, t - part.ids.shape[1])) for part in rows]),
            torch.cat(
                [F.pad(c, (0, 0) * (c.ndim - 2) + (0, t - c.shape[1])) for c in (part.cotangents for part in rows)]
            ),
            rows[0].size,
        )
    return Concat(tuple(flat))


def packed(handles: Handles) -> Handles:
    """Copy what handles store into one piece of memory, what they share once.

    Many pieces among the temporaries of a pass leave holes between them, which nothing fits into: 1.3 GB took 1.9 GB.
    Handles on an accelerator, whose allocator keeps its own house, and tensors that take no storage stay as they are.
    """
    stored = {
        key_of(leaf): leaf
        for handle in handles.values()
        for leaf in tensors(handle)
        if leaf.device.type == "cpu" and 0 not in leaf.stride()
    }
    starts, size = {}, 0
    for key, leaf in stored.items():
        starts[key] = size
        size += -(-leaf.numel() * leaf.element_size() // 64) * 64
    if not size:
        return handles
    room = torch.empty(size, dtype=torch.uint8)
    moved = {}
    for key, leaf in stored.items():
        end = starts[key] + leaf.numel() * leaf.element_size()
        moved[key] = room[starts[key] : end].view(leaf.dtype).view(leaf.shape).copy_(leaf)
    return {name: each_tensor(lambda leaf: moved.get(key_of(leaf), leaf), handle) for name, handle in handles.items()}


def key_of(leaf: Tensor) -> tuple[object, ...]:
    """Tell tensors apart by what they look at: two views of one storage are two tensors."""
    return leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()


def each_tensor(change: Callable[[Tensor], Tensor], handle: Handle) -> Handle:
    """Make the same handle of changed tensors."""
    match handle:
        case Sum(parts):
            return Sum(tuple(each_tensor(change, part) for part in parts))  # pyright: ignore[reportArgumentType]
        case Concat(parts):
            return Concat(tuple(each_tensor(change, part) for part in parts))  # pyright: ignore[reportArgumentType]
        case Factored(inputs, cotangents):
            return Factored(change(inputs), change(cotangents))
        case SparseRows(ids, cotangents, size):
            return SparseRows(change(ids), change(cotangents), size)
        case Head():
            return handle.changed(change)
        case _:
            return change(handle)


def nbytes(handles: Handles) -> int:
    """Count the bytes that handles store, what they share once."""
    leaves = {key_of(leaf): leaf for handle in handles.values() for leaf in tensors(handle)}
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves.values() if 0 not in leaf.stride())


def materialize_into(handle: Handle, out: Tensor, start: int = 0) -> None:
    """Write a range of rows of the dense gradients into storage.

    Args:
        handle: gradients of n sequences, for a parameter of shape [s, ...].
        out: [n, r, ...], contiguous; changed in place. Rows `start` … `start + r` of the leading dimension s.
        start: the first of them.

    Example:
        >>> out = torch.empty(1, 2, 2)
        >>> materialize_into(Factored(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[10.0, 100.0]]])), out)
        >>> out
        tensor([[[ 10.,  20.],
                 [100., 200.]]])
    """
    stop = start + out.shape[1] if out.ndim > 1 else 0
    match handle:
        case Concat(parts):
            row = 0
            for part in parts:
                materialize_into(part, out[row : row + count(part)], start)
                row += count(part)
        case Sum(parts):
            materialize_into(parts[0], out, start)
            for part in parts[1:]:
                add(part, out, start)
        case Factored(inputs, cotangents):
            out.baddbmm_(cotangents[:, :, start:stop].mT.to(out.dtype), inputs.to(out.dtype), beta=0.0)
        case SparseRows():
            out.zero_()
            add(handle, out, start)
        case Head():
            add_head(handle, out, start, keep=0.0)
        case _:
            out.copy_(handle[:, start:stop] if out.ndim > 1 else handle)


def add(handle: Piece, out: Tensor, start: int = 0) -> None:
    """Add a range of rows of the dense gradients to what is in storage; arguments as in `materialize_into`."""
    stop = start + out.shape[1] if out.ndim > 1 else 0
    match handle:
        case Sum(parts):
            for part in parts:
                add(part, out, start)
        case Factored(inputs, cotangents):
            out.baddbmm_(cotangents[:, :, start:stop].mT.to(out.dtype), inputs.to(out.dtype))
        case SparseRows(ids, cotangents, _):
            n, r = out.shape[:2]
            here = (ids >= start) & (ids < stop)
            at = (ids - start + r * torch.arange(n, device=ids.device)[:, None])[here]
            out.flatten(0, 1).index_add_(0, at, cotangents[here].to(out.dtype))
        case Head():
            add_head(handle, out, start)
        case _:
            out.add_(handle[:, start:stop] if out.ndim > 1 else handle)


def compressed(x: SparseRows, y: SparseRows) -> tuple[SparseRows, SparseRows, Tensor]:
    """Renumber two sides' table rows so that only those that either side touched remain; and say which they are.

    An inner product is a sum over rows that both touched; a vocabulary of 150,000 has few of them in a batch.
    """
    touched, new = torch.unique(torch.cat([x.ids.reshape(-1), y.ids.reshape(-1)]), return_inverse=True)
    x_ids, y_ids = new[: x.ids.numel()].view_as(x.ids), new[x.ids.numel() :].view_as(y.ids)
    size = len(touched)
    return SparseRows(x_ids, x.cotangents, size), SparseRows(y_ids, y.cotangents, size), touched


def stack_handles(pieces: Iterable[Handles]) -> Handles:
    """Make one J of those of successive microbatches."""
    parts: dict[str, list[Handle]] = {}
    for piece in pieces:
        for name, handle in piece.items():
            parts.setdefault(name, []).append(handle)
    return {name: stack(found) for name, found in parts.items()}


def write_out(pieces: Iterable[tuple[slice, Handles]], params: Tree, n: int) -> Tree:
    """Make J, {name: [n, *shape]}, of its microbatches, in storage that is allocated once."""
    J = {name: leaf.new_empty(n, *leaf.shape) for name, leaf in params.items()}
    for rows, piece in pieces:
        for name, handle in piece.items():
            materialize_into(handle, J[name][rows])
    return J
