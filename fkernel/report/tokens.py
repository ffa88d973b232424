"""Responses with tokens coloured by their change: for a terminal, and as HTML.

Red raises, blue lowers; the scale is symmetric up to the largest |Δ log π| of a token in the request, so that rows are
comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from rich.table import Table
from rich.text import Text

from fkernel.errors import ResultsError
from fkernel.study import AnalysisResult, RequestResult

RAISED, LOWERED = (178, 24, 43), (33, 102, 172)
STEPS = 1e3
"""Scale of numbers, 10⁻³ nats."""


def token_table(result: RequestResult, rows: int = 5) -> Table:
    """Show the responses of the sequences that moved most, token by token.

    Args:
        result: of one request whose plan asked for tokens.
        rows: sequences to show, largest changes first.

    Raises:
        ResultsError: tokens were not asked for.
    """
    analysis = result.analysis("tokens")
    table = Table(title=f"{result.name}: tokens (red raises, blue lowers; 10⁻³ nats below)")
    for name in ("sequence", "response", "Σ", "Δ entropy"):
        table.add_column(name, justify="left" if name in ("sequence", "response") else "right")
    logprob, entropy = analysis["logprob"], analysis["entropy"]
    for row in np.argsort(-np.abs(logprob.sum(1)), kind="stable")[:rows]:
        texts, changes = _row(analysis, int(row))
        shown = Text.assemble(token_text(texts, changes, _largest(analysis)), "\n", _numbers(changes))
        sums = (f"{STEPS * logprob[row].sum():+.2f}", f"{STEPS * entropy[row].sum():+.2f}")
        table.add_row(result.evaluation[row].id, shown, *sums, end_section=True)
    return table


def token_text(texts: Sequence[str], changes: Sequence[float], largest: float) -> Text:
    """Colour tokens for a terminal.

    Args:
        texts: of the tokens, k of them.
        changes: Δ log π of each, nats.
        largest: |Δ log π| of the strongest colour.
    """
    coloured = Text()
    for text, change in zip(texts, changes, strict=True):
        style = f"{_ink(change / largest)} on {_colour(change / largest)}"
        coloured.append(f"{_plain(text)}", style)
        coloured.append(" ")
    return coloured


def token_html(result: RequestResult, rows: list[str] | None = None) -> str:
    """An HTML fragment: prompts, and responses with coloured tokens; tooltips have the numbers.

    Args:
        result: of one request whose plan asked for tokens.
        rows: ids of its sequences; None for all.

    Raises:
        ResultsError: tokens were not asked for, or there is no such sequence.
    """
    analysis = result.analysis("tokens")
    places = range(len(result.evaluation)) if rows is None else [result.row(name) for name in rows]
    lines = [_line(result, analysis, row) for row in places]
    return (
        '<div class="fkernel-tokens" style="font-family: monospace; line-height: 1.8">\n'
        + "\n".join(lines)
        + "\n</div>\n"
    )


def _line(result: RequestResult, analysis: AnalysisResult, row: int) -> str:
    texts, changes = _row(analysis, row)
    info, largest = result.evaluation[row], _largest(analysis)
    entropy = analysis["entropy"][row][analysis["response"][row]].tolist()
    spans = [
        f'<span style="background: {_colour(x / largest)}; color: {_ink(x / largest)}; white-space: pre-wrap" '
        f'title="Δ log π {STEPS * x:+.3f}, Δ entropy {STEPS * h:+.3f} (10⁻³ nats)">{escape(_plain(text))}</span>'
        for text, x, h in zip(texts, changes, entropy, strict=True)
    ]
    total = f"{STEPS * sum(changes):+.2f} · 10⁻³ nats"
    return f"<div><b>{escape(info.id)}</b> {escape(_plain(info.prompt))}{''.join(spans)} <small>{total}</small></div>"


def _row(analysis: AnalysisResult, row: int) -> tuple[list[str], list[float]]:
    """A response's tokens as texts, and the change of each, nats."""
    if analysis.skipped is not None:
        raise ResultsError(f"Tokens were left out: {analysis.skipped}.")
    return analysis.facts["tokens"][row], analysis["logprob"][row][analysis["response"][row]].tolist()


def _largest(analysis: AnalysisResult) -> float:
    return float(np.abs(analysis["logprob"]).max()) or 1.0


def _numbers(changes: Sequence[float]) -> Text:
    return Text("  ".join(f"{STEPS * x:+.1f}" for x in changes), "dim")


def _colour(x: float) -> str:
    """Hex colour: white at 0, red at 1, blue at −1."""
    end, share = (RAISED if x > 0 else LOWERED), min(1.0, abs(x))
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in end)


def _ink(x: float) -> str:
    return "#ffffff" if abs(x) > 0.6 else "#000000"


def _plain(text: str) -> str:
    """Replace characters that are not printable."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text) or "∅"
