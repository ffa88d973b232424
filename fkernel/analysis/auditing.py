"""The audit: is the step that was taken the one that is described, and if not, what is wrong with the description?

Δθ_executed is fitted by least squares on the described step's columns (`fkernel.analysis.step_fit`). Where the
description is right every coefficient is 1 and nothing is left. A coefficient that is off names the mistake:

    batch alone k            the loss's scale: gradient accumulation, normaliser, clipping (1/c: not applied), sign
    batch, momentum alike    the learning rate (decay k too), or bias correction (decay 1)
    a part of the batch 0    that term was not in the loss
    momentum 0               the optimizer's state was reset
    decay 0                  weight decay was not applied
    much is left             another batch, or other weights

The fit is of the step AS DESCRIBED: AdamW's D = 1/(√(v'/bc2) + ε) holds the described gradient in v'. A gradient that
is really k times as large has another D, so the batch's coefficient is k times D_true/D and something is left: little
late in a run, where one gradient hardly changes v', and much in its first hundred steps (in the first of all a scale of
the gradient changes nothing). With `respond`, which says what the step would be at other scales s of the batch's parts,
the least squares are taken over s by Gauss and Newton's iteration, and s is reported in place of the coefficient:

    Δθ_executed − batch(s) ≈ Σ_k δ_k ∂Δθ(s)/∂s_k + b momentum(s) + d decay,   s ← s + δ

Where the training rounds more than a few per cent of its step away (bfloat16 weights), subtract what arithmetic did
before: `executed` is then Δθ_after − (Δθ_executed − Δθ_exact).

A coefficient is off where it differs from 1 by more than a limit, by more than 4 of its standard errors, and where that
changes the step by more than 0.2 % and than half of its rounding: a weight decay of 1e-8 a step rounds to nothing in
float32, and is no mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fkernel import tree
from fkernel.analysis.step_fit import Fit, grouped
from fkernel.analysis.verdicts import Clues, Finding, findings_of, merged, names_differ
from fkernel.boundary import public
from fkernel.errors import TreeError, listing
from fkernel.precond import AdamWState, AdamWStep, adamw_response, adamw_step
from fkernel.shapes import Tensor, Tree

COEFFICIENT, LEFT = 0.01, 0.02
"""|coefficient − 1| and the share that is left, above which a step is not the one that is described."""
UNSCALED = ("still", "opposite", "precision", "reset")
"""Findings that no scale of the gradient explains."""
ITERATIONS, CONVERGED, STEP = 25, 1e-4, 1e-4
"""Of the iteration over scales: how many there are at most, the change of a scale at which it ends, and the difference
by which derivatives are taken."""


class Described(NamedTuple):
    """A step in its parts, the batch's by name.

    Attributes:
        batch: {part of the loss: {name: [*shape]}}, such as {"advantage": …, "kl": …}.
        momentum: {name: [*shape]}.
        decay: {name: [*shape]}.
    """

    batch: Mapping[str, Tree]
    momentum: Tree
    decay: Tree


@dataclass(frozen=True)
class Audit:
    """What the audit says of a step.

    Attributes:
        overall: the fit over all parameters.
        groups: {group: the fit over its parameters}.
        findings: what is wrong, the most telling first; () where nothing is.
    """

    overall: Fit
    groups: dict[str, Fit] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def fine(self) -> bool:
        """Whether the step is the one that is described, as far as least squares tell."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """The findings in one text; "the step is the one described" where there are none."""
        return "; ".join(each.sentence for each in self.findings) or "the step is the one described"

    def summary(self) -> dict[str, Any]:
        """Everything as JSON: fits, findings, verdict."""
        return {
            "fine": self.fine,
            "verdict": self.verdict,
            "findings": [each.summary() for each in self.findings],
            "overall": self.overall._asdict(),
            "groups": {name: fit._asdict() for name, fit in self.groups.items()},
        }


@public
def audit(
    step: AdamWStep | Described,
    executed: Tree,
    *,
    params: Tree | None = None,
    groups: Mapping[str, Hashable] | None = None,
    lr: Mapping[str, float] | float | None = None,
    weight_decay: Mapping[str, float] | float | None = None,
    next_lr: Mapping[str, float] | float | None = None,
    clip: float = 1.0,
    grad_norm: float | None = None,
    respond: Callable[[Mapping[str, float]], AdamWStep | Described] | None = None,
    coefficient: float = COEFFICIENT,
    left: float = LEFT,
    summed: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Audit:
    """Hold a step that was taken against the step that is described.

    Δθ_executed ≈ a batch + b momentum + d decay, by least squares; a = b = d = 1 with nothing left is right

    Args:
        step: as described, `precond.adamw_step`; or `Described`, with the batch's part by parts of the loss.
        executed: Δθ as it was taken, {name: [*shape]}: the checkpoint after the step minus the one before, in float32
            or float64.
        params: θ before the step, in the dtype that was trained: what its rounding leaves is then told apart from a
            mistake (in float32 it is 3 % of a step of 1e-6 on weights near 1).
        groups: {name: group}: parameters that the optimizer treats alike. By default those that share (lr,
            weight_decay) where these are given by name, else all together.
        lr: the described step's learning rate, of each parameter or of all.
        weight_decay: its weight decay, likewise.
        next_lr: the next step's learning rate, likewise: it is recognised where the executed step took it.
        clip: c, the factor of gradient clipping that is in the described step: it is recognised where it was not
            applied.
        grad_norm: ‖∇L‖ before clipping: a clipping threshold is recognised from it.
        respond: {part: scale} -> the step if the parts of the gradient were so many times as large, such as
            `described_step` makes; the part of a batch without parts is "batch". It is called some ten times, and only
            where something is left.
        coefficient: how far a coefficient may be from 1.
        left: the share of ‖Δθ‖ that may be left.
        summed: adds up sums over coordinates over all ranks, [k] float64, where trees are this rank's shards.

    Returns:
        An `Audit`: fits overall and by group, and findings.

    Raises:
        TreeError: the trees have no name in common, or shapes differ; names that one of them lacks are a finding.
        NonFiniteError: a value is NaN or infinite.

    Example:
        >>> import torch
        >>> step = AdamWStep({"w": torch.tensor([1.0, 2.0, 0.0])}, {"w": torch.tensor([1.0, 0.0, 1.0])},
        ...                  {"w": torch.zeros(3)})
        >>> audit(step, {"w": torch.tensor([1.5, 1.0, 1.0])}).verdict
        'batch 0.5000: the loss was divided by gradient accumulation twice, or half of the micro-batches are missing'
        >>> audit(step, step.total).verdict
        'the step is the one described'
    """
    columns = _columns(step)
    differing = names_differ(columns["momentum"], executed, columns)
    shared = {name: Δ for name, Δ in executed.items() if name in columns["momentum"]}
    _check(columns, shared)
    if params is not None:
        tree.check_names([name for name in shared if name in params], shared, "params", "executed")
    labels = _labels(shared, groups, lr, weight_decay)
    overall, by_group = grouped(columns, shared, labels, params, summed)
    parts = [name for name in columns if name not in ("momentum", "decay")]
    clues = Clues(parts, clip, grad_norm, _ratio(next_lr, lr, shared), coefficient, left)
    suspected = {one.kind for one in findings_of(overall, clues)}
    if respond is not None and suspected and overall.left > 1e-3 and not suspected & {*UNSCALED}:
        scales = _scales(respond, shared, parts, summed)
        again, by_group_again = grouped(_columns(respond(scales)), shared, labels, params, summed)
        if again.left < 0.5 * overall.left:
            by_group = {group: _at(scales, fit, by_group[group]) for group, fit in by_group_again.items()}
            overall = _at(scales, again, overall)
    each = {group: findings_of(fit, clues) for group, fit in by_group.items()}
    members = {group: [name for name in shared if labels[name] == group] for group in by_group}
    idle = [group for group, fit in by_group.items() if not fit.norm and not fit.described]
    findings = merged(findings_of(overall, clues), each, members, idle)
    return Audit(overall, by_group, (*differing, *findings))


@public
def described_step(params: Tree, gradients: Mapping[str, Tree], state: AdamWState) -> Described:
    """Compute AdamW's step with the batch's part by parts of the loss.

    batch_k = −lr(1−β1)/bc1 · D · g_k,  D of g = Σ_k g_k

    Args:
        params: θ before the step.
        gradients: {part: g_k}, c ∂L_k/∂θ, of each part of the loss; after clipping.
        state: the AdamW state before the step.

    Returns:
        `Described`. For an audit: ``respond=lambda s: described_step(params, {k: tree.scale(s[k], g[k]) for k in g},
        state)``.

    Raises:
        As `precond.adamw_step`.

    Example:
        >>> import torch
        >>> from fkernel.precond import adamw_init
        >>> params = {"w": torch.zeros(1)}
        >>> gradients = {"advantage": {"w": torch.tensor([3.0])}, "kl": {"w": torch.tensor([1.0])}}
        >>> described_step(params, gradients, adamw_init(params, lr=0.5)).batch
        {'advantage': {'w': tensor([-0.3750])}, 'kl': {'w': tensor([-0.1250])}}
    """
    g = dict(tree.add(*gradients.values()))
    step, respond = adamw_step(params, {**g}, state), adamw_response(state, {**g})
    return Described(
        {part: respond(tree.scale(-1.0, own)) for part, own in gradients.items()}, step.momentum, step.decay
    )


def _columns(step: AdamWStep | Described) -> dict[str, Tree]:
    """The columns of the fit; momentum and decay are the last two."""
    first: Any = next(iter(step.batch.values()), None)
    parts: Any = step.batch if isinstance(first, Mapping) else {"batch": step.batch}
    return {**parts, "momentum": step.momentum, "decay": step.decay}


def _check(columns: Mapping[str, Tree], executed: Tree) -> None:
    if not executed:
        raise TreeError(
            f"executed has no parameter of the step, which moves {listing([*columns['momentum']])}; give both under "
            f"the names of named_parameters()."
        )
    for name, column in columns.items():
        tree.check_names(column, columns["momentum"], f"step.{name}", "step.momentum")
        for parameter, Δ in executed.items():
            if column[parameter].shape != Δ.shape:
                raise TreeError(
                    f"executed[{parameter!r}] has shape {list(Δ.shape)}, step.{name}[{parameter!r}] has "
                    f"{list(column[parameter].shape)}."
                )
        tree.check_finite(column, f"step.{name}")
    tree.check_finite(executed, "executed")


def _labels(
    executed: Tree,
    groups: Mapping[str, Hashable] | None,
    lr: Mapping[str, float] | float | None,
    weight_decay: Mapping[str, float] | float | None,
) -> dict[str, str]:
    """{name: group}, groups named for what their parameters share."""
    if groups is not None:
        tree.check_names([name for name in executed if name in groups], executed, "groups", "executed")
        return {name: str(groups[name]) for name in executed}
    of = {"lr": lr, "weight decay": weight_decay}
    by_name = {name: values for name, values in of.items() if isinstance(values, Mapping)}
    if not by_name:
        return dict.fromkeys(executed, "all")
    return {name: ", ".join(f"{key} {values[name]:g}" for key, values in by_name.items()) for name in executed}


def _ratio(
    later: Mapping[str, float] | float | None, now: Mapping[str, float] | float | None, executed: Tree
) -> float | None:
    """The next step's learning rate over this one's; None where they are not both known."""
    if later is None or now is None:
        return None
    name = next(iter(executed))
    pair = [values[name] if isinstance(values, Mapping) else values for values in (later, now)]
    return pair[0] / pair[1] if pair[1] else None


def _scales(
    respond: Callable[[Mapping[str, float]], AdamWStep | Described],
    executed: Tree,
    parts: Sequence[str],
    summed: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Find the scales of the batch's parts at which the described step is nearest to the executed one."""
    scales, labels = dict.fromkeys(parts, 1.0), dict.fromkeys(executed, "all")
    for _ in range(ITERATIONS):
        columns = _columns(respond(scales))
        total = _total(columns)
        moved = {part: _total(_columns(respond({**scales, part: scales[part] + STEP}))) for part in parts}
        slopes = {part: tree.scale(1 / STEP, tree.axpy(-1.0, total, other)) for part, other in moved.items()}
        others = {name: columns[name] for name in ("momentum", "decay")}
        target = {name: Δ - sum(columns[part][name] for part in parts) for name, Δ in executed.items()}
        δ = grouped({**slopes, **others}, target, labels, summed=summed)[0].coefficients
        change = {part: _damped(δ[part] or 0.0, scales[part]) for part in parts}
        scales = {part: scales[part] + change[part] for part in parts}
        if all(abs(change[part]) < CONVERGED * max(1.0, abs(scales[part])) for part in parts):
            break
    return scales


def _damped(change: float, scale: float) -> float:
    """No more than three times the scale at once: the step bends where a gradient outgrows v."""
    most = 3 * max(0.3, abs(scale))
    return max(-most, min(most, change))


def _total(columns: Mapping[str, Tree]) -> Tree:
    return tree.add(*columns.values())


def _at(scales: Mapping[str, float], fit: Fit, linear: Fit) -> Fit:
    """The fit at scales, in units of the step as it is described."""
    s = {name: scales.get(name, 1.0) for name in fit.coefficients}
    a = {name: None if value is None else value * s[name] for name, value in fit.coefficients.items()}
    errors = {name: None if e is None else e * abs(s[name]) for name, e in fit.errors.items()}
    for name, scale in scales.items():
        if abs(scale) < CONVERGED and linear.coefficients[name] is not None:  # at 0 its column vanishes
            a[name], errors[name] = scale, 0.0
    return fit._replace(
        coefficients=a,
        errors=errors,
        as_described=linear.as_described,
        described=linear.described,
        shares=linear.shares,
    )
