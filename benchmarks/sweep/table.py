"""Rows of the sweep as tables: for a terminal, and for the committed page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.sweep.judge import BOUNDS, HELD, VERDICTS, Row

MEANING = {
    "right": "Values, gradients, Jᵀw, the kernel, Jv and vᵀHv agree with plain autograd and with differences.",
    "right, without forward mode": "All but what needs forward mode; that is refused, with the reason.",
    HELD: (
        "The model computes part of itself under `torch.no_grad` or detached. Values, gradients, Jᵀw and the kernel "
        "are what `backward()` gives an optimizer, and so is Jv, which is then not what a step does. `fkernel` "
        "notices, and takes Jv and vᵀHv of E's sequences through what is held constant (`func.through_detach`); those "
        "are given here, against differences of values."
    ),
    "refused": "An error of fkernel's own says why not.",
    "wrong": "A number is off. No such row may be here.",
    "raw": "An error that is not fkernel's own. No such row may be here.",
    "not built": "No tiny model of the type can be made and run here, so nothing is known of it.",
}


def grouped(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Sort rows by verdict, and by model type within; verdicts that no row has are left out."""
    for verdict in VERDICTS:
        group = sorted((row for row in rows if row["verdict"] == verdict), key=lambda row: row["kind"])
        if group:
            yield verdict, group


def counts(rows: Sequence[Row]) -> str:
    """Count verdicts: "110 right, 3 refused"."""
    count = Counter(row["verdict"] for row in rows)
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])


def terminal(rows: Sequence[Row]) -> Table:
    """One table of all rows, a section for each verdict."""
    table = Table(title=f"Causal language models: {counts(rows)}")
    for column in ("verdict", "model type", "dtype", *(name for name in BOUNDS), "seconds"):
        table.add_column(column, justify="left" if column in ("verdict", "model type") else "right")
    table.add_column("why", overflow="fold")
    colours = {"right": "green", "refused": "yellow", "wrong": "red", "raw": "red", "not built": "yellow"}
    for verdict, group in grouped(rows):
        table.add_section()
        for i, row in enumerate(group):
            first = f"[{colours.get(verdict, 'green')}]{verdict}[/]" if not i else ""
            why = escape("; ".join(filter(None, [row.get("reason", ""), *row.get("warnings", [])])))
            table.add_row(first, row["kind"], row.get("dtype", ""), *errors(row), f"{row['seconds']:.1f}", why)
    return table


def errors(row: Row) -> list[str]:
    """Write every quantity's error, or its verdict where it has none."""
    quantities = row.get("quantities", {})
    return [_figure(quantities[name]) if name in quantities else "" for name in BOUNDS]


def page(results: dict[str, Any]) -> str:
    """Write docs/architectures.md from the committed results."""
    rows, machine = results["rows"], results["environment"]
    lines = [
        "# Architectures",
        "",
        f"`make sweep` builds a tiny model of each of the {len(rows)} model types that transformers "
        f"{machine['transformers']} knows as causal language models, in float64 where the model can. It compares what "
        "`fkernel` computes with plain autograd, one unpadded sequence at a time, and Jv and vᵀHv with central "
        "differences, as far as those can be trusted: many models compute in float32 inside. Figures are largest "
        "relative errors. This page is written from `benchmarks/results/sweep.json`, of "
        f"{machine['date']}, torch {machine['torch']}.",
        "",
        f"{counts(rows)}.",
    ]
    for verdict, group in grouped(rows):
        lines += ["", f"## {verdict.capitalize()}", "", MEANING[verdict], ""]
        lines += _not_built(group) if verdict == "not built" else _figures(group)
    return "\n".join(lines) + "\n"


def _figures(rows: Sequence[Row]) -> list[str]:
    why = any(row["reason"] or row["warnings"] for row in rows)
    head = ["model type", "class", "dtype", *BOUNDS, *(["why"] if why else [])]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [f"`{row['kind']}`", f"`{row['class']}`", row["dtype"], *errors(row)]
        lines.append(_line([*cells, *([_text("; ".join([row["reason"], *row["warnings"]]))] if why else [])]))
    return lines


def _not_built(rows: Sequence[Row]) -> list[str]:
    return [
        _line(["model type", "why"]),
        _line(["---", "---"]),
        *(_line([f"`{row['kind']}`", _text(row["reason"])]) for row in rows),
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(reason: str) -> str:
    """A reason as inline code: whatever it holds, it is no markup."""
    plain = " ".join(reason.strip("; ").replace("`", "'").replace("|", "/").split())
    return f"`{plain}`" if plain else ""


def _figure(quantity: Row) -> str:
    return f"{quantity['error']:.0e}" if quantity["verdict"] == "right" else _failed(quantity)


def _failed(quantity: Row) -> str:
    return f"{quantity['error']:.0e} (wrong)" if quantity["verdict"] == "wrong" else quantity["verdict"]
