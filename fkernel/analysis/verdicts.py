"""From the coefficients of a step's fit to what is wrong with its description, in words.

A finding is a kind, a sentence for the reader of a report, and the numbers behind it. What is recognised, and by what,
stands in `fkernel.analysis.auditing`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fkernel.analysis.step_fit import Fit
from fkernel.errors import listing
from fkernel.shapes import Tree

KINDS = {
    "names": "names that the step or the executed step lacks",
    "still": "nothing moved",
    "opposite": "the executed step is minus the described one",
    "precision": "most weights did not move at all",
    "reset": "the optimizer had no state",
    "learning_rate": "batch and momentum (and decay) off by one factor",
    "bias_correction": "batch and momentum off by one factor, decay right",
    "sign": "the batch's part has the other sign",
    "clipping": "the batch's part is off by a clipping factor",
    "batch_missing": "the batch's part is not in the step",
    "batch_scale": "the batch's part is off by a factor",
    "part_missing": "a part of the loss is not in the step",
    "part_scale": "a part of the loss is off by a factor",
    "momentum": "momentum is off",
    "no_decay": "weight decay was not applied",
    "decay": "weight decay is off",
    "left": "much is left",
}
"""Kinds of findings, in the order in which they are told."""
NEAR = 0.02
"""Relative distance within which a coefficient is taken for a simple ratio, or for another coefficient."""
CLIPPED = 0.05
"""The same for a clipping factor or threshold, whose size is known: where D is another, a coefficient is less sharp."""
EFFECT = 0.002
"""Share of ‖Δθ‖ that a wrong coefficient must change for a finding."""
THRESHOLDS = (0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
"""Clipping thresholds that people choose."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a step's description.

    Attributes:
        kind: one of `KINDS`.
        sentence: for a reader.
        numbers: behind it: coefficients, "left", "ratio", "max_norm", …
        group: of parameters that it is about; None for all.
    """

    kind: str
    sentence: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {"kind": self.kind, "sentence": self.sentence, "numbers": dict(self.numbers), "group": self.group}


class Clues(NamedTuple):
    """What is known beside the fit.

    Attributes:
        parts: columns that are the batch's.
        clip: c of the described step.
        grad_norm: ‖∇L‖ before clipping; None where unknown.
        next_lr: the next step's learning rate over this one's; None where unknown.
        coefficient: how far a coefficient may be from 1.
        left: the share that may be left.
    """

    parts: Sequence[str]
    clip: float
    grad_norm: float | None
    next_lr: float | None
    coefficient: float
    left: float


def findings_of(fit: Fit, clues: Clues) -> list[Finding]:
    """Say what is wrong with a step, by its fit.

    Args:
        fit: of one group, or of all parameters.
        clues: what else is known.
    """
    if not fit.norm:
        sentence = (
            "no weight moved: the checkpoint after is the one before, or the step is below the weights' precision"
        )
        return [Finding("still", sentence, {"described": fit.described})] if fit.described else []
    if not fit.described:
        return [
            Finding("left", "what is left 100 %: these parameters were thought to stay where they are", {"left": 1.0})
        ]
    much = _much_is_left(fit, clues)
    if fit.left > clues.left and fit.moved < 0.5:
        sentence = f"{fit.moved:.1%} of the weights moved of those that the step moves: it is below their precision"
        return [Finding("precision", sentence, {"moved": fit.moved, "left": fit.left})]
    if much and fit.sign_left < 0.05:
        sentence = "every weight moved by one learning rate against its gradient: the optimizer's state was reset"
        return [Finding("reset", sentence, {"left": fit.left, "sign_left": fit.sign_left})]
    findings = _coefficients(fit, clues) if not much or fit.left <= 0.25 * fit.as_described else []
    explained = findings and fit.left < 0.1 * fit.as_described  # what another D leaves
    return [*findings, *([_left(fit)] if much and not explained else [])]


def _much_is_left(fit: Fit, clues: Clues) -> bool:
    """Whether more is left than the limit, and than rounding leaves."""
    return fit.left > max(clues.left, 2 * fit.rounding)


def _coefficients(fit: Fit, clues: Clues) -> list[Finding]:
    """Findings of single coefficients, the first explanation that fits them together."""
    known = {name: value for name, value in fit.coefficients.items() if value is not None}
    off = {name for name, value in known.items() if abs(value - 1) > _limit(fit, name, clues)}
    if not off:
        return []
    if len(known) > 1 and all(_near(value, -1) for value in known.values()):
        return [Finding("opposite", "the executed step is the opposite: before and after are swapped", known)]
    parts = [name for name in clues.parts if name in known]
    k = _common(fit, parts)
    m, d = known.get("momentum"), known.get("decay")
    findings: list[Finding] = []
    with_momentum = k is not None and m is not None and _alike(fit, "momentum", k)
    with_decay = k is not None and d is not None and _alike(fit, "decay", k)
    if k is not None and off & {*parts} and (with_momentum or (m is None and with_decay)):
        rates = _rates(k, m, d, off, clues)
        return [rates] if d is None or with_decay or rates.kind == "bias_correction" else [rates, _decay(d)]
    if k is not None and off & {*parts}:
        findings.append(_scaled("batch" if len(clues.parts) > 1 else clues.parts[0], k, clues))
    elif k is None:
        findings += [_part(name, known[name]) for name in parts if name in off]
    if m is not None and "momentum" in off:
        findings.append(_momentum(m))
    if d is not None and "decay" in off:
        findings.append(_decay(d))
    return findings


def _slack(fit: Fit, name: str) -> float:
    """How far rounding may move a coefficient: 4 standard errors, or half of all rounding along its column."""
    return max(4 * (fit.errors[name] or 0.0), 0.5 * fit.rounding / fit.shares[name] if fit.shares[name] else 0.0)


def _limit(fit: Fit, name: str, clues: Clues) -> float:
    """How far a coefficient may be from 1 before it is a finding."""
    rest = 2 * fit.left if _much_is_left(fit, clues) else 0.0
    return max(clues.coefficient, rest, _slack(fit, name), EFFECT / fit.shares[name] if fit.shares[name] else 0.0)


def _alike(fit: Fit, name: str, k: float) -> bool:
    """Whether a coefficient is k, as far as can be told."""
    return abs((fit.coefficients[name] or 0.0) - k) <= NEAR * abs(k) + _slack(fit, name)


def _rates(k: float, m: float | None, d: float | None, off: set[str], clues: Clues) -> Finding:
    """Batch and momentum off by the same factor."""
    names = "momentum and batch" if m is not None else "batch and decay"
    numbers = {"ratio": k, **({} if d is None else {"decay": d})}
    if d is not None and "decay" not in off:
        sentence = f"{names} {k:.4f}, decay {d:.4f}: bias correction was left out, or counts other steps"
        return Finding("bias_correction", sentence, numbers)
    if clues.next_lr is not None and _near(k, clues.next_lr, 0.005):
        return Finding("learning_rate", f"{names} {k:.4f}: the learning rate is the next step's", numbers)
    sentence = (
        f"{names} {k:.4f}: the learning rate is {k:.4g} times the described one (another step's of the schedule?)"
        f"{', or bias correction counts other steps' if d is None else ''}"
    )
    return Finding("learning_rate", sentence, numbers)


def _scaled(name: str, k: float, clues: Clues) -> Finding:
    """The batch's part alone is off by a factor."""
    said, numbers = f"{name} {k:.4f}", {name: k}
    if _near(k, -1):
        return Finding("sign", f"{said}: the optimizer maximizes, or the advantages have the other sign", numbers)
    if clues.clip < 1 and _near(k * clues.clip, 1, CLIPPED):
        return Finding("clipping", f"{said}: gradient clipping was not applied (1/c is {1 / clues.clip:.4f})", numbers)
    threshold = None if clues.grad_norm is None else k * clues.clip * clues.grad_norm
    known = None if threshold is None else next((one for one in THRESHOLDS if _near(threshold, one, CLIPPED)), None)
    if known is not None and 1e-4 < k * clues.clip < 1:
        sentence = f"{said}: the gradient was clipped, at max_norm {known:g}"
        return Finding("clipping", sentence, {**numbers, "max_norm": known})
    if abs(k) < 0.05:
        return Finding("batch_missing", f"{said}: the batch's gradient was not in the step", numbers)
    ratio = _simple(k)
    if ratio is None:
        sentence = f"{said}: the loss has another scale (its normaliser, loss weights, advantages), or was clipped"
        return Finding("batch_scale", sentence, numbers)
    n, below = ratio
    missing = "half of the micro-batches are" if n == 2 else f"all but 1 in {n} of the micro-batches are"
    sentence = (
        f"{said}: the loss was divided by gradient accumulation twice, or {missing} missing"
        if below
        else f"{said}: the loss was not divided by gradient accumulation, or the described batch is 1/{n} of the step's"
    )
    return Finding("batch_scale", sentence, {**numbers, "ratio": 1 / n if below else float(n)})


