"""Tables of results, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import numpy as np
from rich.markup import escape
from rich.table import Table

from fkernel.report.style import signed
from fkernel.rollout import GeneratedBatch
from fkernel.study import AnalysisResult, FisherKernelResults, RequestResult, SequenceInfo

CHANCE = 0.05
"""Significance level of contributors."""
EFFECTS = {
    "predicted": "predicted change",
    "batch": "batch",
    "momentum": "momentum",
    "decay": "decay",
    "arithmetic": "arithmetic",
    "unexplained": "unexplained",
    "curvature": "curvature",
    "unselected": "not selected",
    "realised": "realised change",
}


def effects_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate the sequences with the largest changes: predicted, its parts, realised, top contributors.

    Args:
        result: of one request.
        rows: sequences to show, by the size of their realised (or predicted) change.

    Returns:
        A rich table; all changes in thousandths of a nat.
    """
    effects: dict[str, np.ndarray] = {}
    listed = "ledger" in result.analyses  # which has these columns too, and more room
    for name, title in EFFECTS.items():
        values = getattr(result, name)
        if values is not None and not (listed and name in ("arithmetic", "unexplained")):
            effects[title] = values
        if name == "batch" and not listed:
            effects |= {f"of it: {part}": values for part, values in result.parts.items()}
    shown = min(rows, len(result.evaluation))
    which = "the sequence that moved" if shown == 1 else f"the {shown} sequences that moved most"
    table = Table(title=f"{result.name}: {which} (10⁻³ nats)")
    table.add_column("sequence", no_wrap=True)
    for title in effects:
        table.add_column(title, justify="right", style="bold" if "change" in title else None)
    uncertainty = result.analyses.get("uncertainty")
    table.add_column("top three contributors", no_wrap=True)
    if uncertainty is not None:
        told = f"* told apart from chance (p ≤ {CHANCE}); † its prompt is; others could be chance"
        table.caption = str(uncertainty.facts.get("untested", told))
    moved = result.predicted if result.realised is None else result.realised
    for row in np.argsort(-np.abs(moved), kind="stable")[:rows]:
        info = result.evaluation[row]
        changes = [signed(1e3 * float(values[row])) for values in effects.values()]
        contributors = [
            f"{signed(1e3 * nats)}{_mark(uncertainty, result, int(row), u)}  {sequence_text(u, result)}"
            for u, nats in result.top_contributors(int(row), group_identical=True)
        ]
        table.add_row(
            f"{sequence_text(info, result)}\nlog π = {info.logprob:.2f} nats",
            *changes,
            "\n".join(contributors),
            end_section=True,
        )
    return table


def calibration_table(result: RequestResult) -> Table:
    """Tabulate predictions against realised changes: correlation, slope and relative error.

    Without `step.after` the caption says that agreement does not test the optimizer state.
    """
    proven = result.facts.get("realised_on") == "step.after"
    table = Table(title=f"{result.name}: predicted against the step {'really taken' if proven else 'executed here'}")
    if not proven:
        table.caption = (
            "executed from the optimizer's state as it was read: agreement does not show that it was read rightly; "
            "name the checkpoint after the step (step.after) to test that, too"
        )
    for name in ("prediction", "Pearson r", "slope", "relative error"):
        table.add_column(name, justify="left" if name == "prediction" else "right")
    labels = {
        "batch": "batch alone (K·A)",
        "predicted": f"batch + momentum + decay{'' if result.arithmetic is None else ' + arithmetic'}, {result.path}",
    }
    for name, value in result.calibration.items():
        table.add_row(labels[name], f"{value.pearson:.6f}", f"{value.slope:.4f}", f"{value.relative_error:.3%}")
    return table


def pair_view(result: RequestResult, row: str, column: str) -> Table:
    """Show two sequences side by side, with their texts and the kernel's entry.

    Args:
        result: of one request that captured its kernel.
        row: id of a sequence of E.
        column: id of a sequence of U.

    Raises:
        ResultsError: the kernel was not captured, or there is no such sequence.
    """
    e, u = result.row(row), result.column(column)
    K, C = result.kept("kernel")[e, u], result.kept("contributions")[e, u]
    title = f"K = {K:.4g}, cosine {result.cosines[e, u]:+.3f}: {column} moves {row} by {1e3 * C:+.3f} · 10⁻³ nats"
    table = Table(title=title, show_lines=True)
    table.add_column("")
    for info in (result.evaluation[e], result.update[u]):
        table.add_column(info.id, overflow="fold")
    for name in ("prompt", "response", "logprob", "reward", "advantage"):
        values = (getattr(info, name) for info in (result.evaluation[e], result.update[u]))
        shown = (
            "" if value is None else f"{value:.3f}" if isinstance(value, float) else escape(value) for value in values
        )
        table.add_row(name, *shown)
    norms = (result.kept("diagonal")[e], result.kept("update_diagonal")[u])
    table.add_row("√⟨∇S, P ∇S⟩", *(f"{max(value, 0.0) ** 0.5:.4g}" for value in norms))
    return table


