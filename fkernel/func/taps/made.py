"""Tensors computed from parameters alone, and how gradients are pulled back to the parameters.

    v = φ(w), the same for all sequences        ∂f_n/∂w = (∂φ/∂w)ᵀ ∂f_n/∂v

Examples are 1 + w, exp w, a transposed or cast matrix, the matrix of one expert. v is tapped like a parameter, and each
row of its gradients is pulled back. Where φ only indexes or transposes, this is not needed:

    v = W[e]         the gradient of v is row e of W's        v = Wᵀ     a linear layer of v is a conv1d layer of W
    v = W[i_1 … ]    its rows are those of W at i             v = expanded   its rows are summed, sequence by sequence

Other inputs of φ may depend on the batch (the expert e) as long as they need no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fkernel.func.taps.known import parts_of
from fkernel.shapes import Tensor


class Made(NamedTuple):
    """A parameter, or a tensor computed from parameters.

    Attributes:
        value: v, with its graph down to the parameters.
        leaves: {name: parameter} that it is computed from.
        whole: the parameter that v is a view or cast of; None where φ computes.
        turned: whether the last two dimensions of `whole` are transposed.
        chosen: e, where v = whole[e].
        ids: i, where v = whole[i].
        of: what v is expanded from, along its leading dimension.
    """

    value: Tensor
    leaves: Mapping[str, Tensor]
    whole: str | None = None
    turned: bool = False
    chosen: int | None = None
    ids: Tensor | None = None
    of: Made | None = None

    @property
    def name(self) -> str:
        """The first parameter's name, for errors."""
        return next(iter(self.leaves))


def made_by(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], out: Tensor, sources: Sequence[Made]
) -> Made:
    """Describe the result of an operation on parameters and tensors without gradient.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        out: a tensor that it returned.
        sources: the parameters, and tensors computed from them, among its arguments.

    Example:
        >>> W = torch.ones(3, 2, 2, requires_grad=True)
        >>> made = made_by(torch.Tensor.__getitem__, (W, 1), {}, W[1], [Made(W, {"W": W}, "W")])
        >>> made.whole, made.chosen
        ('W', 1)
    """
    leaves = {name: leaf for source in sources for name, leaf in source.leaves.items()}
    computed, one = Made(out, leaves), sources[0]
    at = 1 if func is F.embedding else 0
    if len(sources) > 1 or len(args) <= at or args[at] is not one.value or one.ids is not None or one.of is not None:
        return computed
    if func in _EXPANSIONS and out.ndim >= one.value.ndim and (out.ndim > one.value.ndim or len(one.value) == 1):
        return computed._replace(of=one)
    if one.whole is None:
        return computed
    if func in _CASTS and out.shape == one.value.shape:
        return one._replace(value=out)
    if _is_turn(func, args, out, one.value):
        return one._replace(value=out, turned=not one.turned)
    if func is F.embedding:
        is_plain = parts_of(func, args, kwargs) and one.chosen is None and not one.turned
        return one._replace(value=out, ids=args[0]) if is_plain else computed
    if func is torch.Tensor.__getitem__ and not one.turned and one.chosen is None and one.value.ndim > 1:
        return _taken(args[1], one._replace(value=out)) or computed
    return computed


def _taken(index: Any, made: Made) -> Made | None:
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if isinstance(index, int) and not isinstance(index, bool):
        return made._replace(chosen=index % len(made.leaves[made.name]))
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim < 2:
        size = len(made.leaves[made.name])
        return made._replace(ids=index % size) if index.ndim else made._replace(chosen=int(index) % size)
    return None


def _is_turn(func: Callable[..., Any], args: Sequence[Any], out: Tensor, value: Tensor) -> bool:
    d = value.ndim
    if func in _TRANSPOSITIONS:
        return d == 2 or (d > 2 and func is _MT)
    if func not in (torch.Tensor.transpose, torch.transpose) or len(args) != 3 or d < 2:
        return False
    return {args[1] % d, args[2] % d} == {d - 2, d - 1}


def pulled_back(rows: Sequence[tuple[Made, Tensor]]) -> dict[str, Tensor]:
    """Pull each row of gradients back to the parameters.

    Args:
        rows: v, and [n, *shape of v].

    Returns:
        {name: [n, *shape]} of the parameters that v is computed from.

    Example:
        >>> w = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> v = Made(w * w, {"w": w})
        >>> pulled_back([(v, torch.ones(3, 2))])["w"].tolist()
        [[0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]
    """
    if not rows:
        return {}
    leaves = {name: leaf for made, _ in rows for name, leaf in made.leaves.items()}
    with torch.enable_grad():
        grads = torch.autograd.grad(
            [made.value for made, _ in rows],
            [*leaves.values()],
            [row.to(made.value.dtype) for made, row in rows],
            allow_unused=True,
            is_grads_batched=True,
        )
    return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


_MT: Any = torch.Tensor.mT.__get__  # pyright: ignore
_TRANSPOSITIONS = (torch.Tensor.T.__get__, _MT, torch.Tensor.t, torch.t)  # pyright: ignore
_CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.type_as)
_EXPANSIONS = (torch.Tensor.expand, torch.Tensor.expand_as)
