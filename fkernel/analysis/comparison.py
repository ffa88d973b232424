"""Which preconditioner matters: what influences look like under each, held against what really happened.

    influence_e(P) = ⟨∇S_e, P J_Uᵀ(c w A)⟩                 two jvps each; no kernel

P of the whole ascent is the move that P's optimizer makes of g: take `precond.secant` or `precond.broyden` of another
optimizer, as `precond.alternatives` does, and not its derivative, which along g may be 0. The optimizer's own P, in the
form that it divides by (post-step), is held against the realised change; the others say what is lost by a kernel that
takes another. Momentum and decay are no part of an influence, so a second column holds each against the realised change
without them.

Correlations do not see scale: another optimizer's learning rate plays no part. So an influence of nothing but rounding
would have a correlation, too. P is linear, so that another size of the ascent changes rounding and nothing else: an
influence that does not vary by `ROUNDINGS` times what then changes has the correlation NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fkernel import func, tree
from fkernel.engine import mean_ranks, pearson
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import BatchError
from fkernel.func.inputs import Function
from fkernel.precond import Preconditioner
from fkernel.shapes import Tensor, Tree

ROUNDINGS = 30
"""How many times its rounding an influence must vary by, to be held against anything."""
OTHER_SIZE = 0.7
"""Size of the ascent at which an influence is computed once more; no power of two, which would round alike."""


class Agreement(NamedTuple):
    """An influence held against the realised change.

    Attributes:
        influence: [n_E] what U does to E under this P.
        realised: correlation r with the realised change; NaN, as the next two, where the influence is rounding.
        of_batch: r with the realised change less momentum and decay.
        rank: Spearman's correlation with the latter.
    """

    influence: Tensor
    realised: float
    of_batch: float
    rank: float


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
    """Hold influences under several preconditioners against what happened.

    Args:
        f: S, (params, batch) -> [n].
        params: θ.
        E: the sequences, two or more.
        ascent: J_Uᵀ(c w A), {name: [*shape]}.
        preconditioners: {what it is called: P}.
        realised: [n_E] nats, `fkernel.realised_change`.
        others: [n_E] nats, momentum + decay.
        microbatch: as in `fkernel.kernel`.

    Returns:
        {name: Agreement}, in the order given; a correlation of what does not vary, or by rounding only, is NaN.

    Raises:
        BatchError: fewer than two sequences, or of different numbers.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> P = {"plain": precond.identity(), "other": precond.diagonal({"w": torch.tensor([1.0, 3.0])})}
        >>> x, moved = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 3.0, 4.0])
        >>> found = compare(f, {"w": torch.zeros(2)}, x, {"w": torch.ones(2)}, P, moved, torch.zeros(3))
        >>> {name: round(agreement.realised, 3) for name, agreement in found.items()}
        {'plain': 0.756, 'other': 1.0}
    """
    if not len(realised) == len(others) > 1:
        raise BatchError(f"realised is of {len(realised)} sequences, others of {len(others)}; expected two or more.")
    along = func.jvp(f, usual_microbatch(microbatch, E))
    batch, found = realised - others, dict[str, Agreement]()
    for name, P in preconditioners.items():
        influence = along(params, E, P(ascent))
        again = along(params, E, P(tree.scale(OTHER_SIZE, ascent))) / OTHER_SIZE
        if _varies(influence, again - influence):
            r = (pearson(influence, realised), pearson(influence, batch))
            found[name] = Agreement(influence, *r, pearson(mean_ranks(influence), mean_ranks(batch)))
        else:
            found[name] = Agreement(influence, float("nan"), float("nan"), float("nan"))
    return found


def _varies(influence: Tensor, rounding: Tensor) -> bool:
    """Tell whether an influence varies by more than its rounding."""
    x = influence.double()
    return float((x - x.mean()).norm()) > ROUNDINGS * float(rounding.double().norm())
