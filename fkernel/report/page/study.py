"""A study as the page's data."""

from __future__ import annotations

from typing import Any

import numpy as np

from fkernel.report.blocks import facts
from fkernel.report.page.packing import info_rows, packed, packed_sequences
from fkernel.report.page.panels import request_panels, selected_panels, self_kernel_panels, update_panels
from fkernel.report.page.verdict import study_verdict
from fkernel.report.units import Unit, labelled, study_unit
from fkernel.study import AnalysisResult, FisherKernelResults, RequestResult

NUMBERS = ("reward", "advantage", "weight", "logprob")
EFFECTS = ("momentum", "decay", "arithmetic", "unexplained", "curvature", "unselected")


def study_page(results: FisherKernelResults, title: str) -> dict[str, Any]:
    """A study as the page's data: JSON, with arrays packed.

    Args:
        results: the study's.
        title: of the page.
    """
    unit = study_unit(results)
    step, checkpoint = results.step, results.plan.get("checkpoint", {})
    about = {
        "checkpoint": checkpoint.get("path") or checkpoint.get("recording"),
        "optimizer steps before this one": step.get("step", checkpoint.get("step")),
        "optimizer": step.get("optimizer"),
        "learning rate": ", ".join(f"{lr:g}" for lr in step.get("lr") or []),
        "gradient norm before clipping": f"{step['grad_norm']:.4g}",
        "gradients are scaled by (clipping)": f"{step['clip']:.4g}",
        "update batch": f"{len(results.update)} sequences, {len({u.prompt_id for u in results.update})} prompts",
    }
    return {
        "kind": "study",
        "title": title,
        "unit": unit._asdict(),
        "about": [[name, str(value)] for name, value in about.items() if value not in (None, "")],
        "verdict": study_verdict(results),
        "sequences": packed_sequences(info_rows(results.update), NUMBERS),
        "groups": [_group(result, unit) for result in results.requests.values()],
        "panels": [*update_panels(results, unit), *self_kernel_panels(results)],
        "provenance": _provenance(results),
    }


def _group(result: RequestResult, unit: Unit) -> dict[str, Any]:
    """A request: its sequences, their changes, and who made them."""
    return {
        "name": result.name,
        "kind": result.kind,
        "correct": result.facts.get("correct"),
        "rows": packed_sequences(info_rows(result.evaluation), NUMBERS),
        "predicted": packed(result.predicted),
        "measured": packed(result.realised),
        "terms": _terms(result),
        "contributions": packed(result.contributions),
        "kernel": packed(result.kernel),
        "diagonals": None if result.kernel is None else [packed(result.diagonal), packed(result.update_diagonal)],
        "top": _top(result),
        **_chance(result.analyses.get("uncertainty")),
        "tokens": _tokens(result.analyses.get("tokens")),
        "panels": [*request_panels(result, unit), *selected_panels(result, unit)],
    }


def _terms(result: RequestResult) -> dict[str, Any]:
    """The terms of every change, which add up to what was measured or predicted; the ledger's, where there is one."""
    ledger = result.analyses.get("ledger")
    if ledger is not None and ledger.skipped is None:
        terms = {name: values for name, values in ledger.arrays.items() if name not in ("realised", "floor")}
        return _packed_terms(terms, ledger["realised"], ledger["floor"])
    terms = {f"part.{name}": values for name, values in result.parts.items()} or {"batch": result.batch}
    terms |= {name: values for name in EFFECTS if (values := getattr(result, name)) is not None}
    terms.pop("curvature", None)  # no part of a sum
    if result.realised is None:
        return _packed_terms(terms, None, None)
    rest = result.realised.astype(float) - sum(values.astype(float) for values in terms.values())
    return _packed_terms({**terms, "remainder": rest}, result.realised, None)


def _packed_terms(terms: dict[str, np.ndarray], total: np.ndarray | None, floor: np.ndarray | None) -> dict[str, Any]:
    rows = [{"name": name, "label": labelled(name), "values": packed(values)} for name, values in terms.items()]
    return {"terms": rows, "total": packed(total), "floor": packed(floor)}


def _top(result: RequestResult) -> dict[str, Any] | None:
    """The largest contributors of every row, with p-values and parts where they are known."""
    if result.top is None or result.top_contributions is None:
        return None
    uncertainty, parts = result.analyses.get("uncertainty"), result.analyses.get("parts")
    p = None if uncertainty is None else uncertainty.arrays.get("top_p")
    split = {}
    for view in ("kind", "layer"):
        if parts is not None and f"{view}_contributions" in parts.arrays:
            values = np.take_along_axis(parts[f"{view}_contributions"], result.top[None], 2)
            split[view] = {"names": parts.facts[f"{view}s"], "values": packed(values)}
    return {
        "columns": packed(result.top),
        "values": packed(result.top_contributions),
        "p": packed(p),
        "parts": split,
    }


def _chance(uncertainty: AnalysisResult | None) -> dict[str, Any]:
    """p-values of the whole batch, of every sequence where they were kept, and of prompts with their sums."""
    if uncertainty is None or uncertainty.skipped is not None:
        return {"prompts": None}
    given = {"sums": uncertainty["prompt_contributions"], "p": uncertainty["prompt_p"]}
    prompts = {"ids": uncertainty.facts["prompts"], **{name: packed(values) for name, values in given.items()}}
    return {
        "prompts": prompts,
        "batch_p": packed(uncertainty["p"]) if any(uncertainty.facts.get("informative", [])) else None,
        "p": packed(uncertainty.arrays.get("sequence_p")),
        "least": uncertainty.facts.get("least"),
    }


def _tokens(tokens: AnalysisResult | None) -> dict[str, Any] | None:
    """Texts and changes of every response's tokens, and token × token kernels."""
    if tokens is None or tokens.skipped is not None:
        return None
    response = tokens["response"]
    changes = {
        name: [[float(x) for x in values[mask]] for values, mask in zip(tokens[name], response, strict=True)]
        for name in ("logprob", "entropy")
    }
    pairs = [
        {"row": pair["row"], "column": pair["column"], "texts": pair["column_tokens"],
         "values": packed(tokens[pair["array"]])}
        for pair in tokens.facts["pairs"]
    ]  # fmt: skip
    return {"texts": tokens.facts["tokens"], **changes, "pairs": pairs}


def _provenance(results: FisherKernelResults) -> list[dict[str, Any]]:
    """How the results came about: versions, certificates, the plan."""
    environment = results.environment
    versions = environment.get("versions", {})
    machine = {name: environment.get(name) for name in ("python", "platform", "processors", "threads", "git", "seed")}
    certificates = {
        f"{each['name']} ({'passed' if each['passed'] else 'not tried' if each['passed'] is None else 'FAILED'})":
        each["detail"]
        for each in environment.get("certificates", [])
    }  # fmt: skip
    return [
        facts({name: value for name, value in machine.items() if value is not None}, "Machine"),
        facts(versions, "Versions"),
        facts(certificates, "Certificates: what was checked on this model"),
        {"kind": "json", "title": "The plan as it ran", "value": results.plan},
        {"kind": "json", "title": "The step, and the audit in full", "value": results.step},
    ]
