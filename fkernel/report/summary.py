"""What a study found, in a few lines: whether the prediction holds, what moved most and by whom, and by which parts."""

from __future__ import annotations

import numpy as np
from rich.markup import escape

from fkernel.report.style import count, signed
from fkernel.report.table import CHANCE, batch_p, p_value, prompt_p, sequence_text
from fkernel.study import FisherKernelResults, RequestResult

PARTS = ("batch", "momentum", "decay", "arithmetic", "unexplained")
FEW = 4
"""Probes of which each is told."""
WORTH = 0.005
"""Share of a change below which a part is not mentioned."""


def findings(results: FisherKernelResults) -> list[str]:
    """Say the three findings that matter, and what failed; markup of rich.

    Args:
        results: of a study.

    Returns:
        Lines: whether the prediction holds, what moved most and by whom, what the changes are made of; then warnings.
    """
    requests = [result for result in results.requests.values() if len(result.evaluation)]
    lines = [_truth(requests)] if requests else []
    if requests:
        lines += _moved_most(requests, results.units)
        lines.append(_made_of(requests))
    return [line for line in lines if line] + warnings_of(results)


def request_lines(results: FisherKernelResults) -> list[str]:
    """A line for each request: sequences, mean size of their changes, error of the prediction."""
    lines = []
    for name, result in results.requests.items():
        n = len(result.evaluation)
        change = float(np.abs(_moved(result)).mean()) if n else 0.0
        text = f"{name}: log π of {count(n, 'sequence')} moved by {_size(change, results.units)} on average"
        if "predicted" in result.calibration:
            text += f"; the prediction is {result.calibration['predicted'].relative_error:.2%} off"
        lines.append(escape(text))
    return lines


def warnings_of(results: FisherKernelResults) -> list[str]:
    """What failed or was left out, a line each."""
    lines = [
        f"Warning: certificate {c['name']} failed: {c['detail']}"
        for c in results.environment.get("certificates", [])
        if c["passed"] is False
    ]
    lines += [f"Warning: {each['found']}" for each in results.environment.get("conditions", [])]
    skipped = dict[str, list[str]]()
    for name, result in [("U", results), *results.requests.items()]:
        for analysis, made in result.analyses.items():
            if made.skipped is not None:
                skipped.setdefault(f"{analysis} was left out: {made.skipped}", []).append(name)
    lines += [f"Left out ({', '.join(names)}): {why}" for why, names in skipped.items()]
    return [escape(line) for line in dict.fromkeys(lines)]


def _truth(requests: list[RequestResult]) -> str:
    """How far the worst request's prediction is from what happened."""
    known = [result for result in requests if "predicted" in result.calibration]
    if not known:
        several = [result for result in requests if result.realised is not None and len(result.evaluation) == 1]
        if several and several[0].momentum is not None:
            return escape(_one(several[0]))
        return "Not compared with what happened: no realised change was measured, or nothing is predicted."
    worst = max(known, key=lambda result: result.calibration["predicted"].relative_error)
    value, audit = worst.calibration["predicted"], worst.facts.get("audit")
    taken = worst.facts.get("realised_on") == "step.after"
    against = "the step really taken" if taken else "the step executed here, from the same optimizer state"
    text = f"Predicted and realised changes ({against}) differ by {value.relative_error:.2%}, r = {value.pearson:.4f}"
    text += f" (worst request: {worst.name})" if len(known) > 1 else ""
    return escape(f"{text}; audit of the weights before and after: {audit}." if audit else f"{text}.")


def _one(result: RequestResult) -> str:
    assert result.realised is not None
    realised, predicted = float(result.realised[0]), float(result.predicted[0])
    off = abs(realised - predicted) / abs(realised) if realised else 0.0
    return f"Predicted and realised change of {result.evaluation[0].id} differ by {off:.2%}."


