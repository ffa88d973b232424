"""Tables and pictures of a run's account: they show what it holds, in one unit, and what does not add up is loud."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fkernel as fk
from fkernel import report
from fkernel.report.run_tables import unit_of
from fkernel.study import AccountResults, SequenceInfo

PROMPTS = ("3+5=", "19+28=", "7+2=", "1+1=")
"""Of a step's four sequences; the last one's contributions are nothing."""
PICTURES = {
    "timeline": report.timeline,
    "rewards": report.rewards_timeline,
    "culprits": report.culprit_bars,
    "influence": report.influence_over_steps,
}


def sequence(step: int, u: int) -> dict[str, Any]:
    reward = float(u % 2)
    return {
        "id": f"{step:04d}/U-000-{u:02d}", "step": step, "prompt": PROMPTS[u], "response": f"{step}{u}",
        "prompt_id": f"prompt-{u}", "tokens": 2, "reward": reward, "rewards": {"right": reward, "short": None},
        "advantage": 2 * reward - 1, "metadata": {},
    }  # fmt: skip


def account(probes: int = 3, steps: int = 4, scale: float = 0.1, **about: Any) -> AccountResults:
    """An account that adds up: steps 5, 6, … of four sequences each; half of a contribution is by momentum."""
    random = np.random.default_rng(0)
    C = scale * random.normal(size=(probes, steps, 4))
    C[:, :, 3] = 0.0
    C[:, :, 1] = np.abs(C[:, :, 1])
    nothing, by_step = np.zeros(probes), C.sum(2)
    arrays = {
        "contributions": C.reshape(probes, -1), "by_step": by_step, "own": by_step / 2, "momentum": by_step / 2,
        "realised": by_step.sum(1), "floor": nothing + 1e-7, "rewards": np.stack([3 * by_step, -2 * by_step], 2),
        "p": np.full((probes, 4 * steps), 0.5), **dict.fromkeys(("before", "decay", "arithmetic"), nothing),
        "unexplained": nothing, "remainder": nothing,
    }  # fmt: skip
    infos = tuple(SequenceInfo(f"P-{e}", f"{e}+{e}=", f"{2 * e}", -3.0) for e in range(probes))
    rows = tuple(sequence(5 + t, u) for t in range(steps) for u in range(4))
    facts = [{"step": 5 + t, "sequences": 4, "lr": 1e-3, "loss": 0.5, "grad_norm": 1.0 + t} for t in range(steps)]
    said = {"recording": "run/recording", "path": "midpoint", "observable": "logprob", **about}
    single = {name: values.astype(np.float32) for name, values in arrays.items()}
    return AccountResults(said, infos, rows, tuple(facts), single, {"reward_functions": ["right", "short"]})


def having(results: AccountResults, **arrays: Any) -> AccountResults:
    """The same account with other arrays; None leaves one out."""
    kept = {name: values for name, values in (results.arrays | arrays).items() if values is not None}
    return replace(results, arrays={name: np.asarray(values, np.float32) for name, values in kept.items()})


def bare(results: AccountResults) -> AccountResults:
    """Without p-values, rewards and advantages."""
    sequences = tuple(row | {"reward": None, "rewards": {}, "advantage": None} for row in results.sequences)
    facts = {"p": "sequences have no advantages", "rewards": "the recording has no rewards by function"}
    steps = tuple(row | {"loss": None, "grad_norm": None} for row in results.steps)
    return replace(having(results, p=None, rewards=None), sequences=sequences, facts=facts, steps=steps)


def shown(*things: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=180, color_system=None)
    for thing in things:
        console.print(thing)
    return file.getvalue()


def rows_of(table: Any) -> list[list[str]]:
    """Cells of the rows, without the heading."""
    lines = [line for line in shown(table).splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def number(cell: str) -> float:
    return float(cell.replace("−", "-").strip("* "))


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


PICTURE: Any = report
"""Matplotlib's types are too wide for what is looked up in its figures."""


