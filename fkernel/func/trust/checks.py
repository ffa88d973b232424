"""When certificates run, and what happens on failure.

Every new (f, names and shapes of the parameters, kind of batch) is certified on two of the batch's sequences when it is
first evaluated or differentiated, and again for wider batches. Results are cached for the lifetime of f. If gradients
fail, a slower and simpler method is used and certified in turn, with a warning; any other failure is a `ModelError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fkernel.distributed import ShardedTree
from fkernel.errors import FKernelError, ModelError, ModelWarning, listing
from fkernel.func.functional import Apply
from fkernel.func.inputs.batch import find_sequences, take, token_counts, trim, windowed
from fkernel.func.inputs.objective import Function, Objective, bare, name_of, own_width
from fkernel.func.inputs.validation import first_line, translate_errors, validated
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.taps.rows import ONE_AT_A_TIME, handles_of
from fkernel.func.taps.rows import plan_of as uncertified_plan
from fkernel.func.trust.comparisons import (
    Certificate,
    company,
    gradients_in_company,
    rows_against_sum,
    shortest_pair,
    values_against_module,
)
from fkernel.func.trust.memory import Known, keep, known_of, runs
from fkernel.shapes import Tensor, Tree


@contextmanager
def certified(f: Function, params: Tree, batch: Any) -> Iterator[None]:
    """Check the inputs, certify f's values, run the body, and translate errors of torch.func.

    Raises:
        BatchError, TreeError, NonFiniteError: invalid input.
        ModelError: see `fkernel.func.inputs.validation`; or f's values are not the module's, or depend on the rest of
            the batch.
    """
    with validated(f, params, batch):
        certify_values(f, params, batch)
        yield


def certify_values(f: Function, params: Tree, batch: Any) -> None:
    """Certify f's values on batches like this one, unless that was done.

    Raises:
        ModelError: they are not the module's, or depend on the rest of the batch.
    """
    if isinstance(params, ShardedTree):  # which is certified when the model is cut
        return
    known, batch = known_of(f, params, batch), seen_of(f, batch)
    width = _width(batch)
    if known.width >= width:
        return
    if _certify_values(f, params, batch, known):
        known.width = width  # set last, so that a failure is repeated


def seen_of(f: Function, batch: Any) -> Any:
    """Return the batch for certificates: if f is a sum over tokens, a window (`batch.WINDOW`) of long sequences.

    Sequences whose tokens all have weight 0 are left out, where there are others: their gradient is 0 whatever f is.
    """
    if not isinstance(f, Objective) or f.tokens is None:
        return batch
    seen = windowed(batch)
    _, ω, η = f.tokens.of(seen)
    counts = (ω != 0).any(1) if η is None else ((ω != 0) | (η != 0)).any(1)
    return seen if bool(counts.all()) or not bool(counts.any()) else take(seen, counts.nonzero()[:, 0])


def _certify_values(f: Function, params: Tree, batch: Any, known: Known) -> bool:
    """Certify f's values; False where they are not finite, so that no comparison is possible."""
    if not runs("values") and not runs("company"):
        return False
    counts = token_counts(batch)
    row = min(range(len(counts)), key=counts.__getitem__)
    one = trim(take(batch, slice(row, row + 1)))
    with translate_errors(params), _first_time(params), torch.no_grad():
        alone = bare(f)(params, one)
    if not _finite(alone):
        return False  # the check of all values will name the sequence
    apply, sequences = getattr(f, "apply", None), find_sequences(one)
    if runs("values") and isinstance(apply, Apply) and sequences and apply.original is not None:
        with _first_time(params):
            certificate = values_against_module(apply, params, trim(sequences[0]))
        _accept(known, certificate, _OTHER_VALUES)
    if runs("company") and not own_width(f):
        longest = max(range(len(counts)), key=counts.__getitem__)
        beside = take(batch, torch.tensor([row, longest if longest != row else (row + 1) % len(counts)]))
        with translate_errors(params), torch.no_grad():
            values = _together(f, params, beside)
            again = bare(f)(params, one)
        # Values of tokens have the width of the batch.
        t = alone.shape[1] if alone.ndim > 1 else None
        # A value without rows is reported by `check_output`.
        per_row = values.ndim > 0 and values.shape[0] == 2
        together = values if not per_row else values[:1] if t is None else values[:1, :t]
        if per_row and together.shape == alone.shape and _finite(values):
            _accept(known, company(f, alone, together, again), _OTHER_WIDTH)
    return True


