"""Results as text of one screen, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

ROWS = 10
"""Rows of a table; more are counted."""
STYLE = "text-align:right;padding:1px 8px;font-variant-numeric:tabular-nums"


def plural(n: int, what: str) -> str:
    """A number of things, in the singular for one.

    Example:
        >>> plural(1, "sequence"), plural(2000, "sequence")
        ('1 sequence', '2,000 sequences')
    """
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def text_of(title: str, lines: Sequence[str]) -> str:
    """A title and lines below it, of which those beyond one screen are counted.

    Example:
        >>> print(text_of("results", ["a", "b"]))
        results
          a
          b
    """
    shown = [f"  {line}"[:118] for line in lines[:ROWS]]
    more = [f"  … and {len(lines) - ROWS} more"] if len(lines) > ROWS else []
    return "\n".join([title, *shown, *more])


def html_of(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as HTML; numbers are 10⁻³ nats where a head says so, texts are escaped.

    Example:
        >>> html_of("probes", ["id", "ΔS"], [["<a>", -0.5]]).count("&lt;a&gt;")
        1
    """
    top = "".join(f'<th style="{STYLE}">{escape(head)}</th>' for head in heads)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows[:ROWS])
    more = f"<p>… and {len(rows) - ROWS} more</p>" if len(rows) > ROWS else ""
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{more}"


def results_text(results: Any) -> str:
    """A study's results: its requests."""
    lines = [
        f"{name} ({each.kind}): {plural(len(each.evaluation), 'sequence')}" for name, each in results.requests.items()
    ]
    title = f"FisherKernelResults: U of {plural(len(results.update), 'sequence')}, {plural(len(lines), 'request')}"
    return text_of(title, lines)


def request_text(result: Any) -> str:
    """A request's result: the sequences that moved most."""
    moved = result.predicted if result.realised is None else result.realised
    title = f"RequestResult {result.name!r} ({result.kind}): {plural(len(result.evaluation), 'sequence')}"
    lines = [f"{result.evaluation[row].id}: {1e3 * moved[row]:+.3f}" for row in largest_first(moved)]
    return text_of(f"{title}, by {len(result.update)} of U; changes, 10⁻³ nats", lines)


def request_html(result: Any, effects: Sequence[str]) -> str:
    """The same as a table, with the effects that are known and the largest contributor of each.

    Args:
        result: of one request.
        effects: their names beside "batch".
    """
    moved = result.predicted if result.realised is None else result.realised
    known = {name: values for name in ("batch", *effects) if (values := getattr(result, name)) is not None}
    rows = []
    for row in largest_first(moved)[: ROWS + 1]:
        info, top = result.evaluation[row], result.top_contributors(row, 1, group_identical=True)
        effects_of = [1e3 * float(values[row]) for values in known.values()]
        most = [named(top[0][0]), 1e3 * top[0][1]] if top else ["", ""]
        rows.append([info.id, info.prompt[-40:], info.response[-40:], *effects_of, *most])
    return html_of(
        f"{result.name}: changes, 10⁻³ nats", ["id", "prompt", "response", *known, "most by", "its effect"], rows
    )


def named(info: Any) -> str:
    """A sequence's id, and how many of the same tokens it stands for."""
    return info.id if info.times == 1 else f"{info.id} × {info.times}"


def largest_first(values: np.ndarray) -> list[int]:
    """Indices by size, largest first."""
    return np.argsort(-np.abs(values), kind="stable").tolist()


def _cell(value: Any) -> str:
    text = f"{value:+.3f}" if isinstance(value, float) else str(value)
    return f'<td style="{STYLE if isinstance(value, float) else "text-align:left;padding:1px 8px"}">{escape(text)}</td>'
