"""Comparison of preconditioners: influences under each, against the realised change.

    influence_e(P) = ⟨∇S_e, P J_Uᵀ(c w A)⟩                 two jvps each; no kernel

P of the whole ascent is the step that P's optimizer takes on g: use `precond.secant` or `precond.broyden` for another
optimizer, as `precond.alternatives` does, and not its derivative, which along g may be 0. The optimizer's own P, with
the post-step second moment, should match the realised change; the others show the error of a kernel under another P.
An influence has no momentum and decay, so a second column correlates with the realised change without them.

Correlations are independent of scale, so another optimizer's learning rate does not matter; but an influence of mere
rounding would have a correlation too. P is linear, so rescaling the ascent changes only rounding: an influence whose
spread is below `ROUNDINGS` times that change has the correlation NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fkernel import func, tree
from fkernel.boundary import public
from fkernel.engine import mean_ranks, pearson
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import BatchError
from fkernel.func.inputs import Function
from fkernel.precond import Preconditioner
from fkernel.shapes import Tensor, Tree

ROUNDINGS = 30
"""Smallest ratio of an influence's spread to its rounding for which a correlation is computed."""
OTHER_SIZE = 0.7
"""Factor on the ascent for a second evaluation; not a power of two, which would give the same rounding."""


class Agreement(NamedTuple):
    """Agreement of an influence with the realised change.

    Attributes:
        influence: [n_E] of U on E under this P.
        realised: correlation r with the realised change; NaN, as the next two, where the influence is rounding.
        of_batch: r with the realised change less momentum and decay.
        rank: Spearman's correlation with the latter.
    """

    influence: Tensor
    realised: float
    of_batch: float
    rank: float


@public
def compare(
    f: Function,
    params: Tree,
    E: Any,
    ascent: Tree,
    preconditioners: Mapping[str, Preconditioner],
    realised: Tensor,
    others: Tensor,
    *,
    microbatch: int | None = None,
) -> dict[str, Agreement]:
    """Compare influences under several preconditioners with the realised change.

    Args:
        f: S, (params, batch) -> [n].
        params: θ.
        E: the sequences, two or more.
        ascent: J_Uᵀ(c w A), {name: [*shape]}.
        preconditioners: {name: P}.
        realised: [n_E] nats, `fkernel.realised_change`.
        others: [n_E] nats, momentum + decay.
        microbatch: as in `fkernel.kernel`.

    Returns:
        {name: Agreement}, in the order given; a correlation is NaN where a quantity varies by rounding only.

    Raises:
        BatchError: fewer than two sequences, or of different numbers.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> P = {"plain": precond.identity(), "other": precond.diagonal({"w": torch.tensor([1.0, 3.0])})}
        >>> x, moved = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 3.0, 4.0])
        >>> agreements = compare(f, {"w": torch.zeros(2)}, x, {"w": torch.ones(2)}, P, moved, torch.zeros(3))
        >>> {name: round(agreement.realised, 3) for name, agreement in agreements.items()}
        {'plain': 0.756, 'other': 1.0}
    """
    if not len(realised) == len(others) > 1:
        raise BatchError(f"realised is of {len(realised)} sequences, others of {len(others)}; expected two or more.")
    along = func.jvp(f, usual_microbatch(microbatch, E))
    batch, agreements = realised - others, dict[str, Agreement]()
    for name, P in preconditioners.items():
        influence = along(params, E, P(ascent))
        again = along(params, E, P(tree.scale(OTHER_SIZE, ascent))) / OTHER_SIZE
        if _varies(influence, again - influence):
            r = (pearson(influence, realised), pearson(influence, batch))
            agreements[name] = Agreement(influence, *r, pearson(mean_ranks(influence), mean_ranks(batch)))
        else:
            agreements[name] = Agreement(influence, float("nan"), float("nan"), float("nan"))
    return agreements


def _varies(influence: Tensor, rounding: Tensor) -> bool:
    """Return whether an influence varies by more than its rounding."""
    x = influence.double()
    return float((x - x.mean()).norm()) > ROUNDINGS * float(rounding.double().norm())
