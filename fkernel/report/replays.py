"""Tables of recordings and replays, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from fkernel.study import ReplayResults

SHOWN = 60
"""Steps of a recording that a table shows, first and last ones."""


def recording_table(summary: Mapping[str, Any]) -> Table:
    """Tabulate the steps of a recording.

    Args:
        summary: `Recording.summary()`.
    """
    steps = summary["steps"]
    table = Table(title=f"{summary['model']}: {len(steps)} steps, {summary['parameters']:,} trained parameters")
    for name in ("step", "sequences", "tokens", "passes", "loss", "lr", "‖∇L‖", "clip", "gradient check"):
        table.add_column(name, justify="right")
    half = SHOWN // 2
    for i, row in enumerate(steps):
        if len(steps) > SHOWN and half <= i < len(steps) - half:
            if i == half:
                table.add_row(f"… {len(steps) - SHOWN} more")
            continue
        rates = [rate for rates in row["lr"] for rate in rates]
        without = f" ({row['without_response']} empty)" if row["without_response"] else ""
        table.add_row(
            str(row["step"]),
            f"{row['sequences']}{without}",
            str(row["tokens"]),
            str(row["microbatches"]),
            _number(row["loss"], ".4g"),
            _number(max(rates, default=None), ".3g"),
            f"{row['grad_norm']:.4g}",
            f"{row['clip']:.4g}",
            _number(row["check"], ".1e"),
        )
    return table


def recording_lines(summary: Mapping[str, Any]) -> list[str]:
    """Lines about snapshots, size, and what is missing.

    Args:
        summary: `Recording.summary()`.
    """
    snapshots, missing = summary["snapshots"], summary["missing"]
    lines = [f"{summary['bytes'] / 2**20:.1f} MiB; snapshots before steps {_numbers(snapshots)}"]
    if missing:
        lines.append(f"MISSING: steps {_numbers(missing)}; an account or a replay goes over steps without a gap")
    if not snapshots:
        lines.append("MISSING: a snapshot; without one nothing is replayed or accounted for")
    unchecked = [row["step"] for row in summary["steps"] if row["check"] is None]
    if unchecked and len(unchecked) == len(summary["steps"]):
        lines.append("No step's gradient was checked against the record")
    return lines


def replay_table(results: ReplayResults) -> Table:
    """Tabulate S of the probes before the run, after it, and after the replay.

    Args:
        results: of `replay_probes`.
    """
    count, of = results.changed
    title = f"Replay with {count} of {of} sequences changed" if count else "Replay of the run as it was"
    table = Table(title=f"{title}: log π of the probes (nats)")
    for name in (
        "probe",
        "before",
        "after the run",
        "after the replay",
        "run moved it",
        "replay moved it",
        "difference",
    ):
        table.add_column(name, justify="left" if name == "probe" else "right")
    for e, record in enumerate(results.probes):
        before, run, replayed = (float(values[e]) for values in (results.before, results.run, results.replayed))
        text = f"{record.sequence_id}\n{record.prompt}{record.response}"
        table.add_row(
            escape(text),
            *(f"{value:.4f}" for value in (before, run, replayed)),
            *(f"{value:+.4f}" for value in (run - before, replayed - before, replayed - run)),
        )
    return table


def replay_lines(results: ReplayResults) -> list[str]:
    """Lines about how far a replay is from the run.

    Args:
        results: of `replay_probes`.
    """
    if results.changed[0]:
        return ["At fixed data: the same sequences with other weights, not what a changed policy would have sampled"]
    if results.distance is None:
        return ["The run has no snapshot where the replay ends, so that they cannot be compared"]
    nats = float(results.difference.abs().max())
    return [
        f"The replay ends {results.distance:.1e} of the run's own way from it; probes differ by up to {nats:.1e} nats"
    ]


def replay_record(results: ReplayResults) -> dict[str, Any]:
    """The same as JSON.

    Args:
        results: of `replay_probes`.
    """
    numbers = {name: getattr(results, name).tolist() for name in ("before", "run", "replayed", "difference")}
    rows = [
        {"id": name, **{key: values[e] for key, values in numbers.items()}} for e, name in enumerate(results.probes.ids)
    ]
    return {
        "changed": results.changed[0],
        "sequences": results.changed[1],
        "distance": results.distance,
        "probes": rows,
    }


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return "none" if not numbers else shown if len(numbers) <= 8 else f"{shown}, … {numbers[-1]} ({len(numbers)})"
