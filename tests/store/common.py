"""Handles of every kind, and what a store of them holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fkernel.engine.store import Store, open_store
from fkernel.errors import StoreError
from fkernel.func.handles.forms import Concat, Factored, SparseRows, Sum
from fkernel.io import tensor_chunks

ROOT = Path(__file__).parent.parent.parent
IDENTITY = {"params": "abc", "dtype": "float32", "seed": 0}
GROUPS = [slice(0, 3), slice(3, 6), slice(6, 8)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux's /proc")


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(*shape, generator=generator)).to(dtype)


def handles(i: int = 0, n: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every kind of handle, for n sequences of shard i; queries and keys share what goes in."""
    a, ids = values(n, 5, 4, dtype=dtype, seed=i), values(n, 5, dtype=torch.int64, seed=i) % 7
    delta = values(n, 5, 6, dtype=dtype, seed=i + 1)
    table = Sum((Factored(values(n, 5, 6, dtype=dtype, seed=9), delta[..., :3]), SparseRows(ids, delta, 7)))
    return {
        "bias": values(n, 6, dtype=dtype, seed=i + 2),
        "scale": values(n, dtype=dtype, seed=i + 3),
        "q.weight": Factored(a, delta),
        "k.weight": Factored(a, -delta),
        "embedding": SparseRows(ids, delta, 7),
        "tied": table,
        "ragged": Concat((Factored(a[:1, :2], delta[:1, :2]), Factored(a[1:], delta[1:]))),
        "nested": Concat((Sum((SparseRows(ids[:1], delta[:1], 7),)), values(n - 1, 7, 6, dtype=dtype, seed=i))),
        "unused": torch.zeros((), dtype=dtype).expand(n, 4, 4),
    }


def fill(store: Store) -> None:
    for i, rows in enumerate(store.groups):
        if not store.has(i):
            store.write(i, handles(i, rows[1] - rows[0]))


def assert_same(found: Any, expected: Any) -> None:
    """Equal in kind, structure, dtype, shape and every bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert b"".join(tensor_chunks(found)) == b"".join(tensor_chunks(expected))
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    else:
        assert found == expected


@contextmanager
def refused(*pieces: str) -> Iterator[None]:
    """Expect a StoreError whose message holds every piece."""
    with pytest.raises(StoreError) as caught:
        yield
    for piece in pieces:
        assert piece in str(caught.value)


def shard(directory: Path, i: int) -> Path:
    return directory / f"shard-{i:05d}.safetensors"


def written(tmp_path: Path, content: dict[str, Any], n: int = 3) -> tuple[dict[str, Any], Path]:
    """Write one shard and read it in another opening."""
    with open_store(tmp_path / "store", IDENTITY, [slice(0, n)]) as store:
        store.write(0, content)
    with open_store(tmp_path / "store", IDENTITY, [slice(0, n)]) as store:
        return store.read(0), shard(tmp_path / "store", 0)


def fail(number: int) -> Any:
    def raise_it(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    return raise_it
