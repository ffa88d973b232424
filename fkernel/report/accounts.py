"""Tables of a plan's analyses, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from fkernel.report.tokens import token_table
from fkernel.study import Finding, FisherKernelResults, RequestResult

PARTS = ("unclipped", "clipping", "momentum", "decay", "remainder", "unselected", "realised", "floor")
"""Lines of a ledger; what parameters did that the plan does not select has one where there are such parameters."""
HEADS = {"unselected": "not selected", "floor": "± rounding"}
PREDICTED = ("batch", "penalty", "momentum", "decay")
"""What a prediction is the sum of, where it is known."""
MOST_GROUPS = 12


def ledger_table(result: RequestResult, rows: int = 10) -> Table:
    """Account for the sequences that moved most: what each part of the step did; the parts add up to realised.

    Args:
        result: of one request whose plan asked for the ledger.
        rows: sequences to show, by the size of their realised change.

    Returns:
        A rich table, 10⁻³ nats; its last line is the mean size of each part over the whole request.

    Raises:
        ResultsError: the ledger was not asked for.
    """
    found = result.analysis("ledger")
    columns = {name: 1e3 * found[name] for name in PARTS if name in found.arrays}
    facts = found.facts
    table = Table(
        title=f"{result.name}: the ledger (10⁻³ nats; the parts add up to realised)",
        caption=f"c = {facts['clip']:.3g}; gradients of E at the {facts['path']} of the step; what remains is "
        f"{_share(facts['error'])} of the change, rounding alone {_share(facts['floor'])}",
    )
    table.add_column("sequence", no_wrap=True)
    for name in columns:
        table.add_column(HEADS.get(name, name), justify="right", style="bold" * (name == "realised"))
    for row in np.argsort(-np.abs(columns["realised"]), kind="stable")[:rows]:
        values = [f"{v[row]:.4f}" if name == "floor" else f"{v[row]:+.3f}" for name, v in columns.items()]
        table.add_row(escape(result.evaluation[row].id), *values)
    table.add_section()
    table.add_row(f"mean size of {len(result.evaluation)}", *(f"{np.abs(v).mean():.4f}" for v in columns.values()))
    return table


def sweep_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate how far predictions carry: relative errors while the step grows."""
    found = result.analysis("sweep")
    facts = found.facts
    ends = {order: _range(facts[f"{order}_holds"]) for order in ("first", "second")}
    table = Table(
        title=f"{result.name}: the step at other sizes",
        caption=f"within {facts['within']:.0%}: first order {ends['first']}, second {ends['second']}, times the step",
    )
    for name in ("times the step", "first order", "second order", "rounding"):
        table.add_column(name, justify="right")
    every = max(1, len(found["scales"]) // max(1, rows))
    for i in range(0, len(found["scales"]), every):
        errors = (found[name][i] for name in ("first_error", "second_error", "noise"))
        table.add_row(f"{found['scales'][i]:.3g}", *(_share(float(error)) for error in errors))
    return table


def parts_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate what moved through which kind of parameter, beside the kind's share of ‖∇S‖²."""
    facts = result.analysis("parts").facts
    missed = "–" if facts["missed"] is None else f"{facts['missed']:.0%}"
    table = Table(
        title=f"{result.name}: through which parameters",
        caption=f"a method without embedding, positions and head would be off by {missed} of K·A",
    )
    for name in ("kind", "share of what moved", "of ‖∇S‖²", "layer", "share of what moved", "of ‖∇S‖²"):
        table.add_column(name, justify="left" if name in ("kind", "layer") else "right")
    columns = []
    for view in ("kind", "layer"):
        shares, norms = facts[f"{view}_shares"], facts[f"{view}_norm_shares"]
        largest = sorted(shares, key=lambda group: -shares[group])[:MOST_GROUPS]
        columns.append([(group, f"{shares[group]:.1%}", f"{norms[group]:.1%}") for group in largest])
    for i in range(max(map(len, columns))):
        table.add_row(*(cell for column in columns for cell in (column[i] if i < len(column) else ("", "", ""))))
    return table


def observables_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate other quantities than log π: predicted change, what happened, and who did it."""
    table = Table(title=f"{result.name}: other quantities (10⁻³ of their units)")
    given = {part for _, found in _of(result, "observables") for part in found.arrays}
    measured = [part for part in ("unselected", "realised") if part in given]
    heads = {"unselected": "not selected Δ", "realised": "realised Δ"}
    for name in ("observable", "of", "value", "predicted Δ", *(heads[part] for part in measured), "top contributor"):
        table.add_column(name, justify="left" if name in ("observable", "of", "top contributor") else "right")
    for name, found in _of(result, "observables"):
        predicted = sum(found[part] for part in PREDICTED if part in found.arrays)
        assert isinstance(predicted, np.ndarray)
        for row in np.argsort(-np.abs(predicted), kind="stable")[: max(1, rows // 2)]:
            culprit = ""
            if found["top"].shape[1]:
                u, nats = result.update[found["top"][row, 0]], found["top_contributions"][row, 0]
                culprit = f"{1e3 * nats:+.3f}  {escape(u.id)}"
            changes = [f"{found['value'][row]:.4g}", f"{1e3 * predicted[row]:+.3f}"]
            changes += [f"{1e3 * found[part][row]:+.3f}" if part in found.arrays else "" for part in measured]
            table.add_row(name, escape(found.facts["rows"][row]), *changes, culprit)
        table.add_section()
    return table


def counterfactuals_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate steps that were not taken: what E would have gained, and how far a frozen D is off."""
    table = Table(
        title=f"{result.name}: steps that were not taken (10⁻³ nats, first order)",
        caption="frozen: with the D of the step that was taken; linear in advantages",
    )
    for name in ("had been different", "clip", "mean change", "mean |change|", "frozen off by", "most changed"):
        table.add_column(name, justify="left" if name in ("had been different", "most changed") else "right")
    for name, found in _of(result, "counterfactuals"):
        facts, moved = found.facts, 1e3 * (found["exact"] - found["taken"])
        most = int(np.argmax(np.abs(moved)))
        told = f"{moved[most]:+.2f}  {escape(result.evaluation[most].id)}"
        sizes = (f"{1e3 * facts['mean_change']:+.3f}", f"{1e3 * facts['mean_size']:.3f}")
        table.add_row(name, f"{facts['clip']:.3g}", *sizes, _share(facts["frozen_error"]), told)
    return table


def preconditioners_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate how influences under other preconditioners correlate with what happened."""
    table = Table(
        title=f"{result.name}: which preconditioner matters",
        caption="correlation of influences with the realised change; without momentum, decay and what is not selected "
        "in the last two",
    )
    for name in ("preconditioner", "r, whole change", "r, batch's part", "rank correlation"):
        table.add_column(name, justify="left" if name == "preconditioner" else "right")
    for name, agreement in result.analysis("preconditioners").facts["agreement"].items():
        table.add_row(name, *(_number(agreement[key]) for key in ("realised", "of_batch", "rank")))
    return table


def uncertainty_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate how sure influences are, by prompts of U, and which prompts are told apart from chance."""
    found = result.analysis("uncertainty")
    facts, prompts = found.facts, found.facts["prompts"]
    told = sum(facts["informative"])
    table = Table(
        title=f"{result.name}: how sure (10⁻³ nats)",
        caption=f"{facts['coverage']:.0%} intervals by prompt; p against advantages permuted within prompts, of which "
        f"{told} of {len(prompts)} have any to permute",
    )
    for name in ("sequence", "Σ C", "interval", "p", "largest prompt", "its Σ C", "p"):
        table.add_column(name, justify="left" if name in ("sequence", "largest prompt") else "right", no_wrap=True)
    for row in np.argsort(-np.abs(result.batch), kind="stable")[:rows]:
        whole = (
            "–" if "low" not in found.arrays else f"{1e3 * found['low'][row]:+.2f} … {1e3 * found['high'][row]:+.2f}"
        )
        sums = found["prompt_contributions"][row]
        g = int(np.argmax(np.abs(sums)))
        prompt = (escape(prompts[g]), f"{1e3 * sums[g]:+.2f}", f"{found['prompt_p'][row, g]:.3f}")
        table.add_row(
            escape(result.evaluation[row].id),
            f"{1e3 * result.batch[row]:+.2f}",
            whole,
            f"{found['p'][row]:.3f}",
            *prompt,
        )
    return table


def covariates_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate what changes go with, and what still does once length is taken out."""
    facts = result.analysis("covariates").facts
    table = Table(title=f"{result.name}: what changes go with (r; with {facts['given']} taken out)")
    table.add_column("change")
    covariates = [*next(iter(facts["correlations"].values()))]
    for name in covariates:
        table.add_column(name, justify="right")
    for what, row in facts["correlations"].items():
        cells = (f"{_number(row[name]['pearson'])}  ({_number(row[name]['partial'])})" for name in covariates)
        table.add_row(what, *cells)
    return table


def structure_table(results: FisherKernelResults) -> Table:
    """Tabulate the clusters of U, each by its exemplar."""
    found = results.analysis("structure")
    facts = found.facts
    alignment = facts.get("alignment")  # null where U has too few sequences, or nothing but norms
    turned = "" if alignment is None else f"; alignment with K_UU after the step {alignment:.4f}"
    table = Table(
        title="U: sequences that pull in similar directions",
        caption=f"{facts['within']:.0%} of the scatter is left within clusters; the first {len(facts['shares'])} "
        f"principal components have {sum(facts['shares']):.0%} of the trace{turned}",
    )
    for name in ("cluster", "sequences", "exemplar", "prompt and response"):
        table.add_column(name, justify="right" if name in ("cluster", "sequences") else "left", no_wrap=True)
    texts = {info.id: info.prompt + info.response for info in results.update}
    for i, (size, exemplar) in enumerate(zip(facts["sizes"], facts["exemplars"], strict=True)):
        table.add_row(str(i), str(size), escape(exemplar), escape(texts[exemplar].replace("\n", "⏎")[-60:]))
    return table


def health_line(results: FisherKernelResults) -> str:
    """Say in a line what P rests on."""
    facts = results.analysis("health").facts
    if "left_out" in facts:
        return f"P: {facts['left_out']}"
    parts = {"unseen": "were never seen", "below_eps": "are below ε", "smallest": "have the smallest second moment"}
    told = [
        f"{facts[name]['coordinates']:.1%} {words} and carry {facts[name]['trace']:.1%} of the trace"
        for name, words in parts.items()
        if facts[name] is not None
    ]
    return f"P rests on {facts['coordinates']} coordinates: {', '.join(told)}."


TABLES: dict[str, Callable[[RequestResult, int], Table]] = {
    "ledger": ledger_table,
    "uncertainty": uncertainty_table,
    "tokens": token_table,
    "parts": parts_table,
    "observables": observables_table,
    "counterfactuals": counterfactuals_table,
    "preconditioners": preconditioners_table,
    "covariates": covariates_table,
    "sweep": sweep_table,
}


def analysis_tables(result: RequestResult, rows: int = 10) -> Iterator[RenderableType]:
    """Tabulate everything that was asked of a request beside its effects; what was left out says why, in a line.

    Args:
        result: of one request.
        rows: sequences to show in each table.
    """
    for kind, table in TABLES.items():
        if any(_of(result, kind)):
            yield table(result, rows)
    for name, finding in result.analyses.items():
        if "left_out" in finding.facts:
            yield escape(f"{result.name}: {name} was left out: {finding.facts['left_out']}.")


def update_tables(results: FisherKernelResults) -> Iterator[RenderableType]:
    """Tabulate what was asked of U itself."""
    structure = results.analyses.get("structure")
    if structure is not None and "left_out" in structure.facts:
        yield escape(f"U: structure was left out: {structure.facts['left_out']}.")
    elif structure is not None:
        yield structure_table(results)
    if "health" in results.analyses:
        yield escape(health_line(results))


def _of(result: RequestResult, kind: str) -> Iterator[tuple[str, Finding]]:
    """Findings of one kind by their own names, but for those that were left out."""
    for name, finding in result.analyses.items():
        if name.partition(".")[0] == kind and "left_out" not in finding.facts:
            yield name.partition(".")[2] or name, finding


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2g}" if value > 10 else f"{value:.3%}"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _range(ends: Any) -> str:
    return "nowhere" if ends is None else f"{ends[0]:.2g} to {ends[1]:.2g}"
