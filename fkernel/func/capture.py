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
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fkernel.errors import ModelError
from fkernel.func.handles import Factored, Rows
from fkernel.shapes import Tensor, Tree

Layer = Literal["linear", "conv1d", "embedding"]


class Use(NamedTuple):
    """One use of a parameter: by which kind of layer."""

    parameter: str
    layer: Layer


class Plan(NamedTuple):
    """How the parameters of a function are used.

    Attributes:
        captured: parameters that no path in the graph leads to once the known uses are taken out of it.
        loose: (parameter, function) of captured ones whose other uses carry no gradient, such as `weight.detach()`.
    """

    captured: frozenset[str]
    loose: frozenset[tuple[str, str]]


class capture(TorchFunctionMode):
    """While active, keep what known layers take in and what comes back to them.

    Attributes:
        uses: the known uses, in order.
        inputs: a_t [... t i], or i_t [... t], of each.
        cotangents: δ_t [... t o] of each, once a reverse pass has run; None where none came back.
        loose: (parameter, function) of all other uses.
    """

    def __init__(self, parameters: Tree, constants: Tree, zero: Tensor, plan: Plan | None = None) -> None:
        """Watch `parameters`, compute with `constants`; `zero` is a traced 0 that ties outputs to the graph."""
        super().__init__()
        self.names = {id(leaf): name for name, leaf in parameters.items()}
        self.constants, self.zero, self.plan = constants, zero, plan
        self.uses: list[Use] = []
        self.inputs: list[Tensor] = []
        self.cotangents: list[Tensor | None] = []
        self.loose: set[tuple[str, str]] = set()
        self.hooks: list[RemovableHandle] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take known uses of watched parameters out of the graph, pass everything else on."""
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        call = None if known is None else known(*args, **kwargs)
        if call is not None and id(call.weight) in self.names:
            return self._keep(call)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _keep(self, call: _Call) -> Tensor:
        name = self.names[id(call.weight)]
        out = call.compute(self.constants[name])
        if not out.requires_grad:
            out = out + self.zero
        at = len(self.uses)
        self.uses.append(Use(name, call.layer))
        self.inputs.append(call.input)
        self.cotangents.append(None)
        cotangents = self.cotangents  # not self: a graph that holds its own watcher would outlive the call
        self.hooks.append(out.register_hook(lambda cotangent: cotangents.__setitem__(at, cotangent)))
        return out

    def release(self) -> None:
        """Let go of the graph: nothing that was kept refers to it afterwards."""
        for hook in self.hooks:
            hook.remove()
        for kept in (self.hooks, self.inputs, self.cotangents):
            kept.clear()

    def _note(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Remember another use of a watched parameter; one that the plan did not foresee is an error."""
        for leaf in pytree.tree_leaves((args, kwargs)):
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


def make_plan(f: Callable[[Tree, Any], Tensor], params: Tree, batch: Any) -> Plan:
    """Find the parameters whose every gradient-carrying use is a known layer, by asking autograd on one small batch.

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}.
        batch: a batch of one sequence.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    zero = next(iter(params.values())).new_zeros((), requires_grad=True)
    watching = capture(leaves, params, zero)
    with torch.enable_grad(), watching:
        value = f(leaves, batch)
    reached = _reachable(value)
    watching.release()
    captured = frozenset(name for name, leaf in leaves.items() if id(leaf) not in reached)
    return Plan(captured, frozenset(use for use in watching.loose if use[0] in captured))


def handle_of(use: Use, inputs: Tensor, cotangents: Tensor, size: int) -> Factored | Rows:
    """Make the handle of one use's gradients.

    Args:
        use: which parameter, in which kind of layer.
        inputs: a_t [n ... t i], or token ids i_t [n ... t].
        cotangents: δ_t [n ... t o].
        size: the parameter's leading dimension.
    """
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
    found: set[int] = set()
    seen: set[Any] = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        todo.extend(parent for parent, _ in node.next_functions)
    return found
