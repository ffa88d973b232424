"""One use of a parameter by a known layer, and the node of the graph that hears what comes back to it."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fkernel.shapes import Tensor

Layer = Literal["linear", "conv1d", "embedding", "grouped", "stacked", "scale", "shift", "rows", "own"]
"""From the fourth on they are known to `fkernel.func.taps.batched` only."""


class LayerCall:
    """One use of a parameter by a known layer, with what went in and what came back.

    Attributes:
        parameter: its name.
        layer: the kind of layer.
        input: a_t [n ... t i], or i_t [n ... t].
        cotangent: δ_t [n ... t o], once a reverse pass has run; None where none came back.
    """

    def __init__(self, parameter: str, layer: Layer) -> None:
        """Name the use; input and cotangent come as the passes run."""
        self.parameter, self.layer = parameter, layer
        self.input: Tensor | None = None
        self.cotangent: Tensor | None = None

    def hear(self, cotangent: Tensor) -> None:
        """Take what comes back to the layer's output."""
        self.cotangent = cotangent


class _Listener(torch.autograd.Function):
    """The identity, whose reverse pass keeps what arrives.

    It is a node of the graph and no hook on a tensor: a layer's output that f overwrites afterwards (y += x) is another
    tensor to autograd, and hooks on views of it are lost. It takes the output in place, so that nothing is copied and f
    may overwrite it. A traced `zero` gives it a graph to stand in where nothing before it has one.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, zero: Tensor | None, *uses: LayerCall) -> Tensor:
        ctx.uses = uses  # they hold no tensor of the graph, so nothing here keeps itself alive
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        for use in ctx.uses:
            use.hear(cotangents[0])
        return cotangents[0], None, *[None for _ in ctx.uses]


class _Reader(torch.autograd.Function):
    """The same on a constant that an operation only reads: it need not be copied to be listened to."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, zero: Tensor, use: LayerCall) -> Tensor:
        ctx.uses = (use,)
        return constant.view_as(constant)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ctx.uses[0].hear(cotangents[0])
        return None, None, None


def listen(out: Tensor, *uses: LayerCall, zero: Tensor | None = None) -> Tensor:
    """Put a listener behind a layer's output; a view is copied, for a function of one's own cannot take it in place.

    Args:
        out: the output; it may be taken over in place.
        uses: those that hear what comes back.
        zero: a traced 0, where the output may have no graph of its own.
    """
    own = out.clone() if out._is_view() or 0 in out.stride() else out
    listened: Any = _Listener.apply(own, zero, *uses)
    return listened


def listen_to(constant: Tensor, use: LayerCall, zero: Tensor) -> Tensor:
    """Make of a constant a tensor whose use is heard; nothing may overwrite it. Arguments as in `listen`."""
    listened: Any = _Reader.apply(constant, zero, use)
    return listened
