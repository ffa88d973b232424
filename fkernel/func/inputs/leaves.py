"""Parameters as leaves of a graph, for a plain pass through a whole model; shards are gathered where they are used.

The leaves of a `ShardedTree` are placeholders: they have the whole's shape and no values. While f runs, an operation
that is given one is given the parameter instead, gathered for that operation alone:

    forward     y = op(x, W)        W gathered from all ranks, used, let go; kept for backward is its name
    backward    ∂y/∂x               W gathered again;   ∂y/∂W arrives at the placeholder

so that a pass takes one parameter's memory, and a parameter's gradient at a time for whoever lets go of it in a hook.
All ranks must run the same pass, since they gather together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fkernel.distributed import ShardedTree
from fkernel.func.inputs.source import Source, plain, widened
from fkernel.shapes import Tensor, Tree

_VALUES = ("T", "mT", "H", "mH", "real", "imag", "data")
"""Attributes of a tensor that hold its values; others say what it is like."""
_SHAPES = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "is_floating_point",
    "element_size",
    "is_complex",
)


class Leaves(NamedTuple):
    """Parameters to differentiate a plain pass in.

    Attributes:
        trained: {name: leaf that requires grad}, in the dtype of the computation.
        constants: {name: leaf} of what else the model is given.
        run: (fn, *arguments) -> fn(*arguments), in which the leaves have values.
    """

    trained: Tree
    constants: Tree
    run: Callable[..., Any]

    def value(self, f: Callable[[Tree, Any], Tensor], batch: Any) -> Tensor:
        """Evaluate f at the leaves."""
        return self.run(f, {**self.constants, **self.trained}, batch)


def leaves_of(params: Tree, source: Source | None = None) -> Leaves:
    """Make leaves of parameters, half precision widened.

    Args:
        params: θ.
        source: of their values: `moved`, for a node of a path; None for θ itself.

    Example:
        >>> leaves = leaves_of({"w": torch.ones(2)})
        >>> leaves.value(lambda params, x: x @ params["w"], torch.eye(2))
        tensor([1., 1.], grad_fn=<MvBackward0>)
    """
    if not isinstance(params, ShardedTree):
        values = (source or plain(params))(params)
        trained = {name: leaf.detach().requires_grad_() for name, leaf in values.items()}
        return Leaves(trained, {}, lambda fn, *arguments: fn(*arguments))
    every = {name: widened(params.like(name).new_full((), torch.nan)) for name in params.shards}
    every = {name: value.expand(params.shapes[name]) for name, value in every.items()}
    trained = {name: every[name].detach().requires_grad_() for name in params}
    constants = {name: leaf for name, leaf in every.items() if name not in params}
    names = {id(leaf): name for name, leaf in (*trained.items(), *constants.items())}
    source = source or plain(params)

    def run(fn: Callable[..., Any], *arguments: Any) -> Any:
        with _gathered_where_used(names, source) as mode, saved_tensors_hooks(mode.pack, mode.unpack):
            return fn(*arguments)

    return Leaves(trained, constants, run)


class _Kept(NamedTuple):
    """What is kept of a parameter for backward: its name, and how the operation saw it."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


class _gathered_where_used(TorchFunctionMode):
    def __init__(self, names: dict[int, str], source: Source) -> None:
        """Watch placeholders by identity."""
        super().__init__()
        self.names, self.source = names, source
        self.here: dict[int, str] = {}
        """{address: name} of what is gathered for the operation that runs."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Gather what an operation is given, and let it go."""
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if _says_shape(func) or not any(id(leaf) in self.names for leaf in leaves):
            return func(*args, **kwargs)
        given: Any = pytree.tree_unflatten([self._value(leaf) for leaf in leaves], spec)
        try:
            return func(*given[0], **given[1])
        finally:
            self.here.clear()

    def _value(self, leaf: Any) -> Any:
        if (name := self.names.get(id(leaf))) is None:
            return leaf
        whole = self.source([name])[name]
        if whole.numel():
            self.here[whole.untyped_storage().data_ptr()] = name
        return _Gathered.apply(leaf, whole) if leaf.requires_grad and torch.is_grad_enabled() else whole

    def pack(self, tensor: Tensor) -> Any:
        """Keep the name of a gathered parameter, and anything else as it is.

        Without its history: an operation that keeps what it returned would hold itself, and its graph for ever.
        """
        name = self.here.get(tensor.untyped_storage().data_ptr()) if self.here else None
        if name is None:
            return tensor.detach()
        return _Kept(name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Any) -> Tensor:
        """Gather a parameter again."""
        if not isinstance(kept, _Kept):
            return kept
        whole = self.source([kept.name])[kept.name]
        return whole.as_strided(kept.shape, kept.strides, kept.start)


class _Gathered(torch.autograd.Function):
    """A placeholder's value; its gradient is the placeholder's."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, whole: Tensor) -> Tensor:
        """Return the parameter."""
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on."""
        return grads[0], None


def _says_shape(func: Any) -> bool:
    """Tell whether a function reads what a tensor is like, and none of its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES
    return name in _SHAPES
