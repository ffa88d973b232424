"""Results in a terminal and in a notebook: one screen, identical sequences as one, no number cut."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from fkernel.cli.console import Tables, progress_and_log
from fkernel.demo.progress import silent
from fkernel.report.summary import culprit_lines, probe_lines
from fkernel.study import AnalysisResult, RequestResult, SequenceInfo
from fkernel.study.results import FisherKernelResults


def info(name: str, tokens: str, **more) -> SequenceInfo:
    return SequenceInfo(name, "1+1=", tokens, -1.0, content_hash=tokens, prompt_id="p", **more)


U = (info("a", "x"), info("b", "y"), info("c", "x"), info("d", "z"))
C = np.array([[0.3, -0.5, 0.4, 0.1]])


def result(contributions: Any = C) -> RequestResult:
    order = np.argsort(-np.abs(C), axis=1)
    return RequestResult("probes", "payload", (info("<probe>", "w"),), U, C.sum(1), realised=np.array([0.3]),
                         top=order, top_contributions=np.take_along_axis(C, order, 1),
                         contributions=contributions)  # fmt: skip


def named(pairs) -> list[tuple[str, int, Any]]:
    return [(u.id, u.times, pytest.approx(nats)) for u, nats in pairs]


def test_identical_sequences_are_one_with_their_sum():
    assert named(result().top_contributors(0, 4)) == [("b", 1, -0.5), ("c", 1, 0.4), ("a", 1, 0.3), ("d", 1, 0.1)]
    grouped = [("c", 2, 0.7), ("b", 1, -0.5), ("d", 1, 0.1)]
    assert named(result().top_contributors(0, 4, group_identical=True)) == grouped
    assert named(result(None).top_contributors(0, 4, group_identical=True)) == grouped  # of the stored top alone


def test_lists_of_what_raised_and_what_lowered():
    assert named(result().top_contributors(0, 2, True, "raised")) == [("c", 2, 0.7), ("d", 1, 0.1)]
    assert named(result().top_contributors(0, 2, which="lowered")) == [("b", 1, -0.5)]


def test_a_result_is_one_screen_and_a_table_in_a_notebook():
    one: Any = result()
    rows = replace(one, evaluation=one.evaluation * 50, batch=np.full(50, 0.3), realised=np.full(50, 0.3),
                   top=np.repeat(one.top, 50, 0), top_contributions=np.repeat(one.top_contributions, 50, 0),
                   contributions=np.repeat(C, 50, 0))  # fmt: skip
    whole = FisherKernelResults({}, {}, U, {}, None, {f"r{i}": rows for i in range(30)})
    for shown in (rows, whole):
        lines = repr(shown).splitlines()
        assert len(lines) <= 20
        assert max(map(len, lines)) <= 120
    assert "1 sequence," in repr(one)
    html = one._repr_html_()
    assert "&lt;probe&gt;" in html
    assert "c × 2" in html
    assert html.count("<tr>") == 2


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_number_and_no_text_is_cut(width):
    text, numbers = "a text that is much longer than it has to be", ("-65.4321", "+1234.5678", "-0.0001")
    table = Table(title="changes")
    table.add_column("sequence", no_wrap=True)
    for name in ("predicted", "momentum", "realised"):
        table.add_column(name, justify="right")
    table.add_row(text, *numbers)
    table.add_row("short", "1", "2", "3")
    file = io.StringIO()
    Tables(width=width, file=file).print(table)
    printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    for each in (*numbers, "predicted", "momentum", "realised"):
        assert each in printed
    assert all(word in printed for word in text.split())
    beside = any("sequence" in line and "realised" in line for line in printed.splitlines())
    assert beside == (width >= 60)  # else each row is a list


@pytest.mark.parametrize(
    ("informative", "of_prompt", "alone", "together"),
    [
        ([True], 0.4, ", p 0.3, its prompt's p 0.4 (could be chance)", ", its prompt's p 0.4 (could be chance)"),
        (
            [True],
            0.01,
            ", p 0.3, its prompt's p 0.01",
            ", its prompt's p 0.01",
        ),  # several added up have no p of their own
        ([False], 1.0, "", ""),
    ],
)
def test_a_p_value_is_told_only_where_something_was_permuted(informative, of_prompt, alone, together):
    made = result()
    facts = {"informative": informative, "prompts": ["p"], "least": [0.25, 0.5]}
    arrays = {"top_p": np.full((1, 4), 0.3), "prompt_p": np.full((1, 1), of_prompt), "p": np.full(1, 0.002)}
    sure = replace(made, analyses={"uncertainty": AnalysisResult(arrays, facts)})
    lines = culprit_lines(sure, 0)
    assert lines[0].endswith(f"+700.00{together}")
    assert lines[1].endswith(f"−500.00{alone}")
    said = probe_lines(sure)
    assert (" (p 0.002)" in said[0]) == informative[0]
    assert ("a sequence's cannot be below 0.25 here" in said[-1]) == informative[0]


def test_long_headings_of_numbers_leave_room_for_texts():
    table = Table("probe")
    for title in ("after the whole run", "after the replay of it", "difference of the two"):
        table.add_column(title, justify="right")
    table.add_row("right 37+85=122", "-0.11", "-0.12", "+0.01")
    file = io.StringIO()
    Tables(width=68, file=file).print(table)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 68
    assert any("right 37+85=122" in line and "-0.11" in line and "+0.01" in line for line in lines)
    assert not any("after the whole run" in line for line in lines)
    wide = io.StringIO()
    Tables(width=120, file=wide).print(Table("probe", "after the whole run"))
    assert "after the whole run" in wide.getvalue()


def test_a_phase_of_several_requests_counts_all_of_them(monkeypatch):
    bars = silent()
    monkeypatch.setattr("fkernel.demo.visible", lambda console: bars)
    with progress_and_log("minimal") as on_progress:
        for _ in range(4):
            on_progress("analysis ledger", 0, 0)  # begins
            on_progress("analysis ledger", 1, 1)
        on_progress("held", 2, 3)
    assert [(bar.description, bar.completed, bar.total) for bar in bars.tasks] == [
        ("analysis ledger", 4, 4),
        ("held", 2, 3),
    ]


def test_identical_sequences_have_the_smallest_of_their_p_values():
    made = result()
    facts = {"informative": [True], "prompts": ["p"], "least": [0.01]}
    arrays = {"sequence_p": np.array([[0.3, 0.02, 0.04, 0.9]]), "prompt_p": np.full((1, 1), 0.5), "p": np.full(1, 0.5)}
    lines = culprit_lines(replace(made, analyses={"uncertainty": AnalysisResult(arrays, facts)}), 0)
    assert lines[0].endswith("+700.00, p 0.04, its prompt's p 0.5"), lines


def test_who_did_next_to_nothing_is_not_named():
    made = result()
    tiny = made.contributions * np.array([[1.0, 1e-6, 1.0, 1e-6]])
    lines = culprit_lines(replace(made, contributions=tiny), 0)
    assert len(lines) == 1