def curve(figure: Any, label: str) -> np.ndarray:
    """Heights of the line that has a name in the legend."""
    return next(line for line in figure.axes[0].lines if line.get_label().startswith(label)).get_ydata()


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_row_is_what_adds_up_to_the_change_of_a_probe():
    results = having(account(), decay=[0.01, 0.02, -0.03])
    results = having(results, realised=results["realised"] + results["decay"])
    table = report.account_table(results, rows=2)
    rows = rows_of(table)
    order = np.argsort(-np.abs(results["realised"]))[:2]
    assert [row[0] for row in rows] == [f"P-{e}  {e}+{e}=→{2 * e}" for e in order]
    for e, row in zip(order, rows, strict=True):
        realised, sequences, later, decay, floor = map(number, row[1:])
        assert realised == pytest.approx(1e3 * results["realised"][e], abs=0.006)
        assert realised == pytest.approx(sequences + decay, abs=0.02)
        assert later == pytest.approx(sequences / 2, abs=0.02)
        assert floor == pytest.approx(1e-4)
    text = shown(table)
    assert "the 2 that moved most of 3 probes (10⁻³ nats)" in text
    assert "realised = sequences + decay;" in text


@pytest.mark.parametrize(
    ("size", "scale", "there"),
    [(2.9e-7, 1e-4, False), (3.1e-7, 1e-4, True), (3.1e-7, 0.1, False)],  # the last is 0 in all digits that are shown
)
def test_a_column_of_rounding_alone_is_left_out_and_named(size, scale, there):
    text = shown(report.account_table(having(account(scale=scale), arithmetic=[0.0, -size, 0.0])))
    assert (re.search(r"┃ +arithmetic", text) is not None) == there
    assert ("0, and left out: before, decay, arithmetic" in text) != there


def test_an_account_is_in_one_unit_which_depends_on_its_largest_number():
    small, large = account(), account(scale=2.0)
    for results, unit, factor in ((small, "(10⁻³ nats)", 1e3), (large, "(nats)", 1.0)):
        tables = [report.account_table(results), *(table(results, 1) for table in (
            report.culprits_table, report.prompts_table, report.rewards_table))]  # fmt: skip
        assert all(unit in shown(table) for table in tables)
        (first, *_) = rows_of(tables[1])
        assert number(first[-1]) == pytest.approx(factor * np.abs(results["contributions"][1]).max(), rel=1e-2)
    assert unit_of(having(small, contributions=0 * small["contributions"], realised=[0, 0, 0])).scale == 1e3


@pytest.mark.parametrize(
    ("observable", "unit"),
    [("kl", "10⁻³ nats"), ("expected_reward", "10⁻³ of reward"), ("own.measure", "10⁻³ of its unit")],
)
def test_observables_have_their_own_units(observable, unit):
    results = account(observable=observable)
    assert f"({unit})" in shown(report.account_table(results))
    assert unit in texts(report.timeline(results, 0))


def test_culprits_come_in_the_order_of_their_contributions():
    results = account(scale=0.05)
    results["p"][1, 5] = 0.05
    results["contributions"][1, 5] = -0.3
    table = report.culprits_table(results, "P-1", 4)
    rows = rows_of(table)
    order = np.argsort(-np.abs(results["contributions"][1]))[:4]
    assert [row[1] for row in rows] == [results.sequences[u]["id"] for u in order]
    assert rows[0] == ["6", "0006/U-000-01", "19+28=→61", "1", "+1", "−300.00*"]
    assert not any("*" in row[-1] for row in rows[1:])
    assert "* told apart from chance (p ≤ 0.05): 1 of 16 sequences" in shown(table)
    with pytest.raises(fk.ResultsError, match="no probe 'P-9'"):
        report.culprits_table(results, "P-9")


def test_identical_sequences_of_a_step_are_one_line_with_their_sum():
    results = account(scale=0.05)
    twins = tuple(row | {"response": "61"} if row["step"] == 6 else row for row in results.sequences)
    results = replace(results, sequences=tuple(row | {"prompt": "1+1="} if row["step"] == 6 else row for row in twins))
    here = [u for u, row in enumerate(results.sequences) if row["step"] == 6]
    results["contributions"][1, here] = [0.25, -0.5, 0.0, -0.25]
    results["p"][1, here] = [1.0, 0.5, 1.0, 0.01]
    share = results.top_sequences("P-1", 1, group_identical=True)[0]
    assert share == (results.sequences[here[1]]["id"], -0.5, pytest.approx(0.01), 4)
    assert results.top_sequences("P-1", 1)[0] == (share.id, -0.5, 0.5, 1)
    assert results.identical_to(share.id) == [results.sequences[u]["id"] for u in here]
    results["realised"][:] = [-1.0 if probe.id == "P-1" else 0.0 for probe in results.probes]
    assert report.most_of_it(results) == results.identical_to(share.id)
    rows = rows_of(report.culprits_table(results, "P-1", 16))
    assert [row for row in rows if row[0] == "6"] == [["6", f"{share.id} × 4", "1+1=→61", *rows[0][3:5], "−500.00*"]]
    assert len(rows) == len(results.sequences) - 3
    assert "× 4" in PICTURE.culprit_bars(results, "P-1", 3).axes[0].get_yticklabels()[0].get_text()


