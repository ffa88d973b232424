"""What tensors hold, byte by byte and never all at once; and a hash that names the content of a whole tree or batch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fkernel.errors import BatchError
from fkernel.shapes import Tensor

CHUNK_BYTES = 1 << 20
"""Small enough to stay in the cache between whoever copies a chunk and whoever hashes it."""


def fingerprint(tree: Any) -> str:
    """Name the content of parameters or of a batch: the same on every machine, another for every other content.

    SHA-256 over every leaf's place in the tree, dtype, shape and bytes (row-major, little-endian). Places are sorted,
    so the order in which a dictionary was filled does not matter; how a tensor lies in memory does not either.

    Args:
        tree: any pytree of tensors, numbers, texts and None: {name: tensor}, `Sequences`, a tuple of them.

    Returns:
        64 hexadecimal digits.

    Raises:
        BatchError: a leaf is of another kind, or there is none.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.zeros(4)[::2]})
        True
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.tensor([0.0, -0.0])})
        False
    """
    leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
    if not leaves:
        raise BatchError(f"Nothing to take a fingerprint of: {type(tree).__name__} holds no leaf.")
    digest = hashlib.sha256()
    for place, leaf in sorted(leaves, key=lambda found: found[0]):
        # A line of JSON says where each leaf ends, so that no two trees run together into the same bytes.
        if isinstance(leaf, Tensor):
            digest.update(_line([place, str(leaf.dtype), list(leaf.shape)]))
            for chunk in contents(leaf):
                digest.update(chunk)
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            digest.update(_line([place, leaf]))
        else:
            raise BatchError(
                f"The leaf {place or 'itself'} is a {type(leaf).__name__}, whose content has no fingerprint; expected "
                f"tensors, numbers, texts and None (torch.as_tensor makes a tensor of an array)."
            )
    return digest.hexdigest()


def contents(tensor: Tensor) -> Iterator[memoryview]:
    r"""Walk a tensor's bytes, row-major and little-endian, a chunk at a time; a contiguous one is not copied.

    Args:
        tensor: of any dtype, layout and device.

    Example:
        >>> [bytes(chunk) for chunk in contents(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)]
        [b'\x01\x03\x02\x04']
    """
    tensor = tensor.detach()
    if tensor.numel() * tensor.element_size() <= CHUNK_BYTES or (tensor.is_contiguous() and tensor.ndim == 1):
        for piece in tensor.reshape(-1).split(max(1, CHUNK_BYTES // tensor.element_size())):
            yield _bytes(piece)
    elif tensor.is_contiguous():
        yield from contents(tensor.view(-1))
    else:
        row = tensor[0].numel() * tensor.element_size()
        for rows in tensor.split(max(1, CHUNK_BYTES // row)):
            yield from contents(rows[0] if row > CHUNK_BYTES else rows)


def _bytes(piece: Tensor) -> memoryview:
    # As bytes, because numpy has no bfloat16; strided anew, because a single number may keep a stride of 0.
    data: Any = piece.cpu().contiguous().as_strided((piece.numel(),), (1,)).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = np.ascontiguousarray(data.reshape(-1, piece.element_size())[:, ::-1]).reshape(-1)
    return memoryview(data)


def _line(fields: list[Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
