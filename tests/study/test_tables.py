"""Tables and coloured tokens of a study's analyses say what results hold."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import fkernel as fk
from fkernel import report
from fkernel.report.analysis_tables import REPORTS, structure_table
from fkernel.study import AnalysisResult


@pytest.fixture(scope="module")
def results(accounted):
    return accounted[1]


def shown(*things):
    file = io.StringIO()
    console = Console(file=file, width=200, color_system=None)
    for thing in things:
        console.print(thing)
    return file.getvalue()


def test_a_ledgers_rows_add_up_in_print(results):
    found = results["held_out"]
    text = shown(report.ledger_table(found, rows=3))
    rows = [line for line in text.splitlines() if "E-00" in line]
    assert len(rows) == 3
    for line in rows:
        numbers = [float(x) for x in re.findall(r"[+-]?\d+\.\d+|\b0\b", line.replace("−", "-"))]
        assert sum(numbers[:5]) == pytest.approx(numbers[5], abs=0.004)
    most = found.evaluation[int(np.abs(found.realised).argmax())].id
    assert most in rows[0]
    said = " ".join(text.split())
    assert f"gradients scaled by {results.step['clip']:.3g} (clipping)" in said
    assert "those of E are at the step's midpoint" in said


@pytest.mark.parametrize("kind", [*REPORTS])
def test_every_table_is_about_its_request(results, kind):
    text = shown(REPORTS[kind].table(results["held_out"], 4))
    assert text.strip().startswith("held_out:")
    assert "nan" not in text


def test_everything_that_was_asked_is_shown_and_what_was_left_out_says_why(results):
    text = shown(*report.request_tables(results["self"], 3))
    for word in ("the ledger", "how sure", "tokens", "through which parameters", "steps that were not taken",
                 "which preconditioner", "what changes go with", "other sizes"):  # fmt: skip
        assert word in text
    assert "observables.odds was left out: none of the pairs" in text
    assert "rloo" in text


def test_contributors_that_could_be_chance_are_told_from_those_that_could_not(results):
    found = results["self"]
    sure = found.analysis("uncertainty")
    n = len(sure["top_p"])
    for own, prompt, mark in ((0.01, 1.0, "*"), (1.0, 0.01, "†"), (1.0, 1.0, " ")):
        arrays = {
            **sure.arrays,
            "sequence_p": np.full((n, len(found.update)), own),
            "prompt_p": np.full_like(sure["prompt_p"], prompt),
        }
        marked = replace(found, analyses={"uncertainty": AnalysisResult(arrays, sure.facts)})
        text = shown(report.effects_table(marked, 2))
        rows = re.findall(r"\d\.\d\d(.)  U-", text)
        assert {*rows} == {mark}
        assert "told apart from chance" in text
    plain = shown(report.effects_table(replace(found, analyses={}), 2))
    assert "chance" not in plain


def test_tokens_are_coloured_by_their_change(results):
    found = results["held_out"]
    html = report.token_html(found)
    assert html.count("<span") == int(found.analysis("tokens")["response"].sum())
    assert html.count("<b>") == len(found.evaluation)
    logprob = found.analysis("tokens")["logprob"]
    row = int(np.abs(logprob).max(1).argmax())
    one = report.token_html(found, [found.evaluation[row].id])
    strongest = "#b2182b" if logprob[row][np.abs(logprob[row]).argmax()] > 0 else "#2166ac"
    assert strongest in one
    assert one.count("<b>") == 1
    with pytest.raises(fk.ResultsError, match="has no sequence 'no-such'"):
        report.token_html(found, ["no-such"])


def test_markup_in_a_token_is_text():
    from fkernel.report.tokens import token_text

    text = token_text(["[red]", "<b>", "\n", "a b"], [0.0, 1.0, -1.0, 0.1], 1.0)
    assert text.plain == "[red] <b> ⏎ a b "
    assert {span.style for span in text.spans} >= {"#000000 on #ffffff", "#ffffff on #b2182b", "#ffffff on #2166ac"}


def test_tokens_that_were_not_asked_for_are_said(results):
    with pytest.raises(fk.ResultsError, match="ask for it in the plan"):
        report.token_html(replace(results["held_out"], analyses={}))


def test_u_itself(results):
    text = " ".join(shown(*report.update_tables(results)).split())
    assert "P rests on" in text
    assert "alignment with K_UU after the step" in text
    assert shown(structure_table(results)).count("U-0") >= 3
    missing = replace(results, analyses={"health": AnalysisResult({}, {"left_out": "it has no state"})})
    assert [*report.update_tables(missing)] == ["P: it has no state"]
