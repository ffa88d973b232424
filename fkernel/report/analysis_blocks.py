"""What the page shows of every analysis: tables and charts of all its rows, as blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from fkernel.report.blocks import Block, Column, Panel, bars, facts, heat, intervals, lines, paragraph, points, table
from fkernel.report.style import analysis_result, largest, percent
from fkernel.report.units import PREDICTED, UNITS, Unit, labelled
from fkernel.study import FisherKernelResults, RequestResult

MOST_BARS = 24


def ledger_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """Terms of every sequence's change, which add up to what was measured."""
    analysis = analysis_result(result, "ledger")
    columns = [Column("probe", "probe")]
    columns += [Column(labelled(name), "number" if name == "floor" else "signed") for name in analysis.arrays]
    scaled = {name: unit.scale * values for name, values in analysis.arrays.items()}
    rows = [(info.id, *(values[row] for values in scaled.values())) for row, info in enumerate(result.evaluation)]
    shares = {name: percent(analysis.facts.get(name)) for name in ("error", "arithmetic", "unexplained", "floor")}
    shown = {
        "remainder, of the change": shares["error"],
        "rounding, of the change": shares["floor"],
        **{name: shares[name] for name in ("arithmetic", "unexplained") if analysis.facts.get(name) is not None},
        "gradients of the probes at": analysis.facts["path"],
        "gradients are scaled by (clipping)": f"{analysis.facts['clip']:.4g}",
    }
    return [
        facts(shown),
        table(f"Terms of the change ({unit.name})", columns, rows, "the terms add up to the measured change"),
    ]


def uncertainty_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """Intervals of influences over prompts of U, and permutation p-values."""
    analysis = analysis_result(result, "uncertainty")
    prompts, ends = analysis.facts["prompts"], ("low", "high")
    known = all(end in analysis.arrays for end in ends)
    best = np.abs(analysis["prompt_contributions"]).argmax(1) if prompts else np.zeros(len(result.batch), dtype=int)
    texts = {info.prompt_id: info.prompt for info in result.update}
    rows = [
        (
            info.id,
            unit.scale * result.batch[row],
            *(unit.scale * analysis[end][row] if known else None for end in ends),
            analysis["p"][row],
            texts.get(prompts[best[row]], prompts[best[row]]),
            unit.scale * analysis["prompt_contributions"][row, best[row]],
            analysis["prompt_p"][row, best[row]],
        )
        for row, info in enumerate(result.evaluation)
    ]
    columns = (
        Column("probe", "probe"), Column("batch", "signed", "what the update batch did"), Column("low", "signed"),
        Column("high", "signed"), Column("p", "p", "against advantages permuted within prompts"),
        Column("strongest prompt"), Column("its sum", "signed"), Column("its p", "p"),
    )  # fmt: skip
    coverage = f"{analysis.facts['coverage']:.0%}"
    order = largest(result.batch, MOST_BARS)[::-1]
    shown = [
        table(
            f"How sure the batch's effect is ({unit.name}; {coverage} intervals by prompt)",
            columns,
            rows,
            analysis.facts.get("untested", ""),
        ),
    ]
    if known:
        low, high = (unit.scale * analysis[end][order] for end in ends)
        ids = [result.evaluation[row].id for row in order]
        title, axis = f"{coverage} intervals of the largest effects", f"what the update batch did ({unit.name})"
        shown.insert(0, intervals(title, ids, unit.scale * result.batch[order], low, high, axis, "probe"))
    return shown


def tokens_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """Responses with coloured tokens; the page draws them, from the tokens that it has beside the probes."""
    analysis = analysis_result(result, "tokens")
    pairs = [(pair["row"], pair["column"]) for pair in analysis.facts["pairs"]]
    columns = (Column("probe", "probe"), Column("sequence", "sequence"))
    shown: list[Block] = [paragraph("Predicted change of every token; hover for nats."), {"kind": "tokens"}]
    return [*shown, table("Token × token kernels that were computed", columns, pairs)] if pairs else shown


def parts_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """Shares of what moved, and of gradients' squared norms, by kind of parameter and by layer."""
    given = analysis_result(result, "parts").facts
    shown = []
    for view, title in (("kind", "By kind of parameter"), ("layer", "By layer")):
        shares, norms = given[f"{view}_shares"], given[f"{view}_norm_shares"]
        names = [*shares][::-1]
        series = {
            "share of what moved": [100 * shares[name] for name in names],
            "share of ‖∇S‖²": [100 * norms[name] for name in names],
        }
        shown.append(bars(title, names, series, "%"))
    if given["missed"] is not None:
        text = f"A method without embedding, positions and head would be off by {percent(given['missed'])} of K·A."
        shown.append(paragraph(text))
    return shown


