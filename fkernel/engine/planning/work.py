"""The cost of a function without running it: operations, bytes and memory, counted on fake tensors.

Fake tensors (`torch._subclasses`) have shapes, dtypes and storage, but no data. A function runs the same operations on
them as on real ones, so no formula for a transformer is assumed, and the model need not fit into memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fkernel.shapes import Tensor, Tree


class Work(NamedTuple):
    """The cost of one call.

    Attributes:
        flops: floating-point operations in matrix products.
        weights: bytes of parameters that operations read; a larger batch reads no more of them.
        moved: all other bytes that operations read and write.
        calls: operations.
        peak: largest number of live bytes, without parameters and batch.
        kept: live bytes at the end, held by the result.
    """

    flops: float
    weights: float
    moved: float
    calls: int
    peak: int
    kept: int

    def times(self, k: float) -> Work:
        """Scale to k times the sequences: everything but calls and the reading of parameters."""
        return Work(self.flops * k, self.weights, self.moved * k, self.calls, int(self.peak * k), int(self.kept * k))


def count_cost(fn: Callable[..., Any], params: Tree, *rest: Any, place: torch.device | None = None) -> Work:
    """Count the cost of fn(params, *rest).

    Args:
        fn: the function.
        params: its parameters.
        rest: what else it takes.
        place: where tensors on the meta device are taken to be; None for there, which knows no fused attention.

    Example:
        >>> work = count_cost(lambda p, x: x @ p["w"], {"w": torch.ones(8, 4)}, torch.ones(2, 8))
        >>> int(work.flops), int(work.weights), work.peak
        (128, 128, 32)
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        leaves, spec = pytree.tree_flatten((params, *rest))
        args = pytree.tree_unflatten([_faked(fake, leaf, place) for leaf in leaves], spec)
        inside = {leaf.untyped_storage()._cdata for leaf in args[0].values()}
        given = {leaf.untyped_storage()._cdata for leaf in _tensors(args[1:])}
        counting, flops = _Count(inside, given), FlopCounterMode(display=False)
        with flops, counting, _uncollected():
            result = fn(*args)
            kept = counting.live
    del result
    return Work(flops.get_total_flops(), counting.weights, counting.moved, counting.calls, counting.peak, kept)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage within, so that a count does not depend on when that would happen."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _faked(fake: FakeTensorMode, leaf: Any, place: torch.device | None) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_meta and place is not None:
        return torch.empty_like(leaf, device=place)
    return fake.from_tensor(leaf) if isinstance(leaf, Tensor) and not fake.is_our_fake(leaf) else leaf


class _Count(TorchDispatchMode):
    """Counts every operation below autograd and vmap; storage is alive from its operation until its finalizer runs.

    A view moves nothing. An expanded tensor counts as large as its storage.
    """

    def __init__(self, parameters: set[int], given: set[int]) -> None:
        super().__init__()
        self.parameters, self.alive = parameters, set(given)  # views of inputs allocate nothing
        self.weights = self.moved = 0.0
        self.calls = self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = _tensors(out)
        if not results:
            return out
        self.calls += 1
        fresh = [leaf for leaf in results if self._is_new(leaf)]
        if fresh or func._schema.is_mutable:
            for leaf in (*_tensors((args, kwargs)), *results):
                size = min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())
                if leaf.untyped_storage()._cdata in self.parameters:
                    self.weights += size
                else:
                    self.moved += size
        return out

    def _is_new(self, leaf: Tensor) -> bool:
        storage = leaf.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or key in self.parameters:
            return False
        self.alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)
        return True

    def _drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
