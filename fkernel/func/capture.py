"""Layers whose gradient factors: what went in and what came back, instead of a gradient for every sequence.

    linear      y_t = W a_t + b     ∂f/∂W = Σ_t δ_t a_tᵀ          δ_t = ∂f/∂y_t
    conv1d      y_t = Wᵀ a_t + b    ∂f/∂W = Σ_t a_t δ_tᵀ          (GPT-2's layout)
    embedding   y_t = W[i_t]        ∂f/∂W[v] = Σ_{t: i_t = v} δ_t

A `TorchFunctionMode` sees every use of every parameter. At a use that it knows it computes with a constant in the
parameter's place and keeps a_t (or i_t) and δ_t; every other use stays in the graph. Which parameters are explained by
known uses alone is not assumed: autograd is asked, on one sequence, whether a path from the value to them remains. A
tied table has two uses, and its gradient is their sum.

Source: I. Goodfellow, "Efficient per-example gradient computations" (2015), for linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fkernel.errors import ModelError, listing
from fkernel.func.batch import length
from fkernel.func.boundary import check_output
from fkernel.func.handles import Factored, Rows
from fkernel.func.uses import Layer, Use, listen
from fkernel.shapes import Tensor, Tree


class Plan(NamedTuple):
    """How the parameters of a function are used.

    Attributes:
        captured: parameters that no path in the graph leads to once the known uses are taken out of it.
        loose: (parameter, function) of captured ones whose other uses carry no gradient, such as `weight.detach()`.
        looped: whether vmap cannot follow f, so that sequences are differentiated one at a time.
        batched: whether one plain pass over all sequences gives every gradient; see `fkernel.func.taps`.
    """

    captured: frozenset[str]
    loose: frozenset[tuple[str, str]]
    looped: bool = False
    batched: bool = False


class capture(TorchFunctionMode):
    """While active, take known uses of watched parameters out of the graph; remember them and all others.

    Attributes:
        uses: the known uses, in order.
        loose: (parameter, function) of all other uses.
    """

    def __init__(self, watched: Tree, constants: Tree, zero: Tensor, plan: Plan | None = None) -> None:
        """Watch some tensors, compute with constants in their place; `zero` is a traced 0, one a sequence."""
        super().__init__()
        self.names = {id(leaf): name for name, leaf in watched.items()}
        self.constants, self.zero, self.plan = constants, zero, plan
        self.uses: list[Use] = []
        self.loose: set[tuple[str, str]] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take known uses of watched parameters out of the graph, pass everything else on."""
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        call = None if known is None else known(*args, **kwargs)
        if call is not None and id(call.weight) in self.names:
            use = Use(self.names[id(call.weight)], call.layer)
            self.uses.append(use)
            return _Tap.apply(call.compute(self.constants[use.parameter]), call.input, self.zero, use)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Remember another use of a watched parameter; one that the plan did not foresee is an error."""
        # Every operation passes here, so most of them must pass quickly: what is nested is looked into only if need be.
        given = [*args, *kwargs.values()]
        if any(isinstance(arg, (list, tuple, dict)) for arg in given):
            given = pytree.tree_leaves(given)
        for leaf in given:
            name = self.names.get(id(leaf))
            if name is None or not any(isinstance(part, Tensor) for part in pytree.tree_leaves(out)):
                continue  # a shape, a dtype: no gradient passes
            use = (name, getattr(func, "__qualname__", repr(func)))
            if self.plan is not None and use not in self.plan.loose:
                raise ModelError(
                    f"{name!r} is used by {use[1]} in one sequence and not in another, so its gradient cannot be "
                    f"captured; f must do the same operations for every sequence."
                )
            self.loose.add(use)


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; under vmap it sees all sequences at once and listens to what comes back.

    `zero` is mapped over, so that the tap is vmapped even where the output is the same for all sequences (a lookup of
    positions), and traced, so that the output has a graph to listen in even where nothing before it has.
    """

    @staticmethod
    def forward(out: Tensor, input: Tensor, zero: Tensor, use: Use) -> Tensor:
        raise ModelError("A captured layer ran outside of vmap.")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        out, input, zero, use = args
        n = info.batch_size
        out, input = (_leading(leaf, dim, n) for leaf, dim in ((out, in_dims[0]), (input, in_dims[1])))
        use.input = input.detach()
        if not torch.is_grad_enabled():
            return out, 0  # f takes no gradient of this layer: none comes back, and none is missing
        if not out.requires_grad:
            out = out + zero.reshape(n, *[1] * (out.ndim - 1))
        return listen(out, use), 0


def _leading(leaf: Tensor, dim: int | None, n: int) -> Tensor:
    """Put the dimension that counts sequences first; where it is, the tensor stays itself and no view of it."""
    if dim is None:
        return leaf.expand(n, *leaf.shape)
    return leaf if dim == 0 else leaf.movedim(dim, 0)


class Pass(NamedTuple):
    """One forward pass over a microbatch, ready for the reverse one.

    Attributes:
        values: f, [n].
        traced: {name: [n, *shape]}, the parameters in the graph, one copy a sequence (without storage of their own).
        zeros: [n], the traced zeros.
        uses: the captured uses.
        loose: (parameter, function) of watched parameters' other uses.
    """

    values: Tensor
    traced: Tree
    zeros: Tensor
    uses: list[Use]
    loose: set[tuple[str, str]]