def influence_table(
    batch: GeneratedBatch, before: Mapping[str, float], after: Mapping[str, float], rows: int = 20, units: str = "nats"
) -> Table:
    """Tabulate what U's step does to U's own sequences, under the step's advantages and under others.

    Args:
        batch: U.
        before: {id: change} under the step's own advantages.
        after: {id: change} under others, the same ids.
        rows: sequences to show, by the size of their change.
        units: of the changes.
    """
    scale, unit = (1e3, "10⁻³ nats") if units == "nats" else (1.0, units)
    table = Table(title=f"What the update batch does to its own sequences ({unit})")
    changed = dict(before) != dict(after)
    for name in ("sequence", "advantage", "Σ C", *(["under others"] if changed else [])):
        table.add_column(name, justify="left" if name == "sequence" else "right", no_wrap=True)
    for name in sorted(after, key=lambda name: -abs(after[name]))[:rows]:
        record = batch.by_id(name)
        advantage = "" if record.advantage is None else f"{record.advantage:+.3f}"
        changes = [f"{scale * values[name]:+.4g}" for values in (before, *([after] if changed else []))]
        table.add_row(escape(f"{name} {cut(record.prompt)}{cut(record.response)}"), advantage, *changes)
    return table


def study_lines(results: FisherKernelResults) -> list[str]:
    """Lines about the step, certificates, conditions and U."""
    step, kernel = results.step, results.self_kernel
    certificates, conditions = (results.environment.get(name, []) for name in ("certificates", "conditions"))
    lines = [f"Step: clip {step['clip']:.4g}, ‖∇L‖ {step['grad_norm']:.4g}"]
    if "lr" in step:
        lines[0] += f", lr {', '.join(f'{lr:g}' for lr in step['lr'])}"
    lines += [f"Certificate {c['name']} failed: {c['detail']}" for c in certificates if c["passed"] is False]
    if names := ", ".join(dict.fromkeys(c["name"] for c in certificates if c["passed"])):
        lines.append(f"Certified on this model: {names} (environment.json has the numbers).")
    lines += [f"The training did what is not modelled here: {condition['found']}" for condition in conditions]
    if kernel is not None:
        lines.append(
            f"U: {len(kernel.ids)} sequences move along {kernel.effective_rank:.1f} directions (effective rank of "
            f"K_UU); mean |cosine| {_number(kernel.same_prompt[1])} within a prompt, {_number(kernel.cross_prompt[1])} "
            "across."
        )
    return lines


def p_value(analysis: AnalysisResult | None, result: RequestResult, row: int, u: SequenceInfo) -> float | None:
    """The p-value of a contributor to a row, the smallest of identical ones; None where it was not computed."""
    if not _permuted(analysis):
        return None
    if "sequence_p" in analysis.arrays:
        columns = [i for i, other in enumerate(result.update) if other.id == u.id or _identical(other, u)]
        return float(analysis["sequence_p"][row, columns].min())
    if u.times > 1 or result.top is None:
        return None
    ids = [result.update[column].id for column in result.top[row]][: analysis["top_p"].shape[1]]
    return float(analysis["top_p"][row, ids.index(u.id)]) if u.id in ids else None


def _identical(one: SequenceInfo, other: SequenceInfo) -> bool:
    return bool(one.content_hash) and one.content_hash == other.content_hash


def prompt_p(analysis: AnalysisResult | None, row: int, u: SequenceInfo) -> float | None:
    """The p-value of what a contributor's prompt did to a row; None where there is none."""
    if not _permuted(analysis) or u.prompt_id not in analysis.facts["prompts"]:
        return None
    return float(analysis["prompt_p"][row, analysis.facts["prompts"].index(u.prompt_id)])


def batch_p(analysis: AnalysisResult | None, row: int) -> float | None:
    """The p-value of what the whole batch did to a row; None where there is none."""
    return float(analysis["p"][row]) if _permuted(analysis) else None


def _permuted(analysis: AnalysisResult | None) -> TypeGuard[AnalysisResult]:
    return analysis is not None and analysis.skipped is None and any(analysis.facts["informative"])


def _mark(analysis: AnalysisResult | None, result: RequestResult, row: int, u: SequenceInfo) -> str:
    """Significance of a contributor to a row: "*" of itself, "†" of its prompt, or neither."""
    if analysis is None or "top_p" not in analysis.arrays:
        return ""
    p, of_prompt = p_value(analysis, result, row, u), prompt_p(analysis, row, u)
    if p is not None and p <= CHANCE:
        return "*"
    return "†" if of_prompt is not None and of_prompt <= CHANCE else " "


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def sequence_text(info: SequenceInfo, result: RequestResult) -> str:
    """A sequence's id and the end of its text, with ✓ or ✗ where the plan says which rewards are of right answers."""
    right, reward = result.facts.get("correct"), info.reward
    mark = "" if right is None or reward is None else " ✓" if reward >= right else " ✗"
    times = "" if info.times == 1 else f" × {info.times}"
    return escape(f"{info.id} {cut(info.prompt)}{cut(info.response)}{mark}{times}")


def cut(text: str, most: int = 28) -> str:
    """The end of a text, on one line; a prompt's question comes last."""
    plain = text.replace("\n", "⏎")
    return plain if len(plain) <= most else "…" + plain[1 - most :]