def observable_blocks(result: RequestResult, name: str, unit: Unit) -> list[Block]:
    """Another quantity than log π: its value, predicted and measured change, and its top contributor."""
    analysis = analysis_result(result, f"observables.{name}")
    unit_name, ids = UNITS.get(analysis.facts["kind"], "nats"), analysis.facts["rows"]
    scaled = f"10⁻³ {unit_name}"
    known = [part for part in PREDICTED if part in analysis.arrays]
    predicted = 1e3 * sum((analysis[part] for part in known), np.zeros(len(ids)))
    columns = [Column("of"), Column("value", "number"), Column("predicted", "signed")]
    values = [analysis["value"], predicted]
    for part in (*known, "curvature", "unselected", "realised"):
        if part in analysis.arrays:
            columns.append(Column(labelled(part), "signed"))
            values.append(1e3 * analysis[part])
    columns += [Column("top contributor", "sequence"), Column("its contribution", "signed")]
    top = [
        (result.update[analysis["top"][row, 0]].id, 1e3 * analysis["top_contributions"][row, 0])
        if analysis["top"].shape[1]
        else (None, None)
        for row in range(len(ids))
    ]
    rows = [(ids[row], *(float(each[row]) for each in values), *top[row]) for row in range(len(ids))]
    shown = [table(f"{name} ({analysis.facts['kind']}; changes in {scaled})", columns, rows)]
    if "realised" in analysis.arrays and len(ids) > 1:
        axes = (f"predicted ({scaled})", f"measured ({scaled})")
        shown.insert(0, points("Predicted and measured", predicted, 1e3 * analysis["realised"], ids, axes,
                               diagonal=True))  # fmt: skip
    return shown


def counterfactual_blocks(result: RequestResult, name: str, unit: Unit) -> list[Block]:
    """The step under other conditions, beside the one that was taken."""
    analysis = analysis_result(result, f"counterfactuals.{name}")
    given, ids = analysis.facts, [info.id for info in result.evaluation]
    taken, exact, frozen = (unit.scale * analysis[each] for each in ("taken", "exact", "frozen"))
    changed = ", ".join(f"{key}: {_said(value)}" for key, value in given["changed"].items()) or "nothing"
    shown = {
        "what is different": changed,
        "gradients are scaled by (clipping)": f"{given['clip']:.4g}",
        f"mean change against the step taken ({unit.name})": unit(given["mean_change"]),
        f"mean size of that change ({unit.name})": unit(given["mean_size"]),
        "error of a frozen preconditioner": percent(given["frozen_error"]),
    }
    columns = (
        Column("probe", "probe"), Column("taken", "signed", "first order, of the step that was taken"),
        Column("instead", "signed", "first order, with the second moment that the other step would have"),
        Column("difference", "signed"), Column("with a frozen preconditioner", "signed"),
    )  # fmt: skip
    rows = [(ids[row], taken[row], exact[row], exact[row] - taken[row], frozen[row]) for row in range(len(ids))]
    axes = (f"the step taken ({unit.name}, first order)", f"the other step ({unit.name})")
    return [
        facts(shown),
        points(f"{name}: what each probe would have done", taken, exact, ids, axes, diagonal=True, opens="probe"),
        table(f"{name} ({unit.name}; first order at the checkpoint)", columns, rows),
    ]


def preconditioners_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """How well influences under other preconditioners agree with the measured change."""
    given = analysis_result(result, "preconditioners").facts
    agreement, titles = given["agreement"], {
        "realised": "r with the whole change", "of_batch": "r with the batch's part", "rank": "rank correlation",
    }  # fmt: skip
    names = [*agreement][::-1]
    series = {title: [_or_nan(agreement[name][key]) for name in names] for key, title in titles.items()}
    note = "the last two without momentum, decay and what is not selected"
    columns = [Column("preconditioner"), *(Column(title, "signed") for title in titles.values())]
    rows = [(name, *(agreement[name][key] for key in titles)) for name in agreement]
    return [
        bars("Agreement with the measured change", names, series, "correlation", note=note),
        table("", columns, rows),
    ]


def covariates_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """Correlations of changes with covariates."""
    given = analysis_result(result, "covariates").facts
    correlations, shown = given["correlations"], []
    changes, covariates = [*correlations], [*next(iter(correlations.values()))]
    titles = {
        "pearson": "Pearson's r", "spearman": "Spearman's rank correlation",
        "partial": f"Partial correlation, {given['given']} taken out",
    }  # fmt: skip
    for key, title in titles.items():
        cells = [[_or_nan(correlations[change][name][key]) for name in covariates] for change in changes]
        shown.append(heat(title, changes, covariates, cells, limit=1.0))
    return shown


