"""Tables of analyses, for a terminal, and the registry of their tables, figures and panels of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from fkernel.report import analysis_blocks as pages
from fkernel.report.blocks import Panel
from fkernel.report.comparisons import (
    counterfactuals_panel,
    observable_panel,
    preconditioners_panel,
    uncertainty_panel,
)
from fkernel.report.heatmaps import covariates_panel, tokens_panel
from fkernel.report.panels import ledger_panel, parts_panel, sweep_panel
from fkernel.report.style import signed
from fkernel.report.table import cut
from fkernel.report.tokens import token_table
from fkernel.report.units import PREDICTED
from fkernel.report.update_panels import health_panel, structure_panel
from fkernel.study import AnalysisResult, FisherKernelResults, RequestResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = {
    "unselected": "not selected",
    "floor": "± rounding",
    "part.raised": "advantage > 0",
    "part.lowered": "advantage < 0",
}
MOST_GROUPS = 12


def ledger_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate the ledger of the sequences with the largest changes; the terms add up to realised.

    Args:
        result: of one request whose plan asked for the ledger.
        rows: sequences to show, by the size of their realised change.

    Returns:
        A rich table, 10⁻³ nats; its last line is the mean size of each part over the whole request.

    Raises:
        ResultsError: the ledger was not asked for.
    """
    analysis = result.analysis("ledger")
    columns = {name: 1e3 * values for name, values in analysis.arrays.items()}
    facts = analysis.facts
    table = Table(
        title=f"{result.name}: the ledger (10⁻³ nats; the parts add up to realised)",
        caption=f"gradients scaled by {facts['clip']:.3g} (clipping); those of E are at the step's {facts['path']}; "
        f"remainder {_share(facts['error'])} of the change, rounding alone {_share(facts['floor'])}"
        f"{_unexplained(facts)}{_audited(result)}",
    )
    table.add_column("sequence", no_wrap=True)
    for name in columns:
        heading = HEADS.get(name, name.removeprefix("part."))
        table.add_column(heading, justify="right", style="bold" * (name == "realised"))
    for row in np.argsort(-np.abs(columns["realised"]), kind="stable")[:rows]:
        values = [f"{v[row]:.4f}" if name == "floor" else signed(float(v[row]), 3) for name, v in columns.items()]
        table.add_row(escape(result.evaluation[row].id), *values)
    table.add_section()
    table.add_row(f"mean size of {len(result.evaluation)}", *(f"{np.abs(v).mean():.4f}" for v in columns.values()))
    return table


def _unexplained(facts: dict[str, Any]) -> str:
    """Say how much of the change the step really taken has beyond the step that was executed here."""
    share = facts.get("unexplained")
    return "" if share is None else f"; unexplained {_share(share)}"


def _audited(result: RequestResult) -> str:
    """The audit's verdict, where the step was really taken."""
    verdict = result.facts.get("audit")
    return "" if verdict is None else f"\naudit: {escape(verdict)}"


def sweep_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate relative errors of predictions by step size."""
    analysis = result.analysis("sweep")
    facts = analysis.facts
    ends = {order: _range(facts[f"{order}_holds"]) for order in ("first", "second")}
    caption = f"within {facts['within']:.0%}: first order {ends['first']}, second {ends['second']}, times the step"
    columns = ("times the step", "first order", "second order", "rounding")
    table = _table(f"{result.name}: the step at other sizes", columns, caption)
    every = max(1, len(analysis["scales"]) // max(1, rows))
    for i in range(0, len(analysis["scales"]), every):
        errors = (analysis[name][i] for name in ("first_error", "second_error", "noise"))
        table.add_row(f"{analysis['scales'][i]:.3g}", *(_share(float(error)) for error in errors))
    return table


def parts_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate the shares of Σ|K·A| and of ‖∇S‖² by kind of parameter and by layer."""
    facts = result.analysis("parts").facts
    missed = "–" if facts["missed"] is None else f"{facts['missed']:.0%}"
    caption = f"a method without embedding, positions and head would be off by {missed} of K·A"
    heads = ("kind", "share of what moved", "of ‖∇S‖²", "layer", "share of what moved", "of ‖∇S‖²")
    table, columns = _table(f"{result.name}: through which parameters", heads, caption, left=("kind", "layer")), []
    for view in ("kind", "layer"):
        shares, norms = facts[f"{view}_shares"], facts[f"{view}_norm_shares"]
        largest = sorted(shares, key=lambda group: -shares[group])[:MOST_GROUPS]
        columns.append([(group, f"{shares[group]:.1%}", f"{norms[group]:.1%}") for group in largest])
    for i in range(max(map(len, columns))):
        table.add_row(*(cell for column in columns for cell in (column[i] if i < len(column) else ("", "", ""))))
    return table


