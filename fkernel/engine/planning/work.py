"""What a function would cost, without running it: operations, bytes and memory, counted on tensors without storage.

Fake tensors (`torch._subclasses`) know shapes, dtypes and storage, and hold no data. A function that runs on them runs
the very operations that it runs on real ones, so what is counted here is what happens: no formula for a transformer,
and no model needs to fit into memory to be looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fkernel.shapes import Tensor, Tree


class Work(NamedTuple):
    """What one call costs.

    Attributes:
        flops: floating-point operations in matrix products.
        weights: bytes of parameters that operations read; a larger batch reads no more of them.
        moved: all other bytes that operations read and write.
        calls: operations.
        peak: most bytes alive at once, parameters and batch apart.
        kept: bytes alive at the end, through the result.
    """

    flops: float
    weights: float
    moved: float
    calls: int
    peak: int
    kept: int

    def times(self, k: float) -> Work:
        """Scale what grows with the number of sequences: all but the calls and the parameters that they read."""
        return Work(self.flops * k, self.weights, self.moved * k, self.calls, int(self.peak * k), int(self.kept * k))


def count_cost(fn: Callable[..., Any], params: Tree, *rest: Any) -> Work:
    """Count what fn(params, *rest) would do.

    Example:
        >>> work = count_cost(lambda p, x: x @ p["w"], {"w": torch.ones(8, 4)}, torch.ones(2, 8))
        >>> int(work.flops), int(work.weights), work.peak
        (128, 128, 32)
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        leaves, spec = pytree.tree_flatten((params, *rest))
        pretended = [_faked(fake, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args = pytree.tree_unflatten(pretended, spec)
        inside = {leaf.untyped_storage()._cdata for leaf in args[0].values()}
        given = {leaf.untyped_storage()._cdata for leaf in _tensors(args[1:])}
        counting, flops = _Count(inside, given), FlopCounterMode(display=False)
        with flops, counting:
            result = fn(*args)
            kept = counting.live
    del result
    return Work(flops.get_total_flops(), counting.weights, counting.moved, counting.calls, counting.peak, kept)


def _faked(fake: FakeTensorMode, leaf: Tensor) -> Tensor:
    return leaf if fake.is_our_fake(leaf) else fake.from_tensor(leaf)


class _Count(TorchDispatchMode):
    """Sees every operation below autograd and vmap; storage is alive from the operation that made it to its finalizer.

    A view moves nothing. Sizes are those of what is really read: a tensor that is expanded is as large as its storage.
    """

    def __init__(self, parameters: set[int], given: set[int]) -> None:
        super().__init__()
        self.parameters, self.alive = parameters, set(given)  # a view of what was given makes nothing new
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
