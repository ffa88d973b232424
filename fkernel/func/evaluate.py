"""f itself, over microbatches and without a graph: order zero of what `fkernel.func.gradient` differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fkernel.func.batch import length
from fkernel.func.boundary import check_output
from fkernel.func.certified import certified
from fkernel.func.microbatch import stacked
from fkernel.func.objective import Function, bare, check_values, name_of, own_width
from fkernel.shapes import Tensor, Tree


def evaluate(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Tensor]:
    """Make the evaluation of f on a batch of any size.

    Args:
        f: (params, batch) -> [n], or [n, ...] for quantities per token.
        microbatch: sequences under way at once; None takes the whole batch.

    Returns:
        (params, batch) -> [n], or f's own shape; no graph is recorded.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: (when called) see `fkernel.func.boundary`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> evaluate(f, microbatch=1)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        tensor([1., 2.])
    """

    def one_microbatch(params: Tree, batch: Any) -> Tensor:
        value = bare(f)(params, batch)
        check_output(value, length(batch), per_sequence=False)
        return value

    rows = stacked(one_microbatch, microbatch, own_width(f))

    def values(params: Tree, batch: Any) -> Tensor:
        with certified(f, params, batch), torch.no_grad():
            out = rows(params, batch)
        check_values(out, name_of(f))
        return out

    return values