def observables_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate other quantities than log π: predicted and realised change, top contributor."""
    given = {part for _, analysis in _of(result, "observables") for part in analysis.arrays}
    measured = [part for part in ("unselected", "realised") if part in given]
    heads = {"unselected": "not selected Δ", "realised": "realised Δ"}
    columns = ("observable", "of", "value", "predicted Δ", *(heads[part] for part in measured), "top contributor")
    left = ("observable", "of", "top contributor")
    table = _table(f"{result.name}: other quantities (10⁻³ of their units)", columns, left=left)
    for name, analysis in _of(result, "observables"):
        predicted = sum(analysis[part] for part in PREDICTED if part in analysis.arrays)
        assert isinstance(predicted, np.ndarray)
        for row in np.argsort(-np.abs(predicted), kind="stable")[: max(1, rows // 2)]:
            contributor = ""
            if analysis["top"].shape[1]:
                u, nats = result.update[analysis["top"][row, 0]], analysis["top_contributions"][row, 0]
                contributor = f"{signed(1e3 * nats, 3)}  {escape(u.id)}"
            changes = [f"{analysis['value'][row]:.4g}", signed(1e3 * float(predicted[row]), 3)]
            changes += [
                signed(1e3 * float(analysis[part][row]), 3) if part in analysis.arrays else "" for part in measured
            ]
            table.add_row(name, escape(analysis.facts["rows"][row]), *changes, contributor)
        table.add_section()
    return table


def counterfactuals_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate counterfactual steps: E's change, and the error of a frozen D."""
    title = f"{result.name}: steps that were not taken (10⁻³ nats, first order)"
    columns = ("had been different", "clip", "mean change", "mean |change|", "frozen off by", "most changed")
    caption = "frozen: with the D of the step that was taken; linear in advantages"
    table = _table(title, columns, caption, left=("had been different", "most changed"))
    for name, analysis in _of(result, "counterfactuals"):
        facts, moved = analysis.facts, 1e3 * (analysis["exact"] - analysis["taken"])
        most = int(np.argmax(np.abs(moved)))
        changed = f"{signed(float(moved[most]))}  {escape(result.evaluation[most].id)}"
        sizes = (signed(1e3 * float(facts["mean_change"]), 3), f"{1e3 * facts['mean_size']:.3f}")
        table.add_row(name, f"{facts['clip']:.3g}", *sizes, _share(facts["frozen_error"]), changed)
    return table


def preconditioners_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate correlations of influences under other preconditioners with the realised change."""
    caption = (
        "correlation of influences with the realised change; without momentum, decay and what is not selected in the "
        "last two"
    )
    columns = ("preconditioner", "r, whole change", "r, batch's part", "rank correlation")
    table = _table(f"{result.name}: which preconditioner matters", columns, caption, left=("preconditioner",))
    for name, agreement in result.analysis("preconditioners").facts["agreement"].items():
        table.add_row(name, *(_number(agreement[key]) for key in ("realised", "of_batch", "rank")))
    return table


def uncertainty_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate intervals of influences over prompts of U, and permutation p-values."""
    analysis = result.analysis("uncertainty")
    facts, prompts = analysis.facts, analysis.facts["prompts"]
    informative, texts = sum(facts["informative"]), {str(info.prompt_id): info.prompt for info in result.update}
    tested = (
        f"p against advantages permuted within prompts, of which {informative} of {len(prompts)} have any to permute"
    )
    caption = f"{facts['coverage']:.0%} intervals by prompt; {facts.get('untested', tested)}"
    columns, left = (
        ("sequence", "Σ C", "interval", "p", "largest prompt", "its Σ C", "p"),
        ("sequence", "largest prompt"),
    )
    table = _table(f"{result.name}: how sure (10⁻³ nats)", columns, caption, left, no_wrap=True)
    for row in np.argsort(-np.abs(result.batch), kind="stable")[:rows]:
        interval = "–"
        if "low" in analysis.arrays:
            interval = " … ".join(signed(1e3 * float(analysis[end][row])) for end in ("low", "high"))
        sums = analysis["prompt_contributions"][row]
        g = int(np.argmax(np.abs(sums)))
        p, of_prompt = (
            ("–", "–")
            if "untested" in facts
            else (f"{x:.3f}" for x in (analysis["p"][row], analysis["prompt_p"][row, g]))
        )
        prompt = (escape(cut(texts.get(prompts[g], str(prompts[g])))), signed(1e3 * float(sums[g])), of_prompt)
        batch = (signed(1e3 * float(result.batch[row])), interval, p)
        table.add_row(escape(result.evaluation[row].id), *batch, *prompt)
    return table


