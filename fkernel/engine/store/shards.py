"""One shard: gradient handles of some sequences in one safetensors file.

    8 bytes                length of the header, little-endian
    header                 JSON: each tensor's dtype, shape and offsets, and in its metadata how handles are composed
    tensors                one after the other, widest dtype first, so that each begins at a multiple of its own width

Tensors are streamed to the file through the checksum, bypassing the page cache (`fkernel.io.direct`), and any
safetensors reader opens the result. Shared tensors are stored once and shared again; expanded ones are stored
unexpanded; transposed ones are stored as they lie in memory and transposed again, so that products are bitwise equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.errors import StoreError
from fkernel.func.handles import Concat, Factored, Handle, Handles, Head, SparseRows, Sum
from fkernel.io import DTYPES, open_direct, parse_json, read_direct, tensor_chunks, tensors_header
from fkernel.shapes import Tensor

_METADATA = "handles"


class Packed(NamedTuple):
    """A shard before it is written.

    Attributes:
        header: the bytes before the tensors.
        tensors: in file order.
    """

    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file, bytes."""
        return len(self.header) + sum(_nbytes(tensor) for tensor in self.tensors)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Iterate over the file's content; contiguous tensors are not copied."""
        yield self.header
        for tensor in self.tensors:
            yield from tensor_chunks(tensor)


def pack(handles: Handles) -> Packed:
    """Lay out handles as a safetensors file.

    Args:
        handles: {name: handle}, of any kinds, dtypes, layouts and devices.

    Raises:
        StoreError: a tensor has a dtype that safetensors cannot hold.

    Example:
        >>> zeros = torch.zeros(()).expand(2, 1000)
        >>> [tensor.shape for tensor in pack({"w": zeros}).tensors]
        [torch.Size([1, 1])]
    """
    stored = _Stored()
    structure = {name: stored.describe(handle, name) for name, handle in handles.items()}
    return Packed(*tensors_header(stored.tensors, {_METADATA: json.dumps(structure)}))


class Layout(NamedTuple):
    """Positions of handles in a shard.

    Attributes:
        structure: {parameter: description of its handle}.
        places: {tensor: (dtype, shape, first byte, byte after the last)}.
    """

    structure: dict[str, dict[str, Any]]
    places: dict[str, tuple[torch.dtype, list[int], int, int]]


def layout(path: Path) -> Layout:
    """Read a shard's header.

    Args:
        path: a file that `pack` laid out.

    Raises:
        OSError, KeyError, ValueError, TypeError: the file is not such a file.
    """
    with open_direct(path) as file:
        size = int.from_bytes(bytes(read_direct(file, 0, 8).numpy()), "little")
        header = parse_json(bytes(read_direct(file, 8, 8 + size).numpy()))
    structure = parse_json(header.pop("__metadata__")[_METADATA])
    named = {name: dtype for dtype, name in DTYPES.items()}
    places = {
        name: (named[tensor["dtype"]], tensor["shape"], *(8 + size + place for place in tensor["data_offsets"]))
        for name, tensor in header.items()
    }
    return Layout(structure, places)


def unpack(path: Path, header: Layout, names: Collection[str] | None = None) -> dict[str, Handle]:
    """Read handles of a shard, bypassing the page cache.

    Args:
        path: a file that `pack` laid out.
        header: its layout.
        names: of the parameters to read; None for all.

    Raises:
        OSError, KeyError, ValueError: the file is not such a file.
    """
    wanted = {name: header.structure[name] for name in (header.structure if names is None else names)}
    with open_direct(path) as file:
        tensors = {name: _read(file, *header.places[name]) for node in wanted.values() for name in _names(node)}
    return {name: _handle(node, tensors) for name, node in wanted.items()}


def _read(file: int, dtype: torch.dtype, shape: list[int], start: int, stop: int) -> Tensor:
    stored = read_direct(file, start, stop)
    if sys.byteorder == "big":
        stored = stored.view(-1, dtype.itemsize).flip(1).reshape(-1)
    # Tensors begin at multiples of their own element size.
    return stored.view(dtype).view(shape)


class _Stored:
    """The tensors of a shard, each once, and the descriptions of handles that refer to them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[Any, str] = {}

    def describe(self, handle: Handle, place: str) -> dict[str, Any]:
        match handle:
            case Concat(parts):
                return {"stack": [self.describe(part, f"{place}/{at}") for at, part in enumerate(parts)]}
            case Sum(parts):
                return {"sum": [self.describe(part, f"{place}/{at}") for at, part in enumerate(parts)]}
            case Factored(inputs, cotangents):
                return {
                    "factored": [self.tensor(inputs, f"{place}/inputs"), self.tensor(cotangents, f"{place}/cotangents")]
                }
            case SparseRows(ids, cotangents, size):
                return {
                    "rows": [self.tensor(ids, f"{place}/ids"), self.tensor(cotangents, f"{place}/cotangents"), size]
                }
            case Head():
                raise StoreError(f"{place!r} is a head's, which is made of the model's own table, and is not stored.")
            case _:
                return {"dense": self.tensor(handle, place)}

    def tensor(self, tensor: Tensor, place: str) -> dict[str, Any]:
        """Add a tensor unless it is present; return its name, dimension order and shape."""
        if tensor.dtype not in DTYPES:
            raise StoreError(
                f"{place!r} is {tensor.dtype}, which cannot be stored; store one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}."
            )
        # An expanded dimension (stride 0) is stored with size 1.
        base = tensor.detach()[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
        order = list(range(base.ndim))
        if not base.is_contiguous():
            order.sort(key=lambda dim: -base.stride(dim))
        base = base.permute(order)
        key = (base.device, base.data_ptr(), base.dtype, base.shape, base.stride())
        name = self.seen.setdefault(key, f"{len(self.tensors):05d} {place}")
        self.tensors.setdefault(name, base)
        return {"tensor": name, "order": order, "shape": list(tensor.shape)}


def _handle(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, parts),) = node.items()
    match kind:
        case "stack":
            return Concat(tuple(_handle(part, tensors) for part in parts))
        case "sum":
            return Sum(tuple(_handle(part, tensors) for part in parts))
        case "factored":
            return Factored(*(_tensor(part, tensors) for part in parts))
        case "rows":
            return SparseRows(_tensor(parts[0], tensors), _tensor(parts[1], tensors), parts[2])
        case "dense":
            return _tensor(parts, tensors)
        case _:
            raise ValueError(f"a handle of unknown kind {kind!r}")


def _names(node: dict[str, Any]) -> Iterator[str]:
    """Iterate over the names of a handle's tensors."""
    ((kind, parts),) = node.items()
    if kind in ("stack", "sum"):
        for part in parts:
            yield from _names(part)
    else:
        yield from (part["tensor"] for part in ([parts] if kind == "dense" else parts[:2]))


def _tensor(node: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    order = node["order"]
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensors[node["tensor"]].permute(back).expand(node["shape"])


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
