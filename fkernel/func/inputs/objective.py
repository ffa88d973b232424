"""f(params, batch) -> [n] that says what is wrong with its batch before it computes.

The engine takes any function. One that carries a `check(batch)` is asked once, outside of every transform: inside a
vmap values cannot be read. Called directly, an `Objective` checks its own input and output, so that no NaN and no
unscorable sequence leaves it silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from fkernel.boundary import public
from fkernel.errors import NonFiniteError
from fkernel.func.inputs.batch import Sequences, check_batch
from fkernel.func.inputs.microbatch import stacked
from fkernel.shapes import Tensor, Tree

Function = Callable[[Tree, Any], Tensor]
"""(params, batch) -> [n], or [n t] for quantities per token."""


@dataclass(frozen=True)
class TokenWeights:
    """What f is, where f(u; θ) = Σ_{t in response} ω_ut log π_θ(u_t | u_<t) + η_ut H_ut, π at a temperature.

    Attributes:
        temperature: τ.
        of: batch of n ↦ its `Sequences`, ω and η, [n t] each; η is None where no entropy counts. Outside of the
            response both count nothing.
    """

    temperature: float
    of: Callable[[Any], tuple[Sequences, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Objective:
    """A function of (params, batch) and the check of its batch.

    Attributes:
        fn: (params, batch) -> [n] or [n t]; pure, differentiable in params.
        check: raises BatchError where the batch cannot be scored.
        name: what a message calls it.
        apply: the model behind it, (params, input_ids, attention_mask) -> logits; None where there is none.
        certify: certifies its values on batches like one; see `fkernel.func.trust.checks`.
        tokens: that it is a weighted sum of token log-probabilities and entropies, so that it may be computed layer by
            layer; see `fkernel.func.layers.cut`. None where it is something else.
    """

    fn: Function
    check: Callable[[Any], None]
    name: str
    apply: Any = None
    certify: Callable[[Any, Tree, Any], None] | None = None
    tokens: TokenWeights | None = None

    @public
    def __call__(self, params: Tree, batch: Any) -> Tensor:
        """Evaluate; check input and output wherever their values can be read."""
        if not is_readable(batch):
            return self.fn(params, batch)
        check_batch(batch)
        self.check(batch)
        if self.certify is not None and not any(map(is_functorch_wrapped_tensor, params.values())):
            self.certify(self, params, batch)
        # Where widths matter, sequences of one length go together, as they do in the engine.
        value = (stacked(self.fn, None, True) if own_width(self) else self.fn)(params, batch)
        check_values(value, self.name)
        return value


def bare(f: Function) -> Function:
    """f without its checks, for the engine, which runs them once a call and not once a microbatch."""
    return f.fn if isinstance(f, Objective) else f


def own_width(f: Function) -> bool:
    """Tell whether f's value of a sequence depends on how wide its batch is, as far as its model says."""
    return isinstance(f, Objective) and bool(getattr(f.apply, "own_width", False))


def name_of(f: Any) -> str:
    """What a message calls f's value."""
    return f.name if isinstance(f, Objective) else "f"


def is_readable(batch: Any) -> bool:
    """Tell whether values can be inspected here, that is, whether we are outside of every vmap."""
    try:
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.sum().item()
    except RuntimeError:
        return False
    return True


def check_values(value: Tensor, name: str) -> None:
    """Raise NonFiniteError naming the first sequence whose value is NaN or infinite."""
    if is_readable(value) and not bool(torch.isfinite(value.sum())):
        rows = (~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero()
        if len(rows):
            row = int(rows[0])
            raise NonFiniteError(
                f"{name} of sequence {{row}} is not finite ({len(rows)} of {len(value)} sequences); look at the "
                f"parameters and at the logits of that sequence.",
                row=row,
            )
