"""The page holds what the results hold, to the last bit; what users' texts say is shown, and never executed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from fkernel.cli import app
from fkernel.errors import ResultsError
from fkernel.report import load_results, page, write_page
from fkernel.report.analysis_tables import REPORTS, UPDATE_REPORTS
from fkernel.report.page import account_page, study_page
from fkernel.report.page.packing import as_json, packed
from fkernel.study import AccountResults, AnalysesPlan, FisherKernelResults
from fkernel.study.analyses.registry import ANALYSES, UPDATE_ANALYSES
from tests.report.made import HOSTILE, made_account, made_study

HERE = Path(page.__file__).parent
TYPES = {"f": "<f4", "d": "<f8", "i": "<i4"}


class Parts(HTMLParser):
    """The scripts of a page, its policy, its tags, and its text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.tags: list[str] = []
        self.policy, self.text = "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "script":
            self.scripts.append((given, ""))
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data


def parts_of(path: Path) -> Parts:
    parts = Parts()
    parts.feed(path.read_text(encoding="utf-8"))
    return parts


def data_of(path: Path) -> dict[str, Any]:
    """The data of a page, as its own script reads it."""
    (text,) = (text for given, text in parts_of(path).scripts if given.get("id") == "data")
    return json.loads(text)


def array(given: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(given["bytes"]), TYPES[given["type"]]).reshape(given["shape"])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[FisherKernelResults, Path]:
    results, place = made_study(), tmp_path_factory.mktemp("study")
    results.save_results(place)
    write_page(load_results(place), place)
    return results, place


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> tuple[AccountResults, Path]:
    results, place = made_account(), tmp_path_factory.mktemp("account")
    results.save(place)
    write_page(load_results(place), place)
    return results, place


# ------------------------------------------------------------------------------------------------- what it holds


def test_the_numbers_of_a_study_are_those_of_results_json(study):
    _, place = study
    said = json.loads((place / "results.json").read_text())["requests"]["held_out"]["evaluation"]
    (group,) = data_of(place / "report.html")["groups"]
    assert group["rows"]["ids"] == [row["id"] for row in said]
    assert [group["rows"]["prompts"][i] for i in group["rows"]["prompt"]] == [row["prompt"] for row in said]
    assert group["rows"]["responses"] == [row["response"] for row in said]
    for name, key in (("measured", "realised"), ("predicted", "predicted")):
        assert array(group[name]).astype(float).tolist() == [row[key] for row in said]
    top = array(group["top"]["values"]).astype(float)
    assert top.tolist() == [[each["value"] for each in row["top_contributors"]] for row in said]


def test_the_arrays_of_a_study_are_those_of_kernel_npz(study):
    _, place = study
    (group,) = data_of(place / "report.html")["groups"]
    with np.load(place / "kernel.npz") as arrays:
        for name in ("kernel", "contributions"):
            np.testing.assert_array_equal(array(group[name]), arrays[f"held_out/{name}"])
        for term in group["terms"]["terms"]:
            np.testing.assert_array_equal(array(term["values"]), arrays[f"held_out/ledger/{term['name']}"])
        np.testing.assert_array_equal(array(group["terms"]["floor"]), arrays["held_out/ledger/floor"])
        changes = [x for row in group["tokens"]["logprob"] for x in row]
        given = arrays["held_out/tokens/logprob"][arrays["held_out/tokens/response"]]
        assert changes == given.astype(float).tolist()


def test_the_terms_of_a_change_add_up(study, account):
    for _, place in (study, account):
        (group,) = data_of(place / "report.html")["groups"]
        total = sum(array(term["values"]).astype(float) for term in group["terms"]["terms"])
        np.testing.assert_allclose(total, array(group["terms"]["total"]), atol=1e-6)


