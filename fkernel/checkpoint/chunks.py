"""What a directory of torch.distributed.checkpoint says it holds: which part of which tensor lies where.

Its metadata lists, for each tensor, chunks (where they begin, how large they are), and for each chunk a file, an offset
and a length. Nothing in a chunk says whose it is, so a damaged list would fill a tensor with another one's numbers, or
leave a part of it as the memory was. The list is therefore held against itself before anything is read: the chunks of
a tensor cover each of its numbers once, every chunk has one place, and no two share a place.

Source: torch 2.13, `torch.distributed.checkpoint.metadata` and `filesystem` (`_StorageInfo`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from fkernel.errors import CheckpointError, listing

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a chunk begins, and its shape."""


class Item(NamedTuple):
    """One thing that is stored: a chunk of a tensor, or what is no tensor.

    Attributes:
        key: what it belongs to, as the metadata names it.
        box: (where it begins in its tensor, its shape); None of what is no tensor.
        file: the file's name.
        offset: where it begins in the file, in bytes.
        length: how many bytes it has there.
    """

    key: str
    box: Box | None
    file: str
    offset: int
    length: int


def items_of(metadata: Any, source: Any) -> list[Item]:
    """List what a checkpoint's metadata says is stored, in the order of the files, after holding it against itself.

    Args:
        metadata: `torch.distributed.checkpoint.metadata.Metadata`.
        source: its file, for messages.

    Raises:
        CheckpointError: chunks do not cover a tensor once, something has no place or shares one, or is stored in a
            way that is not read.
    """
    placed: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for index, info in metadata.storage_data.items():
        placed[index.fqn, None if index.offset is None else tuple(index.offset)] = info
    items: list[Item] = []
    for key, about in metadata.state_dict_metadata.items():
        chunks = getattr(about, "chunks", None)
        boxes: list[Box | None] = [None] if chunks is None else [(tuple(c.offsets), tuple(c.sizes)) for c in chunks]
        if chunks is not None:
            _check_cover(key, tuple(about.size), [box for box in boxes if box is not None], source)
        for box in boxes:
            info = placed.pop((key, None if box is None else box[0]), None)
            if info is None:
                raise CheckpointError(f"{source} is damaged: it does not say where a part of {key!r} is stored.")
            items.append(_item(key, box, info, source))
    if placed:
        raise CheckpointError(
            f"{source} is damaged: it says where {listing([key for key, _ in placed])} is stored, and not what it is."
        )
    _check_sizes(metadata.state_dict_metadata, items, source)
    return sorted(items, key=lambda item: (item.file, item.offset))


def covers(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether boxes cover every number of a tensor, each once.

    Args:
        shape: the tensor's.
        boxes: (where each begins, its shape).

    Example:
        >>> covers((3, 2), [((0, 0), (2, 2)), ((2, 0), (1, 2))])
        True
        >>> covers((3, 2), [((0, 0), (2, 2)), ((1, 0), (1, 2))])
        False
    """
    boxes = [(start, size) for start, size in boxes if math.prod(size)]
    if any(len(start) != len(shape) or len(size) != len(shape) or min((0, *start)) < 0 for start, size in boxes):
        return False
    cuts = [sorted({0, *(start[d] for start, _ in boxes)}) for d in range(len(shape))]
    ends = [[*row[1:], length] for row, length in zip(cuts, shape, strict=True)]
    # Cells between the places where boxes begin: a box that covers its cells exactly ends where others begin.
    counts = torch.zeros([len(row) for row in cuts], dtype=torch.int32)
    for start, size in boxes:
        cells: list[slice] = []
        for d, (begin, extent) in enumerate(zip(start, size, strict=True)):
            if begin + extent not in ends[d]:
                return False
            cells.append(slice(cuts[d].index(begin), ends[d].index(begin + extent) + 1))
        counts[tuple(cells)] += 1
    return bool((counts == 1).all()) if math.prod(shape) else True


def _check_cover(key: str, shape: tuple[int, ...], boxes: list[Box], source: Any) -> None:
    if not covers(shape, boxes):
        raise CheckpointError(
            f"{source} is damaged: the {len(boxes)} parts of {key!r} do not cover its {list(shape)} numbers, each once."
        )


def _item(key: str, box: Box | None, info: Any, source: Any) -> Item:
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{source} says that {key!r} is stored through {listing(list(map(str, info.transform_descriptors)))} "
            f"(compression or encryption), which is not read. Save the checkpoint without extensions."
        )
    file, offset, length = str(info.relative_path), int(info.offset), int(info.length)
    if "/" in file or file.startswith(".") or offset < 0 or length < 0:
        raise CheckpointError(f"{source} is damaged: {key!r} is stored in {file!r}, at {offset}, of {length} bytes.")
    return Item(key, box, file, offset, length)


def _check_sizes(about: Any, items: list[Item], source: Any) -> None:
    """Check that no two items share a place, and that none is larger than the bytes in which it is stored."""
    places: dict[tuple[str, int], Item] = {}
    for item in items:
        other = places.setdefault((item.file, item.offset), item)
        if other is not item:
            raise CheckpointError(
                f"{source} is damaged: {other.key!r} and {item.key!r} are both stored in {item.file} at {item.offset}."
            )
        if item.box is not None:
            dtype = about[item.key].properties.dtype
            if math.prod(item.box[1]) * dtype.itemsize > item.length:
                raise CheckpointError(
                    f"{source} is damaged: {item.key!r} has {list(item.box[1])} numbers of {dtype} in "
                    f"{item.length} bytes."
                )
