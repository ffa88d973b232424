"""Pictures of a plan's analyses: what is drawn is what was found, in units, and nothing else is drawn."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest

import fkernel as fk
from fkernel import report
from fkernel.report.heatmaps import seen
from fkernel.report.style import label, percent, plain, signed
from fkernel.study import AnalysisResult, FisherKernelResults, FisherKernelRunner, RequestResult, SequenceInfo
from tests.study.conftest import Run

ASKED: dict[str, Any] = {
    "ledger": True,
    "sweep": {"scales": [0.1, 1.0, 10.0]},
    "parts": True,
    "observables": [
        {"name": "entropy", "kind": "entropy"},
        {"name": "own", "kind": "function", "function": "tests.study.accounted.first_token"},
        {"name": "odds", "kind": "log_odds", "pairs": [["E-000-00", "E-000-01"]]},
        {"name": "worth", "kind": "expected_reward"},
    ],
    "counterfactuals": [{"name": "rloo", "advantages": "rloo"}, {"name": "unclipped", "max_norm": "none"}],
    "preconditioners": ["identity", "post-step"],
    "uncertainty": {"draws": 30},
    "covariates": True,
}
PANELS = {
    "ledger": report.ledger_panel,
    "sweep": report.sweep_panel,
    "tokens": report.tokens_panel,
    "parts": report.parts_panel,
    "preconditioners": report.preconditioners_panel,
    "uncertainty": report.uncertainty_panel,
    "covariates": report.covariates_panel,
}
EFFECTS = ("contributors", "heatmap", "influence", "predicted_vs_realised")
OBSERVED = ("entropy", "own", "odds", "worth")
OWN = {"health": report.health_panel, "structure": report.structure_panel}


@pytest.fixture(scope="module")
def results(run: Run, tmp_path_factory: pytest.TempPathFactory) -> FisherKernelResults:
    draw = {"kind": "evaluation", "batch_size_prompts": 4, "completions_per_prompt": 2}
    tokens = {"tokens": {"pairs": [["E-000-00", "U-001-02"]]}}
    requests = [
        {**draw, "name": "held_out", "reward": "tests.study.accounted.differs", "analyses": ASKED | tokens},
        {
            **draw, "name": "one", "batch_size_prompts": 1, "completions_per_prompt": 1, "seed": 3,
            "analyses": ASKED | {"tokens": True, "observables": ASKED["observables"][:2]},
        },
    ]  # fmt: skip
    own = {"health": True, "structure": {"clusters": 3}}
    out = tmp_path_factory.mktemp("panels") / "out"
    return FisherKernelRunner(run.plan(out, requests=requests, analyses=own)).run()


@pytest.fixture(scope="module")
def result(results: FisherKernelResults) -> RequestResult:
    return results["held_out"]


def changed(result: RequestResult, name: str, **facts: Any) -> RequestResult:
    """The same result, with other facts of one analysis."""
    found = result.analysis(name)
    other = AnalysisResult(found.arrays, found.facts | facts)
    return dataclasses.replace(result, analyses={**result.analyses, name: other})


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def lengths(axes: Any, label: str) -> np.ndarray:
    """Of the bars that have a name in the legend."""
    bars = next(bars for bars in axes.containers if bars.get_label().startswith(label))
    return np.array([bar.get_width() for bar in bars])


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_is_drawn_and_written(result, name, tmp_path):
    figure = PANELS[name](result, tmp_path / "panel.png")
    assert (tmp_path / "panel.png").read_bytes().startswith(b"\x89PNG")
    assert "held_out" in texts(figure)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("ledger", ["(10⁻³ nats)", "(nats)"]),
        ("sweep", ["1 is the step that was taken", "relative error"]),
        ("tokens", ["10⁻³ nats; red raises", "10⁻³ nats"]),
        ("parts", ["share  (%)"]),
        ("preconditioners", ["(no unit)"]),
        ("uncertainty", ["(10⁻³ nats)", "30 permutations"]),
        ("covariates", ["(no unit)"]),
    ],
)
def test_axes_say_their_units(result, name, units):
    figure = PANELS[name](result)
    said = [axis.get_label_text() for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for unit in units:
        assert any(unit in text for text in said), said


@pytest.mark.parametrize(
    ("name", "unit"),
    [("entropy", "10⁻³ nats"), ("own", "10⁻³ of its unit"), ("odds", "10⁻³ nats"), ("worth", "10⁻³ of reward")],
)
def test_observables_are_in_their_own_units(result, name, unit):
    said = [axes.get_xlabel() for axes in report.observable_panel(result, name).axes]
    assert said == [f"predicted change  ({unit})", f"contribution  ({unit})"]


def test_the_prediction_of_an_observable_has_all_its_parts(result):
    name = "observables.entropy"
    found = result.analysis(name)
    parts = {"arithmetic": np.linspace(0.0, 1e-3, len(found["batch"]))} | found.arrays
    known = dataclasses.replace(result, analyses={name: AnalysisResult(parts, found.facts)})
    alone, whole = (
        np.asarray(dots.get_offsets()) for dots in report.observable_panel(known, "entropy").axes[0].collections
    )
    np.testing.assert_allclose(alone, 1e3 * np.stack([found["batch"], found["realised"]], 1), rtol=1e-6)
    wanted = sum(parts[part] for part in ("batch", "momentum", "decay", "arithmetic"))
    np.testing.assert_allclose(whole[:, 0], 1e3 * wanted, rtol=1e-6)


def test_a_bare_kernel_is_not_said_to_be_in_nats(result):
    figures = [
        report.observable_panel(result, "entropy", units="bare"),
        report.uncertainty_panel(result, units="bare"),
    ]
    for figure in figures:
        assert "10⁻³ bare" in texts(figure)
        assert "10⁻³ nats" not in texts(figure)


def test_bars_of_the_ledger_add_up_to_what_was_realised(result):
    found = result.analysis("ledger")
    order = np.argsort(-np.abs(found["realised"]), kind="stable")[:12]
    figure = report.ledger_panel(result)
    left, right = figure.axes
    parts = {name: lengths(left, name) for name in ("batch", "momentum", "decay", "unexplained")}
    for name, widths in parts.items():
        np.testing.assert_allclose(widths, 1e3 * found[name][order], rtol=1e-12)
    np.testing.assert_allclose(sum(parts.values()), 1e3 * (found["realised"] - found["remainder"])[order], atol=1e-9)
    diamonds = np.asarray(left.collections[0].get_offsets())[:, 0]
    np.testing.assert_allclose(diamonds, 1e3 * found["realised"][order], rtol=1e-12)
    (rest,) = (np.asarray(line.get_xdata()) for line in right.lines)
    np.testing.assert_allclose(rest, np.abs(found["remainder"])[order], rtol=1e-12)
    assert f"remainder, {percent(found.facts['error'])}" in texts(figure)
    assert f"rounding floor, {percent(found.facts['floor'])}" in texts(figure)
    floor = right.containers[0]
    ends = np.array([bar.get_x() + bar.get_width() for bar in floor])
    np.testing.assert_allclose(ends, found["floor"][order], rtol=1e-9)


def test_bars_of_the_ledger_do_not_cover_each_other(result):
    left = report.ledger_panel(result).axes[0]
    for row in range(len(left.containers[0])):
        spans = sorted((bar[row].get_x(), bar[row].get_width()) for bar in left.containers)
        edges = [(min(x, x + w), max(x, x + w)) for x, w in spans if w]
        for (_, end), (start, _) in zip(sorted(edges)[:-1], sorted(edges)[1:], strict=True):
            assert start >= end - 1e-9


def test_the_sweep_is_drawn_as_it_was_found(result):
    found = result.analysis("sweep")
    axes = report.sweep_panel(result).axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    np.testing.assert_allclose(lines["first order"], found["first_error"])
    np.testing.assert_allclose(lines["with curvature"], found["second_error"])
    rounding = next(y for name, y in lines.items() if str(name).startswith("rounding"))
    np.testing.assert_allclose(rounding, found["noise"])
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_guides_of_the_sweep_have_the_slopes_of_theory(result):
    error = {"first_error": 0.01, "second_error": 0.001}
    found = result.analysis("sweep")
    arrays = found.arrays | {name: value * np.array([0.1, 1, 10]) for name, value in error.items()}
    known = dataclasses.replace(result, analyses={**result.analyses, "sweep": AnalysisResult(arrays, found.facts)})
    guides = [line for line in report.sweep_panel(known).axes[0].lines if line.get_linestyle() == "-."]
    slopes = [np.diff(np.log(line.get_ydata())) / np.diff(np.log(line.get_xdata())) for line in guides]
    assert [float(slope[0]) for slope in slopes] == pytest.approx([1, 2])


def test_the_top_axis_of_the_sweep_is_the_learning_rate_where_there_is_one(result):
    for lr, drawn in (([1e-4], True), ([1e-4, 1e-3], False), (None, False), ([0.0], False)):
        figure = report.sweep_panel(changed(result, "sweep", lr=lr))
        top = figure.axes[0].child_axes
        assert bool(top) is drawn
        if drawn:
            figure.draw_without_rendering()
            assert top[0].get_xlim() == pytest.approx([1e-4 * end for end in figure.axes[0].get_xlim()])


def test_a_prediction_that_holds_nowhere_is_not_shaded(result):
    shaded = len(report.sweep_panel(changed(result, "sweep", first_holds=[0.1, 1.0])).axes[0].patches)
    figure = report.sweep_panel(changed(result, "sweep", first_holds=None))
    assert len(figure.axes[0].patches) == shaded - 1
    assert "nowhere" in texts(figure)


def test_cells_of_tokens_carry_their_numbers(result):
    found = result.analysis("tokens")
    figure = report.tokens_panel(result)
    shown = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))  # type: ignore[union-attr]
    rows = np.argsort(-np.abs(found["logprob"].astype(float).sum(1)), kind="stable")[:6]
    for row, cells in zip(rows, shown, strict=True):
        changes = 1e3 * found["logprob"][row][found["response"][row]]
        np.testing.assert_allclose(cells[: len(changes)], changes, rtol=1e-6)
        assert np.isnan(cells[len(changes) :]).all()
    pair = np.asarray(figure.axes[2].images[0].get_array())
    np.testing.assert_allclose(pair, 1e3 * found["pair_0"], rtol=1e-6)


def test_of_a_long_response_the_part_that_moved_most_is_drawn(result):
    n, t = len(result.evaluation), 40
    logprob = np.full((n, t), 1e-4)
    logprob[:, 30] = 1.0
    arrays = {"logprob": logprob, "entropy": logprob, "response": np.ones((n, t), dtype=bool)}
    facts = {"tokens": [[str(i) for i in range(t)]] * n, "pairs": []}
    figure = report.tokens_panel(dataclasses.replace(result, analyses={"tokens": AnalysisResult(arrays, facts)}))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape[1] == 16
    assert shown.max() == pytest.approx(1e3)
    assert "of 40" in texts(figure)


def test_bars_of_parts_are_shares_and_what_is_left_out_is_hatched(result):
    facts = result.analysis("parts").facts
    for axes, view in zip(report.parts_panel(result).axes, ("kind", "layer"), strict=True):
        moved, norms = (bars for bars in axes.containers if len(bars) == len(facts[f"{view}s"]))
        for bars, what in ((moved, "shares"), (norms, "norm_shares")):
            widths = [bar.get_width() for bar in bars]
            assert widths == pytest.approx([100 * facts[f"{view}_{what}"][name] for name in facts[f"{view}s"]])
        hatched = {name for name, bar in zip(facts[f"{view}s"], moved, strict=True) if bar.get_hatch()}
        assert hatched == {"embedding", "positions", "head"} & {*facts[f"{view}s"]}
    assert percent(facts["missed"]) in texts(report.parts_panel(result))


def test_counterfactuals_are_sorted_changes_beside_the_mistake_of_a_frozen_preconditioner(result):
    for axes, name in zip(report.counterfactuals_panel(result).axes, ("rloo", "unclipped"), strict=True):
        found = result.analysis(f"counterfactuals.{name}")
        wrong, change = (np.asarray(dots.get_offsets())[:, 1] for dots in axes.collections)
        np.testing.assert_allclose(change, np.sort(1e3 * (found["exact"].astype(float) - found["taken"])))
        order = np.argsort(found["exact"].astype(float) - found["taken"], kind="stable")
        np.testing.assert_allclose(wrong, 1e3 * (found["frozen"].astype(float) - found["exact"])[order])
        assert f"clip {found.facts['clip']:.3g}" in axes.get_title(loc="left")
        assert percent(found.facts["frozen_error"]) in axes.get_title(loc="left")


def test_bars_of_preconditioners_are_correlations(result):
    table = result.analysis("preconditioners").facts["agreement"]
    axes = report.preconditioners_panel(result).axes[0]
    for name, what in (("Pearson", "of_batch"), ("rank", "rank")):
        np.testing.assert_allclose(lengths(axes, name), [row[what] for row in table.values()])


def test_a_correlation_that_is_not_defined_is_said(result):
    table = {name: {"realised": None, "of_batch": None, "rank": None} for name in ("identity", "post-step")}
    assert texts(report.preconditioners_panel(changed(result, "preconditioners", agreement=table))).count("not defined")
    empty = {what: dict.fromkeys(("pearson", "spearman", "partial")) for what in ("length", "reward")}
    figure = report.covariates_panel(changed(result, "covariates", correlations={"influence": empty}))
    assert texts(figure).count("–") == 3


def test_intervals_and_prompts_are_drawn_as_they_were_found(result):
    found = result.analysis("uncertainty")
    order = np.argsort(-np.abs(result.batch), kind="stable")[:12]
    uninformative = [True, False, True]
    figure = report.uncertainty_panel(changed(result, "uncertainty", informative=uninformative))
    left, right = figure.axes[:2]
    ends = np.array([segment[:, 0] for segment in left.collections[0].get_segments()])  # type: ignore[attr-defined]
    np.testing.assert_allclose(ends, 1e3 * np.stack([found["low"], found["high"]], 1)[order])
    shown = right.images[0].get_array().filled(np.nan)  # type: ignore[union-attr]
    np.testing.assert_allclose(shown[:, [0, 2]], found["prompt_p"][order][:, [0, 2]])
    assert np.isnan(shown[:, 1]).all()
    assert [patch.get_x() for patch in right.patches] == [0.5]  # type: ignore[attr-defined]


def test_one_prompt_has_no_interval(result):
    found = result.analysis("uncertainty")
    kept = {name: value for name, value in found.arrays.items() if name not in ("low", "high", "error")}
    alone = dataclasses.replace(result, analyses={"uncertainty": AnalysisResult(kept, found.facts)})
    assert "intervals" not in texts(report.uncertainty_panel(alone))


def test_cells_of_covariates_are_correlations_without_what_was_taken_out(result):
    table = result.analysis("covariates").facts["correlations"]
    plainly, partial, _ = report.covariates_panel(result).axes
    names = [*table["influence"]]
    for axes, kind, columns in ((plainly, "pearson", names), (partial, "partial", names[1:])):
        assert [text.get_text() for text in axes.get_xticklabels()] == columns
        wanted = [[table[what][name][kind] for name in columns] for what in table]
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), np.array(wanted, dtype=float))
        assert axes.images[0].get_clim() == (-1, 1)


def test_health_is_drawn_largest_first(results):
    by_parameter = results.analysis("health").facts["by_parameter"]
    left, right = report.health_panel(results).axes
    widths = [bar.get_width() for bar in left.containers[0]]
    assert widths == pytest.approx(sorted((100 * share for share in by_parameter.values()), reverse=True)[:12])
    trace = next(bars for bars in right.containers if bars.get_label() == "of the trace")
    facts = results.analysis("health").facts
    wanted = [100 * facts[name]["trace"] for name in ("unseen", "below_eps", "smallest")]
    assert [bar.get_height() for bar in trace] == pytest.approx(wanted)
    assert "(%)" in left.get_xlabel()
    assert "(%)" in right.get_ylabel()


def test_clusters_are_drawn_with_all_their_sequences(results):
    found = results.analysis("structure")
    figure = report.structure_panel(results)
    left, right = figure.axes
    for cluster, (dots, bar) in enumerate(zip(left.collections, right.patches, strict=False)):
        of = found["labels"] == cluster
        np.testing.assert_allclose(np.asarray(dots.get_offsets()), found["scores"][of, :2])
        assert bar.get_width() == found.facts["sizes"][cluster] == of.sum()  # type: ignore[attr-defined]
    for name in found.facts["exemplars"]:
        assert texts(left).count(name) == 1
    assert "√K" in left.get_xlabel()


def test_far_sequences_and_one_component_are_drawn_too(results):
    found = results.analysis("structure")
    far = found["scores"][:, :1].copy()
    far[0] = 1e3
    arrays = {"scores": far, "labels": found["labels"]}
    one = dataclasses.replace(results, analyses={"structure": AnalysisResult(arrays, found.facts | {"shares": [1.0]})})
    axes = report.structure_panel(one).axes[0]
    assert axes.get_xscale() == "asinh"
    assert axes.get_ylabel() == "sequence of U"


@pytest.mark.turns(6)
def test_all_that_was_found_is_drawn_and_nothing_else(results, tmp_path):
    drawn = report.draw_all(results, tmp_path)
    of_many = (*EFFECTS, *PANELS, "counterfactuals", *(f"observable_{name}" for name in OBSERVED))
    # Of one sequence nothing can be correlated.
    of_one = (*EFFECTS[:3], "ledger", "sweep", "tokens", "parts", "uncertainty", "counterfactuals")
    of_one += ("observable_entropy", "observable_own")
    wanted = {f"held_out_{name}.png" for name in of_many} | {f"one_{name}.png" for name in of_one}
    wanted |= {f"update_{name}.png" for name in OWN}
    wanted |= {"spectrum.png"} if results.self_kernel is not None else set()
    assert {path.name for path in drawn} == {path.name for path in tmp_path.iterdir()} == wanted
    assert len(drawn) == len(wanted)
    assert all(path.stat().st_size > 5_000 for path in drawn)


def test_what_was_left_out_is_not_drawn(result, results, tmp_path):
    gone = {name: AnalysisResult({}, {"left_out": "it needs the step"}) for name in result.analyses}
    nothing = dataclasses.replace(result, analyses=gone)
    own = {name: AnalysisResult({}, {"left_out": "it needs a second moment"}) for name in OWN}
    bare = dataclasses.replace(results, requests={"held_out": nothing}, analyses=own)
    names = {path.name for path in report.draw_all(bare, tmp_path)} - {"spectrum.png"}
    assert names == {f"held_out_{name}.png" for name in EFFECTS}
    for draw in (*PANELS.values(), report.counterfactuals_panel):
        with pytest.raises(fk.ResultsError, match="was left out: it needs the step"):
            draw(nothing)
    for draw in OWN.values():
        with pytest.raises(fk.ResultsError, match="was left out: it needs a second moment"):
            draw(bare)
    with pytest.raises(fk.ResultsError, match=r"'observables\.own' was left out"):
        report.observable_panel(nothing, "own")
    with pytest.raises(fk.ResultsError, match="no 'counterfactuals'; ask for it"):
        report.counterfactuals_panel(dataclasses.replace(result, analyses={}))


def test_some_counterfactuals_may_be_left_out(result):
    gone = {"counterfactuals.rloo": AnalysisResult({}, {"left_out": "it needs the step"})}
    some = dataclasses.replace(result, analyses={**result.analyses, **gone})
    titles = [axes.get_title(loc="left") for axes in report.counterfactuals_panel(some).axes]
    assert [title.split(":")[0] for title in titles] == ["unclipped"]


def test_without_a_realised_change_an_observable_shows_its_contributors(result):
    name = "observables.entropy"
    found = result.analysis(name)
    kept = {what: found[what] for what in ("batch", "top", "top_contributions", "value")}
    alone = dataclasses.replace(result, analyses={name: AnalysisResult(kept, found.facts)})
    (axes,) = report.observable_panel(alone, "entropy").axes
    most = int(np.argmax(np.abs(found["batch"])))
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], 1e3 * found["top_contributions"][most])  # type: ignore[attr-defined]


@pytest.mark.turns(6)
def test_any_text_is_drawn(result, results, tmp_path):
    odd = tuple(
        SequenceInfo(info.id, f"$\\frac{{{i}\n", "$x_{$^\x07\t" * (i + 1), info.logprob, 1.0, prompt_id=f"$p{i}_$")
        for i, info in enumerate(result.evaluation)
    )
    tokens = result.analysis("tokens")
    strange = [["$", "\n", "", " ", "$$\\frac{", "\x00", "\t"][: len(row)] for row in tokens.facts["tokens"]]
    strange = [row + ["$"] * (len(old) - len(row)) for row, old in zip(strange, tokens.facts["tokens"], strict=True)]
    facts = tokens.facts | {"tokens": strange}
    analyses = {**result.analyses, "tokens": AnalysisResult(tokens.arrays, facts)}
    update = tuple(dataclasses.replace(info, prompt="$\\sqrt{\n$", response="_$") for info in result.update)
    written = dataclasses.replace(result, evaluation=odd, update=update, analyses=analyses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report.draw_all(
            dataclasses.replace(results, requests={"held_out": written}, update=update), tmp_path / "odd"
        )
    assert len(found) > 10


def test_labels_are_one_line_of_text():
    assert plain("a\nb\t$c$\x07") == r"a b \$c\$·"
    assert label(SequenceInfo("E-0", "$$$$$$", "12", 0.0), 4) == r"E-0  …\$12"
    assert seen("") == "∅"
    assert seen(" \n") == "␣⏎"
    assert seen("$23456789") == r"\$23456…"


def test_numbers_are_written_as_they_are_read():
    assert [percent(x) for x in (None, float("nan"), 0.0, 1e-7, 3.9e-5, 0.085, 0.46, 1.344)] == [
        "–", "–", "0 %", "< 0.001 %", "0.0039 %", "8.5 %", "46 %", "134 %",
    ]  # fmt: skip
    assert [signed(x) for x in (-0.001, 0.0, -1.25, 3.0)] == ["0", "0", "−1.25", "+3.00"]
