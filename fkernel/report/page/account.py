"""The account of a run as the page's data."""

from __future__ import annotations

from typing import Any

import numpy as np

from fkernel.report.blocks import Column, bars, facts, numbers, table
from fkernel.report.page.packing import info_rows, packed, packed_sequences
from fkernel.report.page.panels import panel
from fkernel.report.page.verdict import account_verdict
from fkernel.report.table import CHANCE
from fkernel.report.units import Unit, labelled, unit_of
from fkernel.study import AccountResults

NUMBERS = ("step", "reward", "advantage", "tokens")
TERMS = ("before", "decay", "arithmetic", "unexplained", "remainder")
STEPS = ("lr", "loss", "grad_norm", "clip")
MOST_BARS = 20


def account_page(results: AccountResults, title: str) -> dict[str, Any]:
    """The account of a run as the page's data: JSON, with arrays packed.

    Args:
        results: the account.
        title: of the page.
    """
    unit, about = unit_of(results), results.about
    steps = [row["step"] for row in results.steps]
    shown = {
        "recording": about["recording"],
        "steps": f"{steps[0]} to {steps[-1]}, {len(steps)} of them",
        "sequences": f"{len(results.sequences)}, {len({row['prompt_id'] for row in results.sequences})} prompts",
        "probes": len(results.probes),
        "quantity": {"logprob": "log π"}.get(about["observable"], about["observable"]),
        "gradients of the probes at": about["path"],
        "precision": about.get("dtype", ""),
    }
    return {
        "kind": "run",
        "title": title,
        "unit": unit._asdict(),
        "about": [[name, str(value)] for name, value in shown.items()],
        "verdict": account_verdict(results),
        "sequences": _sequences(results),
        "steps": {
            "step": steps,
            **{name: numbers([_number(row.get(name)) for row in results.steps]) for name in STEPS},
        },
        "groups": [_group(results, unit)],
        "panels": [],
        "provenance": _provenance(results),
    }


def _sequences(results: AccountResults) -> dict[str, Any]:
    """The run's sequences, and each one's reward by function."""
    given = packed_sequences(results.sequences, NUMBERS)
    names = dict.fromkeys(name for row in results.sequences for name in (row.get("rewards") or {}))
    rewards = {name: [_number((row.get("rewards") or {}).get(name)) for row in results.sequences] for name in names}
    return {**given, "rewards": {name: numbers(values) for name, values in rewards.items()}}


def _group(results: AccountResults, unit: Unit) -> dict[str, Any]:
    """The probes, their changes over the run, and who made them."""
    ledger = results.ledger
    terms = [{"name": name, "label": labelled(name), "values": packed(ledger[name])} for name in ("sequences", *TERMS)]
    predicted = sum(ledger[name].astype(float) for name in ("sequences", *TERMS[:-1]))
    stepwise = {name: packed(results[name]) for name in ("by_step", "own", "momentum")}
    split = {
        name: {"names": results.facts[names], "values": packed(results[name])}
        for name, names in (("rewards", "reward_functions"), ("parts", "parts"))
        if name in results.arrays
    }
    rows = range(len(results.probes)) if "older" in results.arrays else ()
    ages = [[share._asdict() for share in results.by_age(e)] for e in rows]
    return {
        "name": "probes",
        "kind": "run",
        "rows": packed_sequences(info_rows(results.probes), ("reward", "logprob")),
        "predicted": packed(np.asarray(predicted)),
        "measured": packed(results["realised"]),
        "terms": {"terms": terms, "total": packed(results["realised"]), "floor": packed(results["floor"])},
        "contributions": packed(results["contributions"]),
        "p": packed(results.arrays.get("p")),
        "stepwise": stepwise,
        "split": split,
        "ages": ages or None,
        "panels": _panels(results, unit),
    }


def _panels(results: AccountResults, unit: Unit) -> list[dict[str, Any]]:
    """A panel for everything that an account may have beside its columns."""
    return [
        _chance(results),
        _split(results, unit, "rewards", "reward_functions", "Which reward function moved the probes?"),
        _split(results, unit, "parts", "parts", "Which part of the loss moved the probes?"),
        _ages(results, unit),
    ]


def _chance(results: AccountResults) -> dict[str, Any]:
    question, title = "Could a sequence's contribution be chance?", "p-values"
    if "p" not in results.arrays:
        return panel("p", title, question, left_out=results.facts.get("p", "the account does not say why"))
    least, marked = results["p"].min(1), (results["p"] <= CHANCE).sum(1)
    columns = (Column("probe", "probe"), Column("smallest p", "p"), Column(f"sequences with p ≤ {CHANCE}", "number"))
    rows = [(info.id, least[e], int(marked[e])) for e, info in enumerate(results.probes)]
    note = "against permuted advantages; chance alone would mark any sequence of the run at all this seldom"
    return panel("p", title, question, blocks=[table("Told apart from chance", columns, rows, note)])


def _split(results: AccountResults, unit: Unit, name: str, names: str, question: str) -> dict[str, Any]:
    """Sums over the run by reward function, or by part of the loss."""
    titles = {"rewards": "by reward function", "parts": "by part of the loss"}
    missing = {
        "rewards": results.facts.get("rewards", "the account does not say why"),
        "parts": "the loss has one part, or the recording tells none apart",
    }
    if name not in results.arrays:
        return panel(name, titles[name], question, left_out=missing[name])
    sums, functions = unit.scale * results[name].sum(1, dtype=np.float64), results.facts[names]
    ids = [info.id for info in results.probes]
    order = np.argsort(-np.abs(results["realised"]), kind="stable")[:MOST_BARS][::-1]
    series = {function: sums[order, r] for r, function in enumerate(functions)}
    columns = [Column("probe", "probe"), *(Column(function, "signed") for function in functions)]
    rows = [(ids[e], *sums[e].tolist()) for e in range(len(ids))]
    blocks = [
        bars("Of the probes that moved most", [ids[e] for e in order], series, unit.name, opens="probe"),
        table(f"Contributions to the end of the run ({unit.name})", columns, rows),
    ]
    return panel(name, titles[name], question, blocks=blocks)


def _ages(results: AccountResults, unit: Unit) -> dict[str, Any]:
    question, title = "How old were the gradients that moved the probes?", "ages of gradients"
    if "older" not in results.arrays:
        ask = "fkernel account RECORDING --probes PROBES --out OUT --ages"
        how = "The recording must have kept every state: Recorder(…, snapshots='every')."
        return panel("ages", title, question, ask=ask, how=how)
    shares = [results.by_age(e) for e in range(len(results.probes))]
    columns = [Column("probe", "probe"), *(Column(share.id, "signed") for share in shares[0])]
    rows = [(info.id, *(unit.scale * share.value for share in shares[e])) for e, info in enumerate(results.probes)]
    note = "steps after a sequence's own; what the optimizer remembered from before the run counts as the oldest"
    return panel("ages", title, question, blocks=[table(f"By age ({unit.name})", columns, rows, note)])


def _provenance(results: AccountResults) -> list[dict[str, Any]]:
    environment = results.about.get("environment", {})
    machine = {name: value for name, value in environment.items() if isinstance(value, str | int | float)}
    request = {"kind": "json", "title": "What was asked for", "value": results.about.get("request", {})}
    return [facts(machine, "Machine"), facts(environment.get("versions", {}), "Versions"), request]


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
