"""Tables and charts as plain data, for the page: what is shown, without saying by which library.

A block is a dict that JSON can hold; `kind` says which. Numbers are in the units that their titles name. What is not
finite is None, which JSON has and the page shows as –.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

Block = dict[str, Any]
CellKind = Literal["text", "signed", "number", "share", "p", "probe", "sequence"]
"""What a table's column holds: text; a number with its sign, or without; a share; a p-value; the id of a probe or of a
sequence, which opens it."""


class Panel(NamedTuple):
    """What the page shows of an analysis.

    Attributes:
        question: that it answers.
        ask: how a plan asks for it, or a command does.
        blocks: (result, unit) -> blocks of one request; of an analysis with several named results (result, name, unit);
            of one of U (results, unit).
    """

    question: str
    ask: str
    blocks: Callable[..., list[Block]]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: its heading.
        kind: what it holds.
        note: what the heading means, shown where the pointer rests on it.
    """

    title: str
    kind: CellKind = "text"
    note: str = ""


def paragraph(text: str) -> Block:
    """A paragraph."""
    return {"kind": "text", "text": text}


def facts(rows: Mapping[str, Any], title: str = "") -> Block:
    """Names and values, one a line."""
    return {"kind": "facts", "title": title, "rows": [[name, plain_value(value)] for name, value in rows.items()]}


def table(title: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]], note: str = "") -> Block:
    """A table that can be sorted and searched."""
    heads = [column._asdict() for column in columns]
    return {"kind": "table", "title": title, "columns": heads, "rows": [_row(row) for row in rows], "note": note}


def bars(title: str, labels: Sequence[str], series: Mapping[str, Any], axis: str, **options: Any) -> Block:
    """Horizontal bars, a group for each label.

    Args:
        title: of the chart.
        labels: [n], the lowest first.
        series: {name: [n]}.
        axis: its title.
        **options: `opens`, where labels are ids, as in `points`; `note`.
    """
    given = {"labels": [*labels], "series": _series(series), "axis": axis, **options}
    return {"kind": "bars", "title": title, **given}


def lines(
    title: str, x: Any, series: Mapping[str, Any], axes: tuple[str, str], *, logarithmic: bool = False, note: str = ""
) -> Block:
    """Lines over one x; both axes logarithmic or neither."""
    given = {"x": numbers(x), "series": _series(series), "axes": [*axes], "logarithmic": logarithmic}
    return {"kind": "lines", "title": title, "note": note, **given}


def points(title: str, x: Any, y: Any, ids: Sequence[str], axes: tuple[str, str], **options: Any) -> Block:
    """Points with ids.

    Args:
        title: of the chart.
        x: [n] across.
        y: [n] up.
        ids: of what each point is.
        axes: titles of both axes.
        **options: `diagonal`, whether to draw y = x; `opens`, "probe" or "sequence", what a click opens; `groups` [n]
            names that colours tell apart; `note`.
    """
    return {
        "kind": "points", "title": title, "x": numbers(x), "y": numbers(y), "ids": [*ids], "axes": [*axes], **options,
    }  # fmt: skip


def intervals(title: str, ids: Sequence[str], values: Any, low: Any, high: Any, axis: str, opens: str) -> Block:
    """Values with the ends of their intervals, a line each; `opens` as in `points`."""
    given = {"values": numbers(values), "low": numbers(low), "high": numbers(high)}
    return {"kind": "intervals", "title": title, "ids": [*ids], **given, "axis": axis, "opens": opens}


def heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Any, unit: str = "", limit: float | None = None
) -> Block:
    """A small matrix with a number in each cell; the colour scale is symmetric, and white is zero."""
    cells = [numbers(row) for row in np.asarray(values, dtype=float)]
    given = {"rows": [*rows], "columns": [*columns], "values": cells, "unit": unit, "limit": limit}
    return {"kind": "heat", "title": title, **given}


def printed(renderable: RenderableType) -> list[Block]:
    """What a terminal shows, as blocks: for an analysis that has no blocks of its own."""
    if isinstance(renderable, Table):
        columns = [Column(_text(column.header)) for column in renderable.columns]
        cells = zip(*([_text(cell) for cell in column.cells] for column in renderable.columns), strict=True)
        return [table(_text(renderable.title), columns, cells, _text(renderable.caption))]
    return [paragraph(_text(renderable))]


def numbers(values: Any) -> list[float | None]:
    """A list of numbers, None for those that are not finite."""
    return [plain_value(value) for value in np.asarray(values, dtype=float).ravel().tolist()]


def plain_value(value: Any) -> Any:
    """A value that JSON has: None for a number that is not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _series(series: Mapping[str, Any]) -> list[Block]:
    return [{"name": name, "values": numbers(values)} for name, values in series.items()]


def _row(row: Sequence[Any]) -> list[Any]:
    return [plain_value(value) for value in row]


def _text(renderable: Any) -> str:
    """A rich renderable's plain text."""
    if renderable is None:
        return ""
    if isinstance(renderable, Text):
        return renderable.plain
    if isinstance(renderable, str):
        return Text.from_markup(renderable).plain
    console = Console(width=160, record=True, quiet=True)
    console.print(renderable)
    return console.export_text().strip()