def sweep_blocks(result: RequestResult, unit: Unit) -> list[Block]:
    """Errors of predictions by step size."""
    analysis = analysis_result(result, "sweep")
    within = percent(analysis.facts["within"])
    holds = {
        f"{order} order is within {within}": _between(analysis.facts[f"{order}_holds"]) for order in ("first", "second")
    }
    series = {
        "first order": analysis["first_error"], "second order": analysis["second_error"], "rounding": analysis["noise"],
    }  # fmt: skip
    axes = ("times the step", "relative error")
    return [facts(holds), lines("Error by size of the step", analysis["scales"], series, axes, logarithmic=True)]


def health_blocks(results: FisherKernelResults, unit: Unit) -> list[Block]:
    """Coordinates with a small second moment, and which parameters carry the kernel."""
    given = analysis_result(results, "health").facts
    sets = {"unseen": "never seen", "below_eps": "below ε", "smallest": "smallest second moments"}
    columns = (Column("coordinates that are"), Column("share of all", "share"), Column("share of the trace", "share"))
    rows = [(words, given[key]["coordinates"], given[key]["trace"]) for key, words in sets.items() if given.get(key)]
    by_parameter = given["by_parameter"]
    names = sorted(by_parameter, key=lambda name: -by_parameter[name])[:MOST_BARS][::-1]
    series = {"share of the trace of K_UU": [100 * by_parameter[name] for name in names]}
    verdict = "carry the kernel" if given["dominated"] else "do not carry the kernel"
    note = f"the {len(names)} largest of {len(by_parameter)}"
    return [
        table(f"{given['coordinates']:,} coordinates; those that are hardly known {verdict}", columns, rows),
        bars("Which parameters carry the kernel", names, series, "%", note=note),
    ]


def structure_blocks(results: FisherKernelResults, unit: Unit) -> list[Block]:
    """Principal components and clusters of U."""
    analysis = analysis_result(results, "structure")
    given, scores = analysis.facts, analysis["scores"]
    second = scores[:, 1] if scores.shape[1] > 1 else np.zeros(len(scores))
    texts = {info.id: info.prompt + info.response for info in results.update}
    columns = (Column("cluster"), Column("sequences", "number"), Column("exemplar", "sequence"), Column("its text"))
    rows = [
        (str(i + 1), size, exemplar, texts[exemplar])
        for i, (size, exemplar) in enumerate(zip(given["sizes"], given["exemplars"], strict=True))
    ]
    shares = [percent(share) for share in given["shares"]]
    axes = (f"component 1 ({shares[0]} of what varies)", f"component 2 ({shares[1] if len(shares) > 1 else '–'})")
    shown = {"scatter that is left within clusters": percent(given["within"])}
    if given.get("alignment") is not None:
        shown["alignment with K_UU after the step"] = f"{given['alignment']:.4f}"
    groups = [f"cluster {label + 1}" for label in analysis["labels"].tolist()]
    return [
        facts(shown),
        points("Sequences that pull in similar directions lie together", scores[:, 0], second, given["ids"], axes,
               groups=groups, opens="sequence"),
        table("Clusters, each by its most typical sequence", columns, rows),
    ]  # fmt: skip


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _between(ends: Any) -> str:
    return "nowhere" if ends is None else f"from {ends[0]:.2g} to {ends[1]:.2g} times the step"


LEDGER = Panel("Where did the change come from, and do its terms add up to it?", "ledger: true", ledger_blocks)
UNCERTAINTY = Panel("Could the effect be chance?", "uncertainty: true", uncertainty_blocks)
TOKENS = Panel("Which tokens changed?", 'tokens: {pairs: [["E-000-00", "U-000-00"]]}', tokens_blocks)
PARTS = Panel("Through which layers and kinds of parameters did it go?", "parts: true", parts_blocks)
OBSERVABLES = Panel(
    "What happened to other quantities than log π?", "observables: [{name: entropy, kind: entropy}]", observable_blocks
)
COUNTERFACTUALS = Panel(
    "What would another step have done?",
    'counterfactuals: [{name: unclipped, max_norm: none}, {name: without, drop: ["U-000-*"]}]',
    counterfactual_blocks,
)
PRECONDITIONERS = Panel(
    "Does the optimizer's preconditioner matter?", "preconditioners: [identity, post-step]", preconditioners_blocks
)
COVARIATES = Panel("What does the change go along with?", "covariates: true", covariates_blocks)
SWEEP = Panel("Up to which size of the step do predictions hold?", "sweep: true", sweep_blocks)
HEALTH = Panel("Does the kernel rest on coordinates that are hardly known?", "health: true", health_blocks)
STRUCTURE = Panel("Which sequences of U pull in similar directions?", "structure: true", structure_blocks)