def test_prompts_are_counted_by_step_and_nothing_is_neither_for_nor_against():
    results = account()
    results["contributions"][0, [1, 5]] = 0.0  # in two of four steps its prompt had no advantage
    rows = {row[0]: row for row in rows_of(report.prompts_table(results, 0))}
    assert rows["19+28="][1:5] == ["4", "2", "0", "0.500"]
    assert "1+1=" not in rows
    totals = [number(row[-1]) for row in rows.values()]
    assert totals == sorted(totals, key=abs, reverse=True)
    assert totals[0] == pytest.approx(1e3 * results.top_prompts(0)[0].value, abs=0.01)
    (first, *_) = rows_of(report.prompts_table(account(steps=1), 0))
    assert first[1] == "1"
    assert first[4] == "–"


def test_reward_functions_add_up_to_the_sequences():
    results = account()
    rows = rows_of(report.rewards_table(results, 2))
    assert [row[0] for row in rows] == ["right", "short", "together"]
    right, short, together = (number(row[-1]) for row in rows)
    assert right == pytest.approx(1e3 * results["rewards"][2, :, 0].sum(), abs=0.01)
    assert right + short == pytest.approx(together, abs=0.02)
    raised = int((results["by_step"][2] > 0).sum())
    assert rows[0][1:3] == rows[1][2:0:-1] == [str(raised), str(4 - raised)]


def test_what_is_missing_says_why():
    results = bare(account())
    line = "Not split by reward function: the recording has no rewards by function"
    assert report.rewards_table(results, 0) == line
    lines = report.account_lines(results)
    assert "No p-values: sequences have no advantages" in lines
    assert line in lines
    table = report.culprits_table(results, 0)
    assert "*" not in shown(table)
    assert rows_of(table)[0][3:5] == ["–", "–"]
    assert not any("p-values" in line for line in report.account_lines(account()))


# ---------------------------------------------------------------------------------------------------- does it add up?


def test_one_line_says_that_the_account_adds_up():
    results = having(account(), remainder=[2e-4, -1e-4, 1e-4], unexplained=[-1e-4, 0.0, 0.0])
    first, second = report.account_lines(results)
    assert first == "Account of run/recording: steps 5 to 8, 16 sequences, 3 probes, log π; path midpoint"
    share = 3**0.5 * 1e-4 / np.linalg.norm(results["realised"])
    assert second.startswith(f"It adds up: remainder and unexplained together are {100 * share:.2g} % of the realised")


@pytest.mark.parametrize(
    ("name", "path", "cause"),
    [
        ("remainder", "midpoint", "--path gauss2"),
        ("remainder", "gauss2", "float64"),
        ("unexplained", "midpoint", "not of this run"),
    ],
)
def test_what_does_not_add_up_is_loud(name, path, cause):
    whole = account(path=path)
    small = 0.049 * whole["realised"]
    quiet, loud = (having(whole, **{name: small * np.array([1, 1, factor])}) for factor in (1.0, 1.1))
    assert not any("DOES NOT" in line for line in report.account_lines(quiet))
    lines = report.account_lines(loud)
    (said,) = (line for line in lines if "DOES NOT ADD UP" in line)
    assert f"{name} is " in said
    assert "in P-2, 5.4 % of its change" in said
    assert "in 1 of 3 probes" in said
    assert cause in said
    assert not any("It adds up" in line for line in lines)


def test_rounding_is_never_loud():
    still = having(account(), realised=[0, 0, 0], remainder=[3e-7, -3e-7, 0], contributions=np.zeros((3, 16)))
    assert "Nothing moved: no probe changed by more than rounding" in report.account_lines(still)
    (loud,) = (line for line in report.account_lines(having(still, remainder=[4e-7, 0, 0])) if "DOES NOT" in line)
    assert "in P-0, which did not change" in loud


