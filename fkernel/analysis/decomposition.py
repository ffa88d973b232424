"""Decomposition of a step's realised change into its causes, in nats; the parts add up by construction.

    realised_e = Σ_parts batch_e + momentum_e + decay_e + arithmetic_e + unexplained_e + remainder_e

    batch         Σ_u C_eu, by part where the loss has several
    arithmetic    ⟨ḡ_e, Δθ_executed − Δθ⟩        the effect of rounding in the training's own precision
    unexplained   ⟨ḡ_e, Δθ_after − Δθ_executed⟩  the rest of the step that was taken; large if U is not its batch
    remainder     realised − all of the above     the path's error (third order and beyond), and rounding
    floor         size of the rounding in `realised`: a remainder below it is not significant

The floor. S is evaluated at θ and at θ + Δθ, each time in arithmetic of unit roundoff u. A backward-stable evaluation
is exact for parameters that are off by relative errors of size u, and θ + Δθ is itself rounded to such numbers; errors
of different coordinates are taken to be independent, so

    floor_e² = κ² u² (2 Σ_α (θ_α ∂_α S_e)² + 2 S_e²)

Activations are rounded too, layer after layer: κ says by how much more, and is measured (`floor_scale`), on a few
sequences that are evaluated in float64 beside.

Source: N. Higham, "Accuracy and stability of numerical algorithms" (2002), chapters 1 and 2, for backward errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fkernel import func, tree
from fkernel.boundary import public
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import BatchError
from fkernel.func.inputs import Function, take
from fkernel.shapes import Tensor, Tree


class Ledger(NamedTuple):
    """[n_E] nats each; `closed` is the sum of all but the last two, and equals `realised`.

    Attributes:
        batch: {part: …} what the parts of the loss did; {"batch": …} where it has one.
        momentum: from gradients of earlier steps.
        decay: from weight decay.
        departures: {"arithmetic": …, "unexplained": …}, those that are known.
        remainder: the rest.
        realised: S after the step minus S before.
        floor: size of the rounding in `realised`.
    """

    batch: dict[str, Tensor]
    momentum: Tensor
    decay: Tensor
    departures: dict[str, Tensor]
    remainder: Tensor
    realised: Tensor
    floor: Tensor

    @property
    def terms(self) -> dict[str, Tensor]:
        """What adds up to `realised`, in order."""
        known = {**self.batch, "momentum": self.momentum, "decay": self.decay, **self.departures}
        return {**known, "remainder": self.remainder}

    @property
    def closed(self) -> Tensor:
        """[n_E] nats, the sum of the terms."""
        return torch.stack([*self.terms.values()]).sum(0)


@public
def ledger(
    *,
    batch: Tensor | Mapping[str, Tensor],
    momentum: Tensor,
    decay: Tensor,
    realised: Tensor,
    floor: Tensor,
    departures: Mapping[str, Tensor] | None = None,
) -> Ledger:
    """Decompose the realised change of a step.

    Args:
        batch: [n_E] nats, Σ_u C_eu, such as `StepEffect.batch`; or {part: [n_E]} of the loss's parts.
        momentum: [n_E] nats.
        decay: [n_E] nats.
        realised: [n_E] nats, `fkernel.realised_change`.
        floor: [n_E] nats, `rounding_floor`.
        departures: {"arithmetic": [n_E], "unexplained": [n_E]}, those that are known.

    Raises:
        BatchError: they are of different numbers of sequences.
        NonFiniteError: one of them holds a NaN or an infinity.

    Example:
        >>> half, zero = torch.tensor([0.5]), torch.zeros(1)
        >>> entries = ledger(batch=half, momentum=zero + 1, decay=zero, realised=torch.tensor([1.75]), floor=zero)
        >>> {name: value.item() for name, value in entries.terms.items()}
        {'batch': 0.5, 'momentum': 1.0, 'decay': 0.0, 'remainder': 0.25}
    """
    parts = dict(batch) if isinstance(batch, Mapping) else {"batch": batch}
    others = dict(departures or {})
    given = {**parts, "momentum": momentum, "decay": decay, **others, "realised": realised, "floor": floor}
    tree.check_finite(given, "ledger")
    known = [*parts.values(), momentum, decay, *others.values()]
    sizes = [*map(len, (*known, realised, floor))]
    if len({*sizes}) > 1:
        raise BatchError(f"The parts, realised and floor are of {sizes} sequences; expected one number of them.")
    return Ledger(parts, momentum, decay, others, realised - torch.stack(known).sum(0), realised, floor)


@public
def rounding_floor(f: Function, params: Tree, E: Any, *, microbatch: int | None = None) -> Tensor:
    """Estimate the rounding in a realised change, of parameters and of f: κ = 1.

    u √(2 Σ_α (θ_α ∂_α f_e)² + 2 f_e²),  u half of the dtype's ε

    Args:
        f: (params, batch) -> [n].
        params: θ.
        E: the sequences.
        microbatch: as in `fkernel.kernel`.

    Returns:
        [n_E] in f's units. A size, not a bound; times `floor_scale` it has the rounding of activations in it.

    Raises:
        As `fkernel.kernel`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> bool(rounding_floor(f, {"w": torch.ones(2)}, torch.eye(2))[0] < 2e-7)
        True
    """
    m = usual_microbatch(microbatch, E)
    value, handles = func.evaluate(f, m)(params, E), func.per_sequence_handles(f, m)
    rows = [slice(i, i + m) for i in range(0, len(value), m)]  # holds gradients of one microbatch at a time
    squares = {name: leaf.square() for name, leaf in params.items()}
    moved = [func.squared_norms(handles(params, take(E, some)), diagonal=squares).weighted for some in rows]
    return floor_from(torch.cat(moved), value, next(iter(params.values())).dtype)


@public
def floor_from(moved: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Estimate the same from known Σ_α (θ_α ∂_α f_e)².

    Args:
        moved: [n] Σ_α (θ_α ∂_α f_e)².
        value: [n] f.
        dtype: of the passes that measure realised changes.

    Returns:
        [n] in f's units, float64.

    Example:
        >>> floor_from(torch.zeros(1), torch.zeros(1), torch.float32)
        tensor([0.], dtype=torch.float64)
    """
    tree.check_finite({"moved": moved, "value": value}, "floor_from")
    return torch.finfo(dtype).eps / 2 * (2 * moved.double() + 2 * value.double().square()).sqrt()


@public
def floor_scale(changes: Tensor, exact: Tensor, floor: Tensor) -> float:
    """Measure κ, of sequences whose change was evaluated in float64 beside.

    κ = √(mean of ((Δ − Δ_float64)/floor)²), and not below 1

    Args:
        changes: [n] Δ, as it is measured in the study's dtype.
        exact: [n] Δ of the same sequences and parameters in float64.
        floor: [n] `rounding_floor` of the same.

    Example:
        >>> floor_scale(torch.tensor([3.0, -3.0]), torch.zeros(2), torch.ones(2))
        3.0
    """
    tree.check_finite({"changes": changes, "exact": exact, "floor": floor}, "floor_scale")
    ratios = (changes.double() - exact.double()) / floor.double().clamp(min=torch.finfo(torch.float64).tiny)
    κ = max(1.0, float(ratios.square().mean().sqrt()))
    if not math.isfinite(κ):
        raise BatchError(f"floor is {floor.tolist()[:4]} …, no floor of these changes; expected `rounding_floor`'s.")
    return κ