def _part(name: str, a: float) -> Finding:
    """One part of the loss is off, the others are not, or otherwise."""
    numbers = {name: a}
    if abs(a) < 0.05:
        return Finding("part_missing", f"{name} {a:.4f}: the {name} term was not in the loss", numbers)
    if _near(a, -1):
        return Finding("part_scale", f"{name} {a:.4f}: the {name} term has the other sign", numbers)
    return Finding("part_scale", f"{name} {a:.4f}: the {name} term was {a:.4g} times as large in the loss", numbers)


def _momentum(m: float) -> Finding:
    if abs(m) < 0.05:
        sentence = f"momentum {m:.4f}: the optimizer's state was reset, or this was its first step"
        return Finding("reset", sentence, {"momentum": m})
    sentence = f"momentum {m:.4f}: β1 is another, or the momentum is another checkpoint's"
    return Finding("momentum", sentence, {"momentum": m})


def _decay(d: float) -> Finding:
    if abs(d) < 0.05:
        return Finding("no_decay", f"decay {d:.4f}: weight decay was not applied to these parameters", {"decay": d})
    return Finding("decay", f"decay {d:.4f}: weight decay was {d:.4g} times the described one", {"decay": d})


def _left(fit: Fit) -> Finding:
    known = {name: value for name, value in fit.coefficients.items() if value is not None}
    others = [known[name] for name in ("momentum", "decay") if name in known]
    share = f"what is left {fit.left:.2g}" if fit.left < 0.01 else f"what is left {fit.left:.0%}".replace("%", " %")
    sentence = f"{share}: another batch, or other weights"
    coefficients = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
    if others and all(_near(value, 1, 0.05) for value in others):
        sentence += f" ({coefficients}: the batch, for the rest is right)"
    elif coefficients:
        sentence += f" ({coefficients})"
    return Finding("left", sentence, {**known, "left": fit.left})