def _moved_most(requests: list[RequestResult], units: str) -> list[str]:
    """The sequence that moved most, and what moved it; of a few probes written by hand, all of them."""
    written = [result for result in requests if result.kind in ("payload", "custom_sequence")]
    if 0 < sum(len(result.evaluation) for result in written) <= FEW:
        return [line for result in written for line in probe_lines(result, units)]
    result = max(written or requests, key=lambda one: float(np.abs(_moved(one)).max()))
    row = int(np.abs(_moved(result)).argmax())
    change = f"{_change(_moved(result)[row], units)} {_unit(units)}"
    line = f"{sequence_text(result.evaluation[row], result)} moved most: {change}."
    culprits = culprit_lines(result, row, units)
    return [f"{line} Of the batch, most by", *culprits, *_meaning(result)] if culprits else [line]


def probe_lines(result: RequestResult, units: str = "nats") -> list[str]:
    """Say of each sequence how it moved, by which parts, and which sequences of U moved it most; markup of rich.

    Args:
        result: of one request.
        units: of the contributions, "nats" or "bare".
    """
    lines, uncertainty = [], result.analyses.get("uncertainty")
    for row, info in enumerate(result.evaluation):
        p = batch_p(uncertainty, row)
        of_batch = "" if p is None else f" (p {p:.2g})"
        what = "is predicted to move" if result.realised is None else "moved"
        parts = [
            f"{name} {change}{of_batch if name == 'batch' else ''}"
            for name in PARTS
            if (values := getattr(result, name)) is not None and (change := _change(values[row], units)) != "0"
        ]
        lines.append(
            f"{sequence_text(info, result)}: log π {what} by {_change(_moved(result)[row], units)} {_unit(units)}: "
            f"{', '.join(parts)}"
        )
        lines += culprit_lines(result, row, units)
    return lines + _meaning(result)


def culprit_lines(result: RequestResult, row: int, units: str = "nats") -> list[str]:
    """Name the three sequences of U that moved a sequence most, and whether that could be chance.

    Args:
        result: of one request.
        row: of a sequence of E.
        units: of the contributions.
    """
    named, uncertainty = [], result.analyses.get("uncertainty")
    for u, nats in result.top_contributors(row, 3, group_identical=True):
        if abs(nats) < WORTH * abs(_moved(result)[row]):
            break
        p, of_prompt = p_value(uncertainty, result, row, u), prompt_p(uncertainty, row, u)
        chance = "" if p is None else f", p {p:.2g}"
        chance += "" if of_prompt is None else f", its prompt's p {of_prompt:.2g}"
        known = [each for each in (p, of_prompt) if each is not None]
        chance += " (could be chance)" if known and min(known) > CHANCE else ""
        named.append(f"  {sequence_text(u, result)}: {_change(nats, units)}{chance}")
    return named


def _meaning(result: RequestResult) -> list[str]:
    """Say what p is, where there is one, and whether that of a sequence could be small at all."""
    uncertainty = result.analyses.get("uncertainty")
    if batch_p(uncertainty, 0) is None or uncertainty is None:
        return []
    least = min(uncertainty.facts["least"])
    weak = f"; a sequence's cannot be below {least:.2g} here, its prompt's can" if least > CHANCE else ""
    return [f"p: how often as much would be done by chance, with advantages shuffled within prompts{weak}."]


def _made_of(requests: list[RequestResult]) -> str:
    """The parts of the changes, by size over all requests."""
    sizes = {
        name: sum(float(np.abs(values).sum()) for one in requests if (values := getattr(one, name)) is not None)
        for name in PARTS
    }
    total = sum(sizes.values())
    if not total or not any(sizes[name] for name in PARTS[1:]):
        return ""
    shares = {name: size / total for name, size in sizes.items() if size / total >= WORTH}
    listed = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda each: -each[1]))
    return f"What moved the sequences, by size: {listed}."


def _moved(result: RequestResult) -> np.ndarray:
    return result.predicted if result.realised is None else result.realised


def _size(value: float, units: str) -> str:
    return f"{1e3 * value:.2f} · 10⁻³ nats" if units == "nats" else f"{value:.3g} (bare)"


def _change(value: float | np.floating, units: str) -> str:
    """A change without its unit; "0" where it rounds to 0."""
    return signed(1e3 * float(value)) if units == "nats" else f"{value:+.3g}".replace("-", "−")


def _unit(units: str) -> str:
    return "· 10⁻³ nats" if units == "nats" else "(bare)"