# ------------------------------------------------------------------------------------------------------------- pictures


def test_a_timeline_is_the_running_sum_and_ends_where_the_change_was_measured():
    results = account()
    results["by_step"][0] = [0.1, 0.2, -0.25, -0.01]
    results["own"][0], results["momentum"][0] = 0.75 * results["by_step"][0], 0.25 * results["by_step"][0]
    figure = PICTURE.timeline(results, "P-0")
    np.testing.assert_allclose(curve(figure, "all"), [0.0, 100.0, 300.0, 50.0, 40.0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(curve(figure, "by the steps' own"), [0.0, 75.0, 225.0, 37.5, 30.0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(curve(figure, "by momentum"), [0.0, 25.0, 75.0, 12.5, 10.0], rtol=1e-5, atol=1e-5)
    (measured,) = figure.axes[0].collections
    np.testing.assert_allclose(measured.get_offsets(), [[8, 1e3 * results["realised"][0]]], rtol=1e-6)
    (turn,) = (line for line in figure.axes[0].lines if line.get_label().startswith("turned"))
    assert set(turn.get_xdata()) == {6}
    written = texts(figure)
    for words in ("P-0  0+0=→0", "turned after the step", "start", "‖∇L‖", "mean\nreward", "10⁻³ nats"):
        assert words in written
    assert "decay" not in written


def test_decay_and_the_rest_are_drawn_where_they_are_seen():
    results = account()
    results["own"][0] -= 0.05
    figure = PICTURE.timeline(results, 0)
    np.testing.assert_allclose(curve(figure, "by decay"), [0.0, 50.0, 100.0, 150.0, 200.0], rtol=1e-4, atol=1e-4)


def test_bars_of_a_step_are_blue_where_it_lowers_and_red_where_it_raises():
    from matplotlib.colors import to_hex

    results = account()
    bars = PICTURE.timeline(results, 1).axes[1].patches
    colours = {round(bar.get_x() + bar.get_width() / 2): to_hex(bar.get_facecolor()) for bar in bars}
    assert colours == {5 + t: "#b2182b" if v > 0 else "#2166ac" for t, v in enumerate(results["by_step"][1])}


def test_rewards_are_drawn_as_running_sums():
    results = account()
    figure = PICTURE.rewards_timeline(results, 0)
    sums = 1e3 * results["rewards"][0].cumsum(0)
    np.testing.assert_allclose(curve(figure, "right")[1:], sums[:, 0], rtol=1e-4)
    np.testing.assert_allclose(curve(figure, "together")[1:], sums.sum(1), rtol=1e-4)
    with pytest.raises(fk.ResultsError, match="no rewards by function"):
        report.rewards_timeline(bare(results), 0)


def test_a_heatmap_is_symmetric_about_white():
    results = account()
    figure = PICTURE.run_heatmap(results)
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), 1e3 * results["by_step"], rtol=1e-5)
    low, high = image.get_clim()
    assert low == -high
    assert image.cmap(0.5)[:3] == pytest.approx((1.0, 1.0, 1.0), abs=0.02)
    assert tuple(image.get_extent()) == (4.5, 8.5, 2.5, -0.5)
    widths = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in figure.axes[1].patches}
    assert [widths[e] for e in range(3)] == pytest.approx([*(1e3 * results["realised"])], rel=1e-5)
    assert "P-1  1+1=→2" in texts(figure)


def test_many_probes_have_a_label_each_as_far_as_there_is_room():
    figure = PICTURE.run_heatmap(account(probes=90, steps=2))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 30
    assert labels[1].startswith("P-3 ")


def test_culprits_are_drawn_with_text_reward_and_step():
    results = account(scale=0.05)
    results["contributions"][0, 5], results["p"][0, 5] = -0.3, 0.01
    figure = PICTURE.culprit_bars(results, 0, 3)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "19+28=→61  r = 1  step 6  U-000-01"
    assert figure.axes[0].texts[0].get_text() == "−300.00*"
    assert len(figure.axes[0].texts) == 3
    assert "told apart from chance" in texts(figure)


def test_every_sequence_is_a_dot_in_its_step():
    results = account()
    figure = PICTURE.influence_over_steps(results, 0, 3)
    dots = figure.axes[0].collections[1]
    x, y = np.asarray(dots.get_offsets()).T
    assert np.array_equal(np.round(x), results.step_of)
    assert (np.diff(x) > 0).all()
    np.testing.assert_allclose(y, 1e3 * results["contributions"][0], rtol=1e-5)
    np.testing.assert_allclose(dots.get_array(), [row["advantage"] for row in results.sequences])
    assert "advantage" in texts(figure)
    assert [text.get_text()[0] for text in figure.axes[1].texts] == ["1", "2", "3"]
    largest = results.top_sequences(0, 1)[0]
    assert largest.id.rpartition("/")[2] in figure.axes[1].texts[0].get_text()


def test_dots_have_the_reward_where_there_is_no_advantage_and_no_scale_where_there_is_neither():
    results = account()
    rewarded = replace(results, sequences=tuple(row | {"advantage": None} for row in results.sequences))
    figure = PICTURE.influence_over_steps(rewarded, 0)
    np.testing.assert_allclose(figure.axes[0].collections[1].get_array(), [row["reward"] for row in results.sequences])
    assert len(report.influence_over_steps(bare(results), 0).axes) == 2


# ------------------------------------------------------------------------------------------------------------ all of it


@pytest.mark.turns(6)
def test_all_pictures_of_the_probes_that_moved_most_are_written(tmp_path):
    results = account(probes=8, steps=2)
    files = report.draw_account(results, tmp_path / "pictures")
    order = np.argsort(-np.abs(results["realised"]), kind="stable")[:6]
    assert [file.name for file in files] == ["heatmap.png", *(f"P-{e}_{name}.png" for e in order for name in PICTURES)]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.turns(6)
def test_names_of_files_are_safe_and_differ(tmp_path):
    results = account(probes=5, steps=1)
    ids = ("../A b/$c", "../A/b $c", "a b c", "…", "x" * 300)
    results = bare(replace(results, probes=tuple(replace(p, id=i) for p, i in zip(results.probes, ids, strict=True))))
    files = report.draw_account(results, tmp_path / "pictures")
    names = {file.name for file in files}
    assert len({name.lower() for name in names}) == len(files) == 1 + 3 * 5
    assert {*tmp_path.rglob("*.png")} == {*files}
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name) for name in names)
    assert "probe_timeline.png" in names