def test_without_a_ledger_what_is_left_is_the_remainder(study):
    results, _ = study
    bare = results["held_out"]
    (group,) = study_page(made_without_analyses(results), "bare")["groups"]
    names = [term["name"] for term in group["terms"]["terms"]]
    assert names == ["batch", "momentum", "decay", "remainder"]
    rest = bare.realised.astype(float) - bare.batch.astype(float) - bare.momentum.astype(float)
    np.testing.assert_allclose(array(group["terms"]["terms"][-1]["values"]), rest, atol=1e-9)


def made_without_analyses(results: FisherKernelResults) -> FisherKernelResults:
    return replace(results, requests={name: replace(each, analyses={}) for name, each in results.requests.items()})


def test_the_numbers_of_an_account_are_those_of_account_json(account):
    results, place = account
    said = json.loads((place / "account.json").read_text())
    data = data_of(place / "report.html")
    (group,) = data["groups"]
    assert data["sequences"]["ids"] == [row["id"] for row in said["sequences"]]
    assert data["sequences"]["numbers"]["advantage"] == [row["advantage"] for row in said["sequences"]]
    assert data["steps"]["grad_norm"] == [row["grad_norm"] for row in said["steps"]]
    for term in group["terms"]["terms"]:
        given = [probe["ledger"][term["name"]] for probe in said["probes"]]
        assert array(term["values"]).astype(float).tolist() == given
    np.testing.assert_array_equal(array(group["contributions"]), results["contributions"])
    np.testing.assert_array_equal(array(group["p"]), results["p"])
    np.testing.assert_array_equal(array(group["split"]["rewards"]["values"]), results["rewards"])


# ---------------------------------------------------------------------------------------------------- the verdict


def test_the_verdict_is_readable_without_a_script(study):
    text = parts_of(study[1] / "report.html").text
    assert "The prediction agrees with what was measured, with warnings" in text
    assert "Audit of the weights before and after: the step is the one described." in text
    assert "held_out: the terms add up to what was measured" in text
    assert "0.001 % is left over, rounding alone leaves 0.002 %" in text
    assert "held_out: sweep was left out: there is no <step>." in text


def test_a_ledger_that_does_not_close_comes_first(study):
    results, _ = study
    results["held_out"].analyses["ledger"].facts["error"] = 0.4
    try:
        verdict = study_page(results, "bad")["verdict"]
    finally:
        results["held_out"].analyses["ledger"].facts["error"] = 1e-5
    assert verdict["level"] == "bad"
    assert "Something is wrong" in verdict["headline"]
    assert any("DO NOT ADD UP to what was measured: 40 % is left over" in line["text"] for line in verdict["lines"])


def test_an_account_that_does_not_add_up_says_so():
    results = made_account()
    results.arrays["remainder"] = results["remainder"] + 1.0
    verdict = account_page(results, "bad")["verdict"]
    assert verdict["headline"] == "The account does not add up"
    assert "DOES NOT ADD UP" in verdict["lines"][0]["text"]


# -------------------------------------------------------------------------------------------------- every analysis


def test_every_analysis_registers_its_panel():
    reports = {**REPORTS, **UPDATE_REPORTS}
    assert {*reports} == {*ANALYSES, *UPDATE_ANALYSES}
    assert not [name for name, report in reports.items() if report.page is None]


def test_an_analysis_that_was_not_asked_for_says_how_to_ask(study):
    data = data_of(study[1] / "report.html")
    panels = {panel["key"]: panel for panel in [*data["groups"][0]["panels"], *data["panels"]]}
    assert {*panels} == {*ANALYSES, *UPDATE_ANALYSES}
    assert panels["sweep"]["left_out"] == "there is no <step>"
    assert panels["parts"]["ask"] == "analyses:\n  parts: true"
    assert "blocks" in panels["ledger"]
    assert "blocks" not in panels["parts"]


@pytest.mark.parametrize("name", [*ANALYSES, *UPDATE_ANALYSES])
def test_what_a_plan_is_told_to_ask_is_what_a_plan_takes(name):
    panel = {**REPORTS, **UPDATE_REPORTS}[name].page
    assert panel is not None
    assert getattr(AnalysesPlan.model_validate(yaml.safe_load(panel.ask)), name)


def test_panels_of_a_real_study_hold_something(accounted):
    _, results = accounted
    data = study_page(results, "everything")
    json.loads(as_json(data))
    panels = [*data["groups"][0]["panels"], *data["panels"]]
    names = {panel["key"] for panel in panels if panel.get("blocks")}
    assert names == {
        *results["held_out"].analyses,
        *results.analyses,
        *(["self_kernel"] if results.self_kernel else []),
    }
    for panel in panels:
        for block in panel["blocks"]:
            assert any(block.get(key) for key in ("rows", "values", "series", "x", "text")) or block["kind"] == "tokens"


# -------------------------------------------------------------------------------------------- what cannot happen


def test_texts_of_users_are_texts(study, account):
    for _, place in (study, account):
        parts = parts_of(place / "report.html")
        texts = {*data_of(place / "report.html")["sequences"]["prompts"]}
        assert texts <= {*HOSTILE}
        assert len(texts) > 3
        assert not {"img", "a", "b", "i"} & {*parts.tags}
        assert parts.tags.count("script") == len(parts.scripts)


def test_only_the_pages_own_scripts_may_run_and_nothing_is_fetched(study):
    parts = parts_of(study[1] / "report.html")
    run = [text for given, text in parts.scripts if given.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert re.findall(r"'sha256-([^']+)'", parts.policy) == hashes
    assert "default-src 'none'" in parts.policy
    assert "unsafe-eval" not in parts.policy
    assert not [given for given, _ in parts.scripts if "src" in given]
    assert not {"link", "iframe", "form"} & {*parts.tags}
    assert "sourceMappingURL" not in (study[1] / "report.html").read_text()


def test_a_page_needs_no_library_of_pictures(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_page(study[0], tmp_path) == tmp_path / "report.html"


def test_a_page_is_small(study):
    assert (study[1] / "report.html").stat().st_size < 2.6e6


def test_libraries_come_with_their_licences():
    libraries = {path.name.partition(".")[0].partition("-")[0] for path in (HERE / "libraries").glob("*.js")}
    assert libraries == {"plotly", "tabulator"}
    for name in libraries:
        assert "Permission is hereby granted" in (HERE / "libraries" / f"{name}.LICENSE").read_text()


# ----------------------------------------------------------------------------------------------- pieces, commands


@pytest.mark.parametrize(
    "values", [np.array([1.5, np.nan], np.float32), np.arange(6.0).reshape(2, 3), np.array([1, 2]), np.array([0.1])]
)
def test_packed_arrays_come_back(values):
    given = packed(values)
    assert given is not None
    back = array(given)
    assert back.shape == values.shape
    np.testing.assert_allclose(back, values, rtol=1e-7)
    if values.ndim == 1:
        np.testing.assert_array_equal(back.astype(values.dtype), values)


@pytest.mark.parametrize("text", [*HOSTILE, "]]>", "\u2028", "\\u003c"])
def test_json_in_html_comes_back_and_has_no_markup(text):
    written = as_json({"text": text})
    assert not re.search(r"[<>&\u2028\u2029]", written)
    assert json.loads(written) == {"text": text}


def test_the_command_writes_a_page_of_either_kind(study, account, tmp_path):
    for number, (_, place) in enumerate((study, account)):
        out = tmp_path / f"{number}.html"
        done = CliRunner().invoke(app, ["report", str(place), "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert data_of(out)["title"] == place.name
        assert CliRunner().invoke(app, ["report", str(place)]).exit_code == 0


def test_a_directory_without_results_is_an_error_that_says_what_to_name(tmp_path):
    with pytest.raises(ResultsError, match=r"neither results\.json nor account\.json; name a directory"):
        load_results(tmp_path)
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2
