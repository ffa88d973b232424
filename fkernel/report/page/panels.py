"""Panels of analyses: what was computed, what was left out and why, and how to ask for what was not asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fkernel.report.analysis_tables import REPORTS, UPDATE_REPORTS, AnalysisReport
from fkernel.report.blocks import Block, Column, facts, lines, printed, table
from fkernel.report.units import Unit
from fkernel.study import AnalysisResult, FisherKernelResults, RequestResult

ASK = "Ask for it under analyses: in the plan, or in one request of it, and run the plan again; it computes this alone."
MOST_ROWS = 10_000
"""Rows of a terminal's table that stands in for blocks."""


def panel(key: str, title: str, question: str, **state: Any) -> dict[str, Any]:
    """A panel.

    Args:
        key: of the analysis.
        title: of the panel.
        question: that it answers.
        **state: `blocks` where it was computed; `left_out`, why it was not; or `ask` and `how`.
    """
    return {"key": key, "title": title, "question": question, **state}


def request_panels(result: RequestResult, unit: Unit) -> list[dict[str, Any]]:
    """A panel for every analysis of the registry, of one request."""
    return [
        each
        for key, report in REPORTS.items()
        for each in _panels(key, report, result.analyses, lambda name, r=report: _request_blocks(r, result, name, unit))
    ]


def update_panels(results: FisherKernelResults, unit: Unit) -> list[dict[str, Any]]:
    """A panel for every analysis of U itself."""
    return [
        each
        for key, report in UPDATE_REPORTS.items()
        for each in _panels(key, report, results.analyses, lambda name, r=report: _update_blocks(r, results, unit))
    ]


def selected_panels(result: RequestResult, unit: Unit) -> list[dict[str, Any]]:
    """A panel of the entries that were asked for by id, if any were."""
    if not result.selected:
        return []
    columns = (
        Column("probe", "probe"), Column("sequence", "sequence"), Column("K", "signed"), Column("cosine", "signed"),
        Column(f"contribution ({unit.name})", "signed"),
    )  # fmt: skip
    rows = [
        (
            each.row,
            each.column,
            each.kernel,
            each.cosine,
            None if each.contribution is None else unit.scale * each.contribution,
        )
        for each in result.selected
    ]
    blocks = [table("Entries of the kernel", columns, rows)]
    return [panel("selected", "selected entries", "What are these pairs to each other?", blocks=blocks)]


def self_kernel_panels(results: FisherKernelResults) -> list[dict[str, Any]]:
    """A panel of K_UU's spectrum, if it was computed."""
    self_kernel = results.self_kernel
    if self_kernel is None:
        return []
    cosines = {"within a prompt": self_kernel.same_prompt[1], "across prompts": self_kernel.cross_prompt[1]}
    shown = {
        "effective rank": f"{self_kernel.effective_rank:.1f} of {len(self_kernel.ids)}",
        "participation": f"{self_kernel.participation:.1f}",
        **{f"mean |cosine| {where}": f"{value:.3f}" for where, value in cosines.items() if value is not None},
    }
    positive = np.where(self_kernel.eigenvalues > 0, self_kernel.eigenvalues, np.nan)
    axes = ("eigenvalue, largest first", "λ")
    blocks = [
        facts(shown),
        lines("Spectrum of K_UU", np.arange(1, len(positive) + 1), {"λ": positive}, axes, logarithmic=True),
    ]
    return [panel("self_kernel", "K_UU", "Along how many directions does the batch move?", blocks=blocks)]


def _panels(
    key: str, report: AnalysisReport, given: Mapping[str, AnalysisResult], blocks: Callable[[str], list[Block]]
) -> list[dict[str, Any]]:
    """The panels of one kind of analysis: one for each that was asked for, or one that says how to ask."""
    question = "" if report.page is None else report.page.question
    names = [name for name in given if name.partition(".")[0] == key]
    if not names:
        ask = f"{key}: true" if report.page is None else report.page.ask
        return [panel(key, key, question, ask=f"analyses:\n  {ask}", how=ASK)]
    computed = {name: given[name].skipped for name in names}
    return [
        panel(name, name.replace(".", ": ", 1), question, blocks=blocks(name.partition(".")[2]))
        if why is None
        else panel(name, name.replace(".", ": ", 1), question, left_out=why)
        for name, why in computed.items()
    ]


def _request_blocks(report: AnalysisReport, result: RequestResult, name: str, unit: Unit) -> list[Block]:
    if report.page is None:
        return printed(report.table(result, MOST_ROWS))
    return report.page.blocks(*((result, name) if name else (result,)), unit)


def _update_blocks(report: AnalysisReport, results: FisherKernelResults, unit: Unit) -> list[Block]:
    return printed(report.table(results)) if report.page is None else report.page.blocks(results, unit)