MOVED = ("contributions", "by_step", "own", "momentum", "realised", "rewards")
ODD = "$x_{$\n[red]\x1b[31m :smile: 🎈\t\\"
CASES = {
    "one probe and one step": account(probes=1, steps=1),
    "nothing moved": having(
        account(),
        **{name: 0 * account()[name] for name in MOVED},
    ),
    "nothing is known": bare(account()),
    "one, and nothing is known": bare(account(probes=1, steps=1)),
    "no sequences": replace(
        having(bare(account(probes=2)), contributions=np.zeros((2, 0))), sequences=()
    ),
    "rows without a text": replace(account(), probes=tuple(SequenceInfo(f"{e}", "", "", 0.0) for e in range(3))),
    "odd texts": replace(
        account(observable="own.measure"),
        probes=tuple(SequenceInfo(f"{ODD}{e}", ODD * (e + 1), ODD, 0.0) for e in range(3)),
        sequences=tuple(row | {"prompt": ODD, "response": ODD * 9} for row in account().sequences),
        facts={"reward_functions": [ODD, "$"]},
    ),
}  # fmt: skip


@pytest.mark.turns(6)
@pytest.mark.parametrize("case", CASES)
def test_anything_is_shown_and_drawn(case, tmp_path):
    results = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = report.draw_account(results, tmp_path)
    assert len(files) == 1 + len(results.probes) * (4 if "rewards" in results.arrays else 3)
    text = shown(
        report.account_table(results),
        report.culprits_table(results, 0),
        report.prompts_table(results, 0),
        report.rewards_table(results, 0),
    )
    assert "nan" not in text
    assert "\x1b" not in text
    assert len(report.account_lines(results)) >= 2
    if case == "odd texts":
        assert "[31m :smile: 🎈" in text


def test_a_long_run_is_drawn_in_a_few_seconds_with_few_labels():
    steps = 500
    results = account(probes=60, steps=steps)
    for figure in (report.timeline(results, 3), report.influence_over_steps(results, 3), report.run_heatmap(results)):
        ticks = figure.axes[-1 if figure.axes[-1].get_xlabel() == "step" else 0].get_xticklabels()
        assert 2 < len(ticks) < 16
