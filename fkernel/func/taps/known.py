"""The operations with known per-sequence gradients, and the role of parameters in each.

A matrix multiplies an input (linear; conv1d, GPT-2's layout or a plain product; grouped, a matrix for each run of rows;
stacked, a batch of matrices), a table is indexed by ids (embedding), and any parameter multiplies a larger tensor
elementwise, broadcast over its leading dimensions (scale), or is added to it (shift).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from fkernel.func.taps.uses import Layer
from fkernel.shapes import Tensor


class Part(NamedTuple):
    """The role of one parameter in a known operation.

    Attributes:
        layer: the kind of its gradient.
        weight: the parameter.
        input: a, i or x; None where not needed, or where `normalised` computes it.
        normalised: computes x on demand, so that it need not be stored.
        ends: end of each matrix's rows, for `grouped`.
    """

    layer: Layer
    weight: Tensor
    input: Tensor | None = None
    normalised: Callable[[], Tensor] | None = None
    ends: Tensor | None = None


def parts_of(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Part]:
    """Return the roles of an operation's tensors, if they are parameters; empty for unknown operations.

    Example:
        >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
        >>> [part.layer for part in parts_of(F.linear, (x, w, torch.ones(4)), {})]
        ['linear', 'shift']
        >>> parts_of(torch.sin, (x,), {})
        ()
    """
    known = _KNOWN.get(func)
    return () if known is None else known(*args, **kwargs)


def _vector(bias: Any) -> list[Part]:
    return [Part("shift", bias)] if isinstance(bias, Tensor) and bias.ndim == 1 else []


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Part]:
    return [Part("linear", weight, input), *_vector(bias)] if weight.ndim == 2 else ()


def _addmm(bias: Tensor, input: Tensor, weight: Tensor, **options: Any) -> Sequence[Part]:
    return () if options else [Part("conv1d", weight, input), *_vector(bias)]


def _matmul(input: Tensor, weight: Tensor, **options: Any) -> Sequence[Part]:
    if options or input.ndim < 2 or weight.ndim not in (2, 3):
        return ()
    if weight.ndim == 2:
        return [Part("conv1d", weight, input)]
    return [Part("stacked", weight, input)] if input.ndim == 3 and len(input) == len(weight) else ()


def _grouped(
    input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Sequence[Part]:
    if input.ndim != 2 or weight.ndim != 3 or offs is None or bias is not None:
        return ()
    return [Part("grouped", weight, input, ends=offs)]


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Sequence[Part]:
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq:
        return ()  # these change the gradient or the weight itself
    return [Part("embedding", weight, input)]


def _getitem(table: Tensor, ids: Any) -> Sequence[Part]:
    is_lookup = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim > 1 and table.ndim == 2
    return [Part("embedding", table, ids)] if is_lookup else ()


def _elementwise(kind: Literal["scale", "shift"]) -> Callable[..., Sequence[Part]]:
    def parts(x: Any, y: Any, **options: Any) -> Sequence[Part]:
        if options or not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return ()
        # Either may be the parameter.
        return [
            Part(kind, small, large if kind == "scale" else None)
            for small, large in ((x, y), (y, x))
            if _is_repeated(small, large)
        ]

    return parts


def _is_repeated(small: Tensor, large: Tensor) -> bool:
    """Return whether a tensor is broadcast over the leading dimension of another one."""
    if large.ndim < 2:
        return False
    return small.ndim < large.ndim or (small.ndim == large.ndim and small.shape[0] == 1)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Sequence[Part]:
    x = input.detach()
    shift = [Part("shift", bias)] if isinstance(bias, Tensor) else []
    return [*_normalised(weight, lambda: F.layer_norm(x, normalized_shape, None, None, eps)), *shift]


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Sequence[Part]:
    x = input.detach()
    return _normalised(weight, lambda: F.rms_norm(x, normalized_shape, None, eps))


def _normalised(weight: Any, make: Callable[[], Tensor]) -> list[Part]:
    return [Part("scale", weight, normalised=make)] if isinstance(weight, Tensor) else []


_KNOWN: dict[Callable[..., Any], Callable[..., Sequence[Part]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    getattr(torch, "_grouped_mm", _grouped): _grouped,  # called by F.grouped_mm, where available
    F.embedding: _embedding,
    torch.Tensor.__getitem__: _getitem,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _elementwise("scale"),
    torch.Tensor.mul: _elementwise("scale"),
    torch.add: _elementwise("shift"),
    torch.Tensor.add: _elementwise("shift"),
}