def covariates_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate correlations of changes with covariates, and partial ones given length."""
    facts = result.analysis("covariates").facts
    covariates = [*next(iter(facts["correlations"].values()))]
    title = f"{result.name}: what changes go with (r; with {facts['given']} taken out)"
    table = _table(title, ("change", *covariates), left=("change",))
    for change, row in facts["correlations"].items():
        cells = (f"{_number(row[name]['pearson'])}  ({_number(row[name]['partial'])})" for name in covariates)
        table.add_row(change, *cells)
    return table


def structure_table(results: FisherKernelResults) -> Table:
    """Tabulate the clusters of U, each by its exemplar."""
    analysis = results.analysis("structure")
    facts = analysis.facts
    alignment = facts.get("alignment")  # null where it is not defined
    turned = "" if alignment is None else f"; alignment with K_UU after the step {alignment:.4f}"
    caption = (
        f"{facts['within']:.0%} of the scatter is left within clusters; the first {len(facts['shares'])} principal "
        f"components have {sum(facts['shares']):.0%} of the trace{turned}"
    )
    left = ("exemplar", "prompt and response")
    columns = ("cluster", "sequences", *left)
    table = _table("U: sequences that pull in similar directions", columns, caption, left, no_wrap=True)
    texts = {info.id: info.prompt + info.response for info in results.update}
    for i, (size, exemplar) in enumerate(zip(facts["sizes"], facts["exemplars"], strict=True)):
        table.add_row(str(i), str(size), escape(exemplar), escape(texts[exemplar].replace("\n", "⏎")[-60:]))
    return table


def health_line(results: FisherKernelResults) -> str:
    """One line about coordinates with a small second moment."""
    facts = results.analysis("health").facts
    parts = {"unseen": "were never seen", "below_eps": "are below ε", "smallest": "have the smallest second moment"}
    shares = [
        f"{facts[name]['coordinates']:.1%} {words} and carry {facts[name]['trace']:.1%} of the trace"
        for name, words in parts.items()
        if facts[name] is not None
    ]
    return f"P rests on {facts['coordinates']} coordinates: {', '.join(shares)}."


class AnalysisReport(NamedTuple):
    """The table, the figure and the page's panel of an analysis.

    Attributes:
        table: (result, rows) -> a table of one request; of an analysis of U, results -> a table, or a line.
        figure: result -> a figure.
        page: what the page shows; None shows the table.
        each: for analyses with several named results, each with its figure(result, name): prefix of the file's name.
        in_units: whether the figure takes the contributions' units.
        skipped: format of the line for a skipped analysis of U, with a field for the reason.
    """

    table: Callable[..., RenderableType]
    figure: Callable[..., Figure]
    page: Panel | None = None
    each: str | None = None
    in_units: bool = False
    skipped: str = "U: it was left out: {}."


REPORTS: dict[str, AnalysisReport] = {
    "ledger": AnalysisReport(ledger_table, ledger_panel, pages.LEDGER),
    "uncertainty": AnalysisReport(uncertainty_table, uncertainty_panel, pages.UNCERTAINTY, in_units=True),
    "tokens": AnalysisReport(token_table, tokens_panel, pages.TOKENS),
    "parts": AnalysisReport(parts_table, parts_panel, pages.PARTS),
    "observables": AnalysisReport(
        observables_table, observable_panel, pages.OBSERVABLES, each="observable", in_units=True
    ),
    "counterfactuals": AnalysisReport(counterfactuals_table, counterfactuals_panel, pages.COUNTERFACTUALS),
    "preconditioners": AnalysisReport(preconditioners_table, preconditioners_panel, pages.PRECONDITIONERS),
    "covariates": AnalysisReport(covariates_table, covariates_panel, pages.COVARIATES),
    "sweep": AnalysisReport(sweep_table, sweep_panel, pages.SWEEP),
}
"""Analyses of a request, in the order of their tables; keys are those of `fkernel.study.analyses.registry`."""
UPDATE_REPORTS: dict[str, AnalysisReport] = {
    "structure": AnalysisReport(
        structure_table, structure_panel, pages.STRUCTURE, skipped="U: structure was left out: {}."
    ),
    "health": AnalysisReport(health_line, health_panel, pages.HEALTH, skipped="P: {}"),
}
"""Analyses of U."""


def request_tables(result: RequestResult, rows: int = 10) -> Iterator[RenderableType]:
    """Tables of all analyses of a request; a line with the reason for each skipped one.

    Args:
        result: of one request.
        rows: sequences to show in each table.
    """
    for kind, report in REPORTS.items():
        if any(_of(result, kind)):
            yield report.table(result, rows)
    for name, analysis in result.analyses.items():
        if analysis.skipped is not None:
            yield escape(f"{result.name}: {name} was left out: {analysis.skipped}.")


def update_tables(results: FisherKernelResults) -> Iterator[RenderableType]:
    """Tables of the analyses of U itself."""
    for name, report in UPDATE_REPORTS.items():
        if name in results.analyses:
            reason = results.analyses[name].skipped
            table = report.table(results) if reason is None else report.skipped.format(reason)
            yield escape(table) if isinstance(table, str) else table


def _of(result: RequestResult, kind: str) -> Iterator[tuple[str, AnalysisResult]]:
    """(own name, result) of one kind of analysis, without skipped ones."""
    for name, analysis in result.analyses.items():
        if name.partition(".")[0] == kind and analysis.skipped is None:
            yield name.partition(".")[2] or name, analysis


def _table(
    title: str, columns: Sequence[str], caption: str | None = None, left: Sequence[str] = (), no_wrap: bool = False
) -> Table:
    """An empty table; columns are right-aligned except those in `left`."""
    table = Table(title=title, caption=caption)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=no_wrap)
    return table


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2g}" if value > 10 else f"{value:.3%}"


def _number(value: Any) -> str:
    return "–" if value is None else signed(value, 3)


def _range(ends: Any) -> str:
    return "nowhere" if ends is None else f"{ends[0]:.2g} to {ends[1]:.2g}"
