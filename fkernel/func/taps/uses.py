"""One use of a parameter by a known layer, and the autograd node that records its cotangent."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fkernel.shapes import Tensor

Layer = Literal["linear", "conv1d", "embedding", "grouped", "stacked", "scale", "shift", "rows", "own"]
"""Kinds of layers; see `fkernel.func.taps.listening`."""


class LayerCall:
    """One use of a parameter by a known layer, with its input and cotangent.

    Attributes:
        parameter: its name.
        layer: the kind of layer.
        input: a_t [n ... t i], or i_t [n ... t].
        cotangent: δ_t [n ... t o], after a reverse pass; None without one.
    """

    def __init__(self, parameter: str, layer: Layer) -> None:
        """Create the use; passes fill in input and cotangent."""
        self.parameter, self.layer = parameter, layer
        self.input: Tensor | None = None
        self.cotangent: Tensor | None = None

    def hear(self, cotangent: Tensor) -> None:
        """Record the cotangent of the layer's output."""
        self.cotangent = cotangent


class _Listener(torch.autograd.Function):
    """The identity, whose backward records the cotangent.

    It is a graph node and not a tensor hook: if f overwrites a layer's output (y += x), hooks on views of it are lost.
    It works in place, so that nothing is copied and f may overwrite the output. A traced `zero` puts it in the graph
    where its input is not.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, zero: Tensor | None, *uses: LayerCall) -> Tensor:
        ctx.uses = uses  # they hold no tensor of the graph, so there is no reference cycle
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        for use in ctx.uses:
            use.hear(cotangents[0])
        return cotangents[0], None, *[None for _ in ctx.uses]


class _Reader(torch.autograd.Function):
    """The same for a constant that is only read, without a copy."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, zero: Tensor, use: LayerCall) -> Tensor:
        ctx.uses = (use,)
        return constant.view_as(constant)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ctx.uses[0].hear(cotangents[0])
        return None, None, None


def listen(out: Tensor, *uses: LayerCall, zero: Tensor | None = None) -> Tensor:
    """Tap a layer's output; a view is copied, since a custom autograd function cannot modify views in place.

    Args:
        out: the output, which may be modified in place.
        uses: those that record the cotangent.
        zero: a traced 0, where the output may have no graph.
    """
    own = out.clone() if out._is_view() or 0 in out.stride() else out
    tapped: Any = _Listener.apply(own, zero, *uses)
    return tapped


def listen_to(constant: Tensor, use: LayerCall, zero: Tensor) -> Tensor:
    """Tap a constant, which must not be overwritten. Arguments as in `listen`."""
    tapped: Any = _Reader.apply(constant, zero, use)
    return tapped
