"""Gradient handles: per-sequence gradients as factors, instead of P floats a sequence.

    dense      g [n, *shape]                              itself
    Factored   inputs a [n t i], cotangents δ [n t o]     g_n = Σ_t δ_nt a_ntᵀ             shape [o, i]
    SparseRows ids i [n t], cotangents δ [n t d]          g_n[v] = Σ_{t: i_nt = v} δ_nt    shape [v, d]
    Head       inputs x [n s d] and their softmax         g_n[v] = Σ_s δ_nsv x_ns; see `fkernel.func.handles.head`
    Sum        some of the above                          their sum (a tied table)
    Concat     any of the above                           those of successive sequences

Storage a sequence falls from P floats to t·Σ(i+o). A handle is multiplied out for a range of its leading dimension at a
time, in storage that the caller owns. Nothing is approximated: products of factored gradients with a diagonal between
them have no closed form, so tiles of the dense gradients are computed.

Source: I. Goodfellow, "Efficient per-example gradient computations" (2015), for the factors.
"""

from __future__ import annotations

import math
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
    """A sum of handles of one shape, such as a tied table's."""

    parts: tuple[Summand, ...]


class Concat(NamedTuple):
    """Handles of successive sequences, as computed by their microbatches, without a copy.

    Layers that share an input (queries, keys and values) keep sharing it.
    """

    parts: tuple[Piece, ...]


Summand = Tensor | Factored | SparseRows | Head
Piece = Summand | Sum
"""The gradient of one parameter, of one microbatch."""
Handle = Piece | Concat
Handles = Mapping[str, Handle]
"""Per-sequence gradients by parameter, each in its smallest form."""


def shape_of(handle: Handle) -> tuple[int, ...]:
    """Return the parameter's shape.

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
    return each_tensor(lambda leaf: leaf[rows], handle)  # pyright: ignore[reportReturnType]


def tensors(handle: Handle) -> list[Tensor]:
    """List the tensors that a handle stores."""
    match handle:
        case Sum(parts) | Concat(parts):
            return [leaf for part in parts for leaf in tensors(part)]
        case Factored(inputs, cotangents):
            return [inputs, cotangents]
        case SparseRows(ids, cotangents, _):
            return [ids, cotangents]
        case Head():
            return [*handle.stored.values()]
        case _:
            return [handle]


def is_bounded(handle: Summand) -> bool:
    """Show from factors alone that their products are finite: |Σ_t δ_t a_tᵀ| ≤ Σ_t 1 · max|δ| · max|a|.

    A NaN or infinity in a factor makes the bound non-finite, so for True the (much larger) products need no check.
    """
    if isinstance(handle, Tensor):
        return False
    if isinstance(handle, Head):  # |δ| ≤ (|ω| + |η| (1 + log v))/τ, since |p log p| ≤ 1 and H ≤ log v
        weight = _largest(handle.omega)
        if handle.eta is not None:
            weight += _largest(handle.eta) * (1 + math.log(handle.size))
        largest = weight / handle.temperature * _largest(handle.x) * handle.x[0, :, 0].numel()
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
    """Combine the uses of a parameter into one handle; without uses, zeros that take no storage."""
    if not parts:
        return like.new_zeros(()).expand(n, *like.shape)
    # Lookups come last: they add to few rows of what a tied head has written whole.
    ordered = sorted(parts, key=lambda part: isinstance(part, SparseRows))
    return ordered[0] if len(ordered) == 1 else Sum(tuple(ordered))


def compress(handle: Piece, like: Tensor) -> Piece:
    """Write a handle out where its factors are no smaller than the gradients themselves."""
    if isinstance(handle, Tensor) or sum(leaf[0].numel() for leaf in tensors(handle)) < like.numel():
        return handle
    out = like.new_empty(count(handle), *like.shape)
    if not isinstance(out, FakeTensor):  # fake tensors hold no data
        materialize_into(handle, out)
    return out


def stack(parts: list[Handle]) -> Handle:
    """Concatenate handles of successive sequences.

    Example:
        >>> stack([torch.zeros(2, 3), torch.zeros(1, 3)]).shape
        torch.Size([3, 3])
    """
    flat = [piece for part in parts for piece in (part.parts if isinstance(part, Concat) else (part,))]
    if len(flat) == 1:
        return flat[0]
    vectors = [part for part in flat if isinstance(part, Tensor) and part.ndim < 3]
    if len(vectors) == len(flat):  # biases and norms, which are small
        return torch.cat(vectors)
    rows = [part for part in flat if isinstance(part, SparseRows)]
    if len(rows) == len(flat):  # one handle, so that `compressed` has all ids of a batch
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
    """Copy the tensors of handles into one block of memory, shared tensors once.

    Many allocations among the temporaries of a pass fragment memory: 1.3 GB took 1.9 GB. Handles on an accelerator,
    which has its own allocator, and tensors without storage are not copied.
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
    """Identify a tensor by its memory and layout: two different views of one storage have two keys."""
    return leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()


def each_tensor(change: Callable[[Tensor], Tensor], handle: Handle) -> Handle:
    """Apply a function to each tensor of a handle."""
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
    """Count the bytes of handles, shared tensors once."""
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
    """Renumber the rows of two handles to those that either of them uses; return both handles and the used rows.

    Other rows are zero: a batch uses few rows of a vocabulary of 150,000.
    """
    touched, new = torch.unique(torch.cat([x.ids.reshape(-1), y.ids.reshape(-1)]), return_inverse=True)
    x_ids, y_ids = new[: x.ids.numel()].view_as(x.ids), new[x.ids.numel() :].view_as(y.ids)
    size = len(touched)
    return SparseRows(x_ids, x.cotangents, size), SparseRows(y_ids, y.cotangents, size), touched


def stack_handles(pieces: Iterable[Handles]) -> Handles:
    """Concatenate handles of successive microbatches."""
    parts: dict[str, list[Handle]] = {}
    for piece in pieces:
        for name, handle in piece.items():
            parts.setdefault(name, []).append(handle)
    return {name: stack(own) for name, own in parts.items()}


def write_out(pieces: Iterable[tuple[slice, Handles]], params: Tree, n: int) -> Tree:
    """Write J, {name: [n, *shape]}, from the handles of its microbatches, in storage that is allocated once."""
    J = {name: leaf.new_empty(n, *leaf.shape) for name, leaf in params.items()}
    for rows, piece in pieces:
        for name, handle in piece.items():
            materialize_into(handle, J[name][rows])
    return J