def _first_time(params: Tree) -> Any:
    """Restore random states: some modules initialise layers in their first forward pass, and overwrite them."""
    return torch.random.fork_rng(devices={leaf.device for leaf in params.values() if leaf.is_cuda})


def _together(f: Function, params: Tree, beside: Any) -> Tensor:
    try:
        return bare(f)(params, beside)
    except FKernelError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name_of(f)} of one sequence is computed, of two together it fails: {first_line(error)}. Give batches of "
            f"one sequence, or a model that takes several."
        ) from error


_OTHER_VALUES = (
    "The functional copy of the model does not compute what the model itself does: {detail}. Its forward pass may be "
    "patched, or hold something that eager attention does not know; load it afresh with transformers, or give your own "
    "apply(params, input_ids, attention_mask) -> logits."
)
_OTHER_WIDTH = (
    "What a sequence is worth depends on what else is in its batch: {detail}. The model may scale its positions by the "
    "longest sequence, not be causal, or normalise over the batch. If only sequences of one length may share a batch, "
    "say so: make_functional(model, own_width=True)."
)


def plan_of(f: Function, params: Tree, batch: Any) -> GradientPlan:
    """Plan f's gradients, and certify them on batches like this one, unless that was done.

    Raises:
        ModelError: by no method do per-sequence gradients add up to a plain reverse pass.
    """
    known, batch = known_of(f, params, batch), seen_of(f, batch)
    width = _width(batch)
    if known.plan is not None and known.planned >= width:
        return known.plan
    plan = uncertified_plan(f, params, batch) if known.plan is None else known.plan
    counts = token_counts(batch)
    pair = shortest_pair(batch, counts)
    pair = trim(take(pair, slice(0, 1)) if own_width(f) and len({*token_counts(pair)}) > 1 else pair)
    if runs("rows") or runs("company"):
        plan = _certified_plan(f, params, pair, plan, known)
    known.plan, known.planned = plan, width
    return plan


def _certified_plan(f: Function, params: Tree, pair: Any, plan: GradientPlan, known: Known) -> GradientPlan:
    """Certify a plan's gradients; on failure, certify a slower and simpler plan."""
    J, values = handles_of(bare(f), params, pair, plan)
    if not _finite(values):
        return plan
    if runs("rows"):
        certificate, failing, size = rows_against_sum(f, params, pair, J)
        if certificate.passed is False:
            simpler = _simpler(plan)
            if simpler is None:
                raise ModelError(
                    f"The per-sequence gradients of {name_of(f)} do not add up to its gradient: {certificate.detail}. "
                    f"Nothing is computed from them. Does {name_of(f)} treat every sequence by itself?"
                )
            way = "one sequence at a time" if simpler.looped else "under vmap"
            warnings.warn(
                f"Captured gradients of {listing(failing)} do not add up ({certificate.error:.1e} off); they are taken "
                f"{way}, which is slower.",
                ModelWarning,
                stacklevel=2,
            )
            return _certified_plan(f, params, pair, simpler, known)
        keep(known, certificate)
        if size == 0:
            warnings.warn(
                f"{name_of(f)} does not depend on any of the {len(params)} parameters: every gradient is 0. Is the "
                f"model's forward pass patched, so that it runs another module's parameters?",
                ModelWarning,
                stacklevel=2,
            )
    if runs("company") and not own_width(f) and len({*token_counts(pair)}) > 1:
        alone, _ = handles_of(bare(f), params, trim(take(pair, slice(0, 1))), plan)
        _accept(known, gradients_in_company(alone, J), _OTHER_WIDTH)
    return plan


def _simpler(plan: GradientPlan) -> GradientPlan | None:
    """Return the next simpler plan: by one plain pass, by vmap, one at a time."""
    if plan.looped:
        return None
    return GradientPlan() if plan.batched else ONE_AT_A_TIME


def _accept(known: Known, certificate: Certificate, otherwise: str) -> None:
    """Remember a certificate, or raise ModelError where it failed."""
    if certificate.passed is False:
        raise ModelError(otherwise.format(detail=certificate.detail))
    keep(known, certificate)


def _width(batch: Any) -> int:
    return max((one.input_ids.shape[1] for one in find_sequences(batch)), default=0)


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