def forward(f: Callable[[Tree, Any], Tensor], params: Tree, batch: Any, plan: Plan | None = None) -> Pass:
    """Run f under vmap, each sequence as a batch of one: models want their leading dimension.

    Without a plan every parameter is watched and traced; with one, what it captures is watched and constant. Autograd
    works outside of vmap, on n copies of each traced parameter that share their storage: the gradient of Σ_n f_n with
    respect to copy n is ∇f_n, and one plain reverse pass gives all of them.
    """
    n = length(batch)
    constants = {name: leaf.detach() for name, leaf in params.items()}
    watched = constants if plan is None else {name: constants[name] for name in params if name in plan.captured}
    traced = {
        name: leaf.expand(n, *leaf.shape).requires_grad_()
        for name, leaf in constants.items()
        if plan is None or name not in watched
    }
    zeros = next(iter(constants.values())).new_zeros(n, requires_grad=True)
    seen: list[capture] = []

    def one(p: Tree, zero: Tensor, x: Any) -> Tensor:
        leaves = {name: p.get(name, leaf) for name, leaf in constants.items()}
        seen.append(capture({name: leaves[name] for name in watched}, constants, zero, plan))
        single = pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, x)
        with seen[0]:
            value = f(leaves, single)
        check_output(value, 1, per_sequence=True)
        return value[0]

    sequences = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
    with torch.enable_grad():
        values = vmap(one, in_dims=(0, 0, sequences), randomness="error")(traced, zeros, batch)
    return Pass(values, traced, zeros, seen[0].uses, seen[0].loose)


def backward(found: Pass) -> Tree:
    """Run the reverse pass: every use hears its cotangent, and {name: [n, *shape]} of the traced parameters return."""
    with torch.enable_grad():
        # The zeros give the sum a graph even where f has none.
        total = found.values.sum() + found.zeros.sum()
    leaves = [*found.traced.values()]
    *grads, _ = torch.autograd.grad(total, [*leaves, found.zeros], allow_unused=True)
    _check_heard(found)
    return {
        name: leaf.detach().new_zeros(()).expand(leaf.shape) if g is None else g
        for (name, leaf), g in zip(found.traced.items(), grads, strict=True)
    }


def _check_heard(found: Pass) -> None:
    """Raise ModelError where a layer that the value depends on heard no cotangent: its gradient is not zero then."""
    if all(use.cotangent is not None for use in found.uses):
        return
    heard = (use for node in _nodes(found.values) for use in getattr(node, "uses", ()))
    if lost := [use.parameter for use in heard if isinstance(use, Use) and use.cotangent is None]:
        raise ModelError(
            f"No cotangent came back to the layer of {listing(lost)}, though f depends on it: its gradient cannot be "
            f"captured. Please report the model that does so."
        )


def make_plan(f: Callable[[Tree, Any], Tensor], params: Tree, batch: Any) -> Plan:
    """Find the parameters whose every gradient-carrying use is a known layer, by asking autograd on one small batch.

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}.
        batch: a batch of one sequence.
    """
    found = forward(f, params, batch)
    captured = explained(found)
    return Plan(captured, frozenset(use for use in found.loose if use[0] in captured))


def explained(found: Pass) -> frozenset[str]:
    """Find the traced parameters that no path from the values leads to: their known uses are all that there is."""
    reached = _reachable(found.values)
    return frozenset(name for name, leaf in found.traced.items() if id(leaf) not in reached)


def handle_of(use: Use, size: int) -> Factored | Rows | None:
    """Make the handle of one use's gradients; None where no cotangent came back, so that they are zero.

    Args:
        use: a use that a reverse pass has run over.
        size: the parameter's leading dimension.
    """
    if use.input is None or use.cotangent is None:
        return None
    inputs, cotangents = use.input, use.cotangent
    n, delta = len(cotangents), cotangents.reshape(len(cotangents), -1, cotangents.shape[-1])
    if use.layer == "embedding":
        return Rows(inputs.reshape(n, -1), delta, size)
    a = inputs.reshape(n, -1, inputs.shape[-1])
    return Factored(a, delta) if use.layer == "linear" else Factored(delta, a)


class _Call(NamedTuple):
    layer: Layer
    input: Tensor
    weight: Tensor
    compute: Callable[[Tensor], Tensor]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call:
    return _Call("linear", input, weight, lambda W: F.linear(input, W, bias))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Call | None:
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq:
        return None  # these change the gradient or the weight itself
    return _Call("embedding", input, weight, lambda W: F.embedding(input, W))


def _addmm(bias: Tensor, input: Tensor, weight: Tensor, **options: Any) -> _Call | None:
    if options:
        return None
    return _Call("conv1d", input, weight, lambda W: torch.addmm(bias, input, W))


_KNOWN: dict[Callable[..., Any], Callable[..., _Call | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
}


def _reachable(value: Tensor) -> set[int]:
    """Find the leaves that a value's graph leads to, by identity."""
    leaves = (getattr(node, "variable", None) for node in _nodes(value))
    return {id(leaf) for leaf in leaves if leaf is not None}


def _nodes(value: Tensor) -> set[Any]:
    """Find the nodes of a value's graph."""
    seen: set[Any] = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen
