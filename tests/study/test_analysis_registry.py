"""The registries agree with each other and with results; and an analysis is added by three files, shown on a copy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkernel.report.analysis_tables import REPORTS, UPDATE_REPORTS
from fkernel.study import AnalysesPlan, FisherKernelResults, RequestAnalyses
from fkernel.study.analyses.registry import ANALYSES, UPDATE_ANALYSES

ROOT = Path(__file__).parent.parent.parent
BOTH = {**ANALYSES, **UPDATE_ANALYSES}


def test_a_key_is_the_same_in_plans_results_and_report():
    assert [*RequestAnalyses.model_fields] == [*ANALYSES]
    assert [*AnalysesPlan.model_fields] == [*BOTH]
    assert {*REPORTS} == {*ANALYSES}
    assert {*UPDATE_REPORTS} == {*UPDATE_ANALYSES}


@pytest.mark.parametrize("name", BOTH)
def test_an_analysis_is_computed_at_once_or_of_rows(name):
    analysis = BOTH[name]
    assert (analysis.compute is None) != (analysis.accumulator is None)


@pytest.mark.parametrize("name", BOTH)
def test_what_an_analysis_leaves_is_declared_and_documented(accounted, name):
    _, results = accounted
    given = [results.analyses, *(result.analyses for result in results.requests.values())]
    left = {
        array for each in given for key, one in each.items() if key.partition(".")[0] == name for array in one.arrays
    }
    assert not [array for array in left if not any(fnmatchcase(array, column) for column in BOTH[name].columns)]
    section = (ROOT / "docs" / "results.md").read_text().split("## What analyses leave")[1].split("\n## ")[0]
    (row,) = (line for line in section.splitlines() if line.startswith(f"| `{name}"))
    shown = row.replace("layer_…", "layer_batch layer_squared_norms layer_contributions").replace("pair_<i>", "pair_*")
    shown = shown.replace("part.<name>", "part.*").replace("<observable>.", "*.")
    assert not [column for column in BOTH[name].columns if column not in shown]


# ------------------------------------------------------------------------------------------- one more, on a copy

QUESTION = '''"""Which sequences of E the batch raised by more than so many nats."""

from pydantic import Field

from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import RequestContext
from fkernel.study.outcome import AnalysisResult
from fkernel.study.config.base import Strict


class RaisedPlan(Strict):
    """Which sequences were raised."""

    above: float = Field(0.0, description="nats")


def compute(context: RequestContext, config: RaisedPlan) -> AnalysisResult:
    """Count them."""
    raised = context.effects["batch"].double().cpu() > config.above
    return AnalysisResult({"raised": raised.numpy()}, {"above": config.above, "count": int(raised.sum())})


RAISED = Analysis(("raised",), compute=compute)
'''
REPORT = '''def raised_table(result: RequestResult, rows: int = 10) -> Table:
    """Tabulate how many were raised."""
    table = Table("raised", title=f"{result.name}: what was raised")
    table.add_row(str(result.analysis("raised").facts["count"]))
    return table


def raised_panel(result: RequestResult) -> Figure:
    """Draw which."""
    from fkernel.report.style import figure, finish

    drawn = figure(4, 3)
    drawn.subplots().plot(result.analysis("raised")["raised"])
    return finish(drawn, None)


class AnalysisReport('''
EDITS = {
    "study/analyses/registry.py": {
        "from fkernel.study.analyses.structure import": (
            "from fkernel.study.analyses.raised import RAISED, RaisedPlan\nfrom fkernel.study.analyses.structure import"
        ),
        '    "covariates": COVARIATES,\n': '    "covariates": COVARIATES,\n    "raised": RAISED,\n',
        "    covariates: bool = False\n": (
            "    covariates: bool = False\n    raised: Annotated[RaisedPlan | None, Switch] = None\n"
        ),
    },
    "report/analysis_tables.py": {
        "class AnalysisReport(": REPORT,
        '    "sweep": AnalysisReport(sweep_table': (
            '    "raised": AnalysisReport(raised_table, raised_panel),\n    "sweep": AnalysisReport(sweep_table'
        ),
    },
}
STUDY = """
import json, sys
from rich.console import Console
from fkernel import report
from fkernel.study import FisherKernelPlan, FisherKernelRunner
plan = json.load(sys.stdin)
assert "raised" in FisherKernelPlan.model_json_schema()["$defs"]["RequestAnalyses"]["properties"]
results = FisherKernelRunner(plan).run()
results.save_results(plan["out"])
report.draw_all(results, plan["out"] + "/pictures")
for table in report.request_tables(results["held_out"]):
    Console(width=100).print(table)
"""


def study_with_one_more(plan: dict[str, Any], copy: Path) -> str:
    """Add the analysis to a copy of the package, run a plan that asks for it there, and give what was printed."""
    shutil.copytree(ROOT / "fkernel", copy / "fkernel", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "fkernel/study/analyses/raised.py").write_text(QUESTION)
    for name, changes in EDITS.items():
        source = (copy / "fkernel" / name).read_text()
        for old, new in changes.items():
            assert source.count(old) == 1, (name, old)
            source = source.replace(old, new)
        (copy / "fkernel" / name).write_text(source)
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STUDY], cwd=copy, env=environment, input=json.dumps(plan), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.turns(6)
def test_adding_an_analysis_takes_three_files(run, tmp_path):
    assert len(EDITS) + 1 == 3
    plan = run.plan(tmp_path / "out", analyses={"raised": {"above": -1.0}, "covariates": True})
    printed = study_with_one_more(plan, tmp_path / "copy")
    assert "held_out: what was raised" in " ".join(printed.split())
    results = FisherKernelResults.load(tmp_path / "out")  # files are read without knowing which analyses there are
    result = results["held_out"]
    assert [*result.analyses] == ["covariates", "raised"]
    found = result.analysis("raised")
    np.testing.assert_array_equal(found["raised"], result.batch > -1.0)
    assert found.facts == {"above": -1.0, "count": int((result.batch > -1.0).sum())}
    assert results.plan["analyses"]["raised"] == {"above": -1.0}
    assert (tmp_path / "out" / "pictures" / "held_out_raised.png").exists()
