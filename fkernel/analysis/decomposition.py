"""Where a step's change came from, entry by entry, in nats; the ledger closes by construction.

    realised_e = unclipped_e + clipping_e + momentum_e + decay_e + remainder_e

    unclipped    Σ_u w_u A_u ⟨ḡ_e, P_step ∇S_u⟩         what the batch would have done without clipping, D held fixed
    clipping     (c − 1) · unclipped                    what clipping took away; their sum is Σ_u C_eu
    remainder    realised − all of the above            what the path leaves (third order and beyond), and rounding
    floor        size of the rounding in `realised`     a remainder below it means nothing

The floor. S is evaluated at θ and at θ + Δθ, each time in arithmetic of unit roundoff u. A backward-stable evaluation
is exact for parameters that are off by relative errors of size u, and θ + Δθ is itself rounded to such numbers; errors
of different coordinates are taken to be independent, so

    floor_e² = u² (2 Σ_α (θ_α ∂_α S_e)² + 2 S_e²)

Source: N. Higham, "Accuracy and stability of numerical algorithms" (2002), chapters 1 and 2, for backward errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import BatchError
from fkernel.func.inputs import Function, take
from fkernel.shapes import Tensor, Tree


class Ledger(NamedTuple):
    """[n_E] nats each; `closed` is the sum of the first five, and equals `realised`.

    Attributes:
        unclipped: what the batch would have done without clipping.
        clipping: what clipping took away.
        momentum: from gradients of earlier steps.
        decay: from weight decay.
        remainder: what is left.
        realised: S after the step minus S before.
        floor: size of the rounding in `realised`.
    """

    unclipped: Tensor
    clipping: Tensor
    momentum: Tensor
    decay: Tensor
    remainder: Tensor
    realised: Tensor
    floor: Tensor

    @property
    def closed(self) -> Tensor:
        """[n_E] nats, the sum of the parts."""
        return torch.stack(self[:5]).sum(0)


def ledger(
    *,
    batch: Tensor,
    momentum: Tensor,
    decay: Tensor,
    realised: Tensor,
    floor: Tensor,
    clip: float,
) -> Ledger:
    """Account for a step.

    Args:
        batch: [n_E] nats, Σ_u C_eu, such as `StepEffect.batch`; the next three and c are of the same.
        momentum: [n_E] nats.
        decay: [n_E] nats.
        realised: [n_E] nats, `fkernel.realised_change`.
        floor: [n_E] nats, `rounding_floor`.
        clip: c.

    Raises:
        BatchError: they are of different numbers of sequences.

    Example:
        >>> half, zero = torch.tensor([0.5]), torch.zeros(1)
        >>> parts = {"batch": half, "momentum": zero + 1, "decay": zero}
        >>> found = ledger(**parts, realised=torch.tensor([1.75]), floor=zero, clip=0.5)
        >>> found.unclipped.item(), found.clipping.item(), found.remainder.item()
        (1.0, -0.5, 0.25)
    """
    sizes = [*map(len, (batch, momentum, decay, realised, floor))]
    if len({*sizes}) > 1:
        raise BatchError(f"The parts, realised and floor are of {sizes} sequences; expected one number of them.")
    unclipped = batch / clip
    clipping = batch - unclipped
    known = unclipped + clipping + momentum + decay
    return Ledger(unclipped, clipping, momentum, decay, realised - known, realised, floor)


def rounding_floor(f: Function, params: Tree, E: Any, *, microbatch: int | None = None) -> Tensor:
    """Estimate the rounding in a realised change.

    u √(2 Σ_α (θ_α ∂_α f_e)² + 2 f_e²),  u half of the dtype's ε

    Args:
        f: (params, batch) -> [n].
        params: θ.
        E: the sequences.
        microbatch: as in `fkernel.kernel`.

    Returns:
        [n_E] in f's units. A size, not a bound: what is seen may be a few times as large.

    Raises:
        As `fkernel.kernel`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> bool(rounding_floor(f, {"w": torch.ones(2)}, torch.eye(2))[0] < 2e-7)
        True
    """
    m = usual_microbatch(microbatch, E)
    value, handles = func.evaluate(f, m)(params, E), func.per_sequence_handles(f, m)
    rows = [slice(i, i + m) for i in range(0, len(value), m)]  # no more gradients are held than a microbatch has
    squares = {name: leaf.square() for name, leaf in params.items()}
    moved = [func.squared_norms(handles(params, take(E, some)), diagonal=squares).weighted for some in rows]
    return floor_from(torch.cat(moved), value, next(iter(params.values())).dtype)


def floor_from(moved: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Estimate the same where Σ_α (θ_α ∂_α f_e)² is known already.

    Args:
        moved: [n] Σ_α (θ_α ∂_α f_e)².
        value: [n] f.
        dtype: of the passes that realised changes are measured by.

    Returns:
        [n] in f's units, float64.

    Example:
        >>> floor_from(torch.zeros(1), torch.zeros(1), torch.float32)
        tensor([0.], dtype=torch.float64)
    """
    return torch.finfo(dtype).eps / 2 * (2 * moved.double() + 2 * value.double().square()).sqrt()
