"""SHA-256 of files, of JSON, and of the tensors of a tree or a batch, in chunks."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fkernel.errors import BatchError
from fkernel.io.direct import file_chunks
from fkernel.shapes import Tensor

CHUNK_BYTES = 1 << 20
"""Small enough to stay in the CPU cache between copying and hashing."""


def fingerprint(tree: Any) -> str:
    """Hash the content of parameters or of a batch, 64 hexadecimal digits, equal on every machine.

    SHA-256 over every leaf's path in the tree, dtype, shape and bytes (row-major, little-endian), sorted by path: the
    order of dictionaries and the strides of tensors do not matter.

    Args:
        tree: any pytree of tensors, numbers, texts and None: {name: tensor}, `Sequences`, a tuple of them.

    Raises:
        BatchError: a leaf is of another type, or there is none.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.zeros(4)[::2]})
        True
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.tensor([0.0, -0.0])})
        False
    """
    leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
    if not leaves:
        raise BatchError(f"Nothing to take a fingerprint of: {type(tree).__name__} holds no leaf.")
    return fingerprint_of_leaves(sorted(leaves, key=lambda item: item[0]))


def fingerprint_of_leaves(leaves: Iterable[tuple[str, Any]]) -> str:
    """Hash leaves one after the other, as `fingerprint` does those of a tree.

    Args:
        leaves: (path as `torch.utils._pytree.keystr` writes it, leaf), sorted by path; a leaf may be made when it is
            asked for, and is let go of.

    Example:
        >>> fingerprint_of_leaves([("['w']", torch.zeros(2))]) == fingerprint({"w": torch.zeros(2)})
        True
    """
    digest = hashlib.sha256()
    for place, leaf in leaves:
        # A line of JSON before each leaf delimits it, so that different trees give different bytes.
        if isinstance(leaf, Tensor):
            facts, chunks = [place, str(leaf.dtype), list(leaf.shape)], tensor_chunks(leaf)
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            facts, chunks = [place, leaf], ()
        else:
            raise BatchError(
                f"The leaf {place or 'itself'} is a {type(leaf).__name__}, whose content has no fingerprint; expected "
                f"tensors, numbers, texts and None (torch.as_tensor makes a tensor of an array)."
            )
        digest.update(json.dumps(facts).encode() + b"\n")
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    r"""Iterate over a tensor's bytes in chunks, row-major and little-endian; a contiguous tensor is not copied.

    Example:
        >>> [bytes(chunk) for chunk in tensor_chunks(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)]
        [b'\x01\x03\x02\x04']
    """
    tensor = tensor.detach()
    if tensor.numel() * tensor.element_size() <= CHUNK_BYTES or tensor.is_contiguous():
        for piece in tensor.reshape(-1).split(max(1, CHUNK_BYTES // tensor.element_size())):
            yield _bytes(piece)
    else:
        row = tensor[0].numel() * tensor.element_size()
        for rows in tensor.split(max(1, CHUNK_BYTES // row)):
            yield from tensor_chunks(rows[0] if row > CHUNK_BYTES else rows)


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter.

    Example:
        >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file.

    Example:
        >>> checksum(Path("/dev/null"))[:12]
        'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for chunk in file_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def checksums(directory: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file below a directory whose name matches a pattern, {relative path: digits}, sorted by path.

    Example:
        >>> [*checksums(Path(__file__).parent, "at*.py")]
        ['atomic.py']
    """
    files = sorted(file for file in directory.rglob(pattern) if file.is_file())
    return {str(file.relative_to(directory)): checksum(file) for file in files}


def _bytes(piece: Tensor) -> memoryview:
    # As uint8, since numpy has no bfloat16; with stride 1, since a single element may have stride 0.
    data: Any = piece.cpu().contiguous().as_strided((piece.numel(),), (1,)).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        data = np.ascontiguousarray(data.reshape(-1, piece.element_size())[:, ::-1]).reshape(-1)
    return memoryview(data)