def merged(
    overall: Sequence[Finding],
    groups: Mapping[str, Sequence[Finding]],
    members: Mapping[str, Sequence[str]],
    idle: Collection[str] = (),
) -> list[Finding]:
    """Tell what holds for every group once, and what holds for some of them by group.

    Args:
        overall: findings of all parameters together.
        groups: {group: findings of its own}.
        members: {group: names of its parameters}.
        idle: groups that neither moved nor were to move.
    """
    groups = {group: group_findings for group, group_findings in groups.items() if group not in idle}
    if len(groups) < 2:
        return [*overall]
    everywhere = [
        one
        for one in overall
        if all(any(_same(one, other) for other in group_findings) for group_findings in groups.values())
    ]
    findings = list(everywhere)
    for group, group_findings in groups.items():
        for one in group_findings:
            if not any(_same(one, other) for other in everywhere):
                about = f"{group} ({len(members[group])} parameters, {listing(members[group], 2)}): {one.sentence}"
                findings.append(replace(one, group=group, sentence=about))
    order = [*KINDS]
    return sorted(findings or overall, key=lambda one: order.index(one.kind))


def names_differ(step: Tree, executed: Tree, columns: Mapping[str, Tree]) -> list[Finding]:
    """Find parameters that the step moves and executed lacks, or that moved and the step lacks."""
    findings = []
    lacking = [name for name in step if name not in executed and any(bool(c[name].any()) for c in columns.values())]
    if lacking:
        sentence = f"the executed step lacks {listing(lacking)}, which the step moves: they are left out"
        findings.append(Finding("names", sentence, {"parameters": float(len(lacking))}))
    unknown = [name for name, Δ in executed.items() if name not in step and bool(Δ.any())]
    if unknown:
        sentence = f"{listing(unknown)} moved, and the step does not have them: they were trained as well"
        findings.append(Finding("names", sentence, {"parameters": float(len(unknown))}))
    return findings


def _same(one: Finding, other: Finding) -> bool:
    """Whether two findings say the same, numbers included."""
    shared = {*one.numbers} & {*other.numbers} - {"left", "moved", "described", "sign_left"}
    rates = {one.kind, other.kind} == {"learning_rate", "bias_correction"}  # without decay they look the same
    alike = one.kind == other.kind or (rates and "decay" not in {*one.numbers} & {*other.numbers})
    return alike and all(one.kind == "left" or _near(one.numbers[key], other.numbers[key], 0.05) for key in shared)


def _common(fit: Fit, parts: Sequence[str]) -> float | None:
    """The factor that all parts share, the larger ones counting for more; None where they do not share one."""
    weights = [fit.shares[part] ** 2 for part in parts]
    if not sum(weights):
        return None
    k = sum(w * (fit.coefficients[part] or 0.0) for w, part in zip(weights, parts, strict=True)) / sum(weights)
    return k if all(_alike(fit, part, k) or _near(fit.coefficients[part] or 0.0, k) for part in parts) else None


def _simple(k: float) -> tuple[int, bool] | None:
    """(n, whether k is 1/n rather than n) for a whole n of 2 … 16, or a power of 2; None for another k."""
    for n in (*range(2, 17), 32, 64, 128, 256):
        if _near(k * n, 1) or _near(k, n):
            return n, k < 1
    return None


def _near(value: float, target: float, tolerance: float = NEAR) -> bool:
    return abs(value - target) <= tolerance * max(abs(target), 1e-9 if target else 1.0)
