"""Evaluation of f over microbatches, without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.func.inputs.batch import length
from fkernel.func.inputs.leaves import leaves_of
from fkernel.func.inputs.microbatch import stacked
from fkernel.func.inputs.objective import Function, bare, check_values, name_of, own_width
from fkernel.func.inputs.validation import check_output
from fkernel.func.logprob import summed_in_float64
from fkernel.func.trust.checks import certified
from fkernel.shapes import Tensor, Tree


@public
def evaluate(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Tensor]:
    """Return a function that evaluates f on a batch of any size.

    Args:
        f: (params, batch) -> [n], or [n, ...] for quantities per token.
        microbatch: sequences in one pass; None takes the whole batch.

    Returns:
        (params, batch) -> [n], or f's own shape; no graph is recorded. Of params in shards all ranks run the same
        passes, in which each parameter is gathered where it is used.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: (when called) see `fkernel.func.inputs.validation`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> evaluate(f, microbatch=1)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        tensor([1., 2.])
    """
    return _over_microbatches(f, bare(f), microbatch)


@public
def evaluate_in_float64(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Tensor]:
    """Return the same for differences of values, with sums over tokens in float64.

    Arguments and errors as in `evaluate`; see `fkernel.func.logprob.summed_in_float64`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> evaluate_in_float64(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        tensor([1., 2.], dtype=torch.float64)
    """
    values = _over_microbatches(f, summed_in_float64(f), microbatch)
    return lambda params, batch: values(params, batch).double()


def _over_microbatches(f: Function, value_of: Function, microbatch: int | None) -> Callable[[Tree, Any], Tensor]:
    """Evaluate `value_of` over microbatches, checked and certified as f."""

    def one_microbatch(params: Tree, batch: Any) -> Tensor:
        value = leaves_of(params).value(value_of, batch) if isinstance(params, ShardedTree) else value_of(params, batch)
        check_output(value, length(batch), per_sequence=False)
        return value

    rows = stacked(one_microbatch, microbatch, own_width(f))

    @public
    def values(params: Tree, batch: Any) -> Tensor:
        with certified(f, params, batch), torch.no_grad():
            out = rows(params, batch)
        check_values(out, name_of(f))
        return out

    return values
