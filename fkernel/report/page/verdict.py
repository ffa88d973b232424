"""The verdict on a study: does what is predicted agree with what was measured, and what warns of it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fkernel.report.run_tables import FLOORS, LEFT_OVER, account_lines, left_over
from fkernel.report.style import percent
from fkernel.study import AccountResults, FisherKernelResults, RequestResult

Level = Literal["good", "note", "warning", "bad"]
SELF_CONSISTENT = (
    "The step was executed here, from the optimizer's state as it was read: that predicted and measured changes agree "
    "does not show that it was read rightly. Name the checkpoint after the step (step.after) to test that, too."
)


def line(level: Level, text: str) -> dict[str, str]:
    """A sentence, with how much it should worry."""
    return {"level": level, "text": text}


def study_verdict(results: FisherKernelResults) -> dict[str, Any]:
    """What a study says of its step: a headline, sentences, and a row of numbers for every request."""
    requests = [request_check(result) for result in results.requests.values()]
    lines = [*_step_lines(results), *_closing(requests), *_left_out(results)]
    if any(result.calibration and result.facts.get("realised_on") != "step.after" for result in _requests(results)):
        lines.append(line("note", SELF_CONSISTENT))
    worst = _worst(lines)
    measured = [check for check in requests if check["error"] is not None]
    headline = {
        "good": "The prediction agrees with what was measured",
        "warning": "The prediction agrees with what was measured, with warnings",
        "bad": "Something is wrong: read this before the numbers",
    }[worst]
    if not measured and worst != "bad":
        headline = "Nothing was measured to compare the prediction with"
    return {"level": worst, "headline": headline, "lines": lines, "checks": requests}


def account_verdict(results: AccountResults) -> dict[str, Any]:
    """What an account says of its run: whether its columns add up, and what it lacks."""
    _, *rest = account_lines(results)
    loud = any(len(left_over(results, name)) for name in ("remainder", "unexplained"))
    lines = [line("bad" if text.startswith("DOES NOT") else "good", text) for text in rest[:1]]
    lines += [line("bad" if text.startswith("DOES NOT") else "note", text) for text in rest[1:]]
    headline = "The account does not add up" if loud else "The account adds up to what was measured"
    return {"level": "bad" if loud else "good", "headline": headline, "lines": lines, "checks": []}


def request_check(result: RequestResult) -> dict[str, Any]:
    """Numbers of a request: r, slope, relative error, and the ledger's remainder beside its rounding floor."""
    value = result.calibration.get("predicted") or result.calibration.get("batch")
    ledger = result.analyses.get("ledger")
    facts = {} if ledger is None or ledger.skipped is not None else ledger.facts
    return {
        "request": result.name,
        "kind": result.kind,
        "sequences": len(result.evaluation),
        "r": None if value is None else value.pearson,
        "slope": None if value is None else value.slope,
        "error": None if value is None else value.relative_error,
        "remainder": facts.get("error"),
        "floor": facts.get("floor"),
        "unexplained": facts.get("unexplained"),
        "measured": "the step really taken" if result.facts.get("realised_on") == "step.after" else "executed here",
        "closes": None if not facts or facts["error"] is None else _closes(facts),
    }


def _closes(facts: dict[str, Any]) -> bool:
    """Whether what remains is little of the change, or no more than rounding; so is what is unexplained."""
    floor = facts["floor"] or 0.0
    rest = max(facts["error"], facts.get("unexplained") or 0.0)
    return bool(np.isfinite(rest) and (rest <= LEFT_OVER or rest <= FLOORS * floor))


def _closing(checks: list[dict[str, Any]]) -> list[dict[str, str]]:
    lines = []
    for check in checks:
        if check["closes"] is None:
            continue
        size = f"{percent(check['remainder'])} is left over, rounding alone leaves {percent(check['floor'])}"
        if check["unexplained"] is not None:
            size += f"; unexplained {percent(check['unexplained'])}"
        if check["closes"]:
            lines.append(line("good", f"{check['request']}: the terms add up to what was measured: {size}."))
        else:
            lines.append(line("bad", f"{check['request']}: THE TERMS DO NOT ADD UP to what was measured: {size}."))
    return [*lines, *(_without_ledger(check) for check in checks if check["closes"] is None)]


def _without_ledger(check: dict[str, Any]) -> dict[str, str]:
    """What a request without a ledger says of its prediction."""
    if check["error"] is None:
        return line("note", f"The change of {check['request']} was not measured, or of one sequence alone.")
    agrees = check["error"] <= LEFT_OVER
    text = f"{check['request']}: the prediction is {percent(check['error'])} off what was measured; it has no ledger."
    return line("note" if agrees else "warning", text)


def _step_lines(results: FisherKernelResults) -> list[dict[str, str]]:
    """The audit, failed certificates, and what the training did that is not modelled."""
    audit, lines = results.step.get("audit"), []
    if audit is not None:
        verdict = f"Audit of the weights before and after: {audit['verdict']}."
        lines.append(line("good" if audit["fine"] else "bad", verdict))
        lines += [line("bad", finding["sentence"]) for finding in audit["findings"]]
    else:
        lines.append(line("note", "Not audited: the plan does not name the checkpoint after the step (step.after)."))
    for each in results.environment.get("certificates", []):
        if each["passed"] is False:
            lines.append(line("warning", f"Certificate {each['name']} failed: {each['detail']}"))
    for each in results.environment.get("conditions", []):
        advice = f" {each['advice']}" if each.get("advice") else ""
        text = f"The training did what is not modelled here: {each['found']}. {each.get('effect', '')}{advice}"
        lines.append(line("warning", text))
    return lines


def _left_out(results: FisherKernelResults) -> list[dict[str, str]]:
    """Analyses that were asked for and could not be computed."""
    owners = [("U", results.analyses), *((result.name, result.analyses) for result in _requests(results))]
    return [
        line("warning", f"{owner}: {name} was left out: {analysis.skipped}.")
        for owner, analyses in owners
        for name, analysis in analyses.items()
        if analysis.skipped is not None
    ]


def _requests(results: FisherKernelResults) -> list[RequestResult]:
    return [*results.requests.values()]


def _worst(lines: list[dict[str, str]]) -> str:
    levels = {each["level"] for each in lines}
    return "bad" if "bad" in levels else "warning" if "warning" in levels else "good"
