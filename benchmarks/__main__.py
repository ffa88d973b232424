"""`python -m benchmarks [--quick]`: measure speed and memory, print the ratios to the limits, save one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.environment import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PER_SEQUENCE = 0.05
"""MB of influence's peak memory for each further sequence of U: less than this counts as independent of n_U."""

Row = dict[str, Any]


def main() -> None:
    """Measure, save, print. A missed target is reported, not an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed and memory.")
    parser.add_argument("--quick", action="store_true", help="tiny models, few rounds; saves to a temporary file")
    quick = parser.parse_args().quick
    os.environ["HF_HUB_OFFLINE"] = "1"
    console = Console() if sys.stdout.isatty() else Console(width=120)
    found = {"environment": environment(), "ratios": speed(console, quick), "memory": peaks(console, quick)}
    target = Path(tempfile.mkdtemp()) / "cpu.json" if quick else RESULTS
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    show(console, found)
    if quick:
        console.print("[yellow]--quick: tiny models, one thread. Everything runs; the figures mean nothing.[/]")
    console.print(f"\n{target if quick else target.relative_to(ROOT)}", soft_wrap=True)


def speed(console: Console, quick: bool) -> list[Row]:
    """Run the folder under pytest-benchmark, in a process of its own, and read the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "addopts=", "-q", "--import-mode=importlib"]
        command += ["-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
        command += ["--benchmark-only", "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={saved}"]
        with console.status("Timing, every side of a comparison in turns …"):
            done = subprocess.run([*command, *(["--quick"] if quick else [])], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"The benchmarks failed:\n{done.stdout}\n{done.stderr}")
        return [as_row(benchmark) for benchmark in json.loads(saved.read_text())["benchmarks"]]


def as_row(benchmark: Row) -> Row:
    """Keep what a reader of the committed file needs of pytest-benchmark's record."""
    extra = dict(benchmark["extra_info"])
    target = extra["target"]
    return {
        "group": benchmark["group"],
        "side": extra["side"],
        "seconds": rounded(extra["seconds"]),
        "limit": extra["limit"],
        "ratio": rounded(extra["ratio"]),
        "ratio_range": [rounded(extra["least"]), rounded(extra["most"])],
        "rounds": extra["rounds"],
        "target": target,
        "met": None if target is None else extra["ratio"] <= target,
        "alone_seconds": rounded(benchmark["stats"]["median"]),
        "sizes": extra["sizes"],
    }


def peaks(console: Console, quick: bool) -> list[Row]:
    """Measure peak memory, each callable in its own process."""
    large = {"shape": "tiny" if quick else "base", "n": 8, "T": 64 if quick else 256}
    small = {"shape": "tiny" if quick else "small", "n_E": 8, "T": 32}
    with console.status("Measuring peak memory, a process each …"):
        limit = memory.in_own_process("plain batched backward", large)
        rows = memory.in_own_process("per_sequence_grad", large)
        growing = [
            memory.in_own_process("influence", {**small, "n_U": n}) for n in ((16, 64) if quick else (64, 256, 1024))
        ]
    slope = memory.slope(growing)
    return [
        *(measured(peak, limit) for peak in (limit, rows)),
        *(measured(peak, growing[0]) for peak in growing),
        {
            "what": "influence, MB per further sequence of U",
            "value": rounded(slope),
            "target": PER_SEQUENCE,
            "met": slope < PER_SEQUENCE,
        },
    ]


def measured(peak: memory.Peak, first: memory.Peak) -> Row:
    """One process's peak beside the first of its kind."""
    return {
        "what": peak.name,
        "sizes": peak.sizes,
        "before_mb": rounded(peak.before),
        "peak_mb": rounded(peak.peak),
        "grown_mb": rounded(peak.grown),
        "ratio": rounded(peak.grown / first.grown),
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """Print both tables and the machine they were taken on."""
    console.print(speed_table(found["ratios"]))
    console.print(memory_table(found["memory"]))
    machine = found["environment"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; load before the start {machine['load_before']}"
    )


def speed_table(ratios: list[Row]) -> Table:
    """What, seconds, ratio to the limit, target, met or missed."""
    table = Table(title="Speed: median seconds, and the median ratio to the limit (the first of each group)")
    for column in ("what", "side"):
        table.add_column(column)
    for column in ("seconds", "ratio", "target", ""):
        table.add_column(column, justify="right")
    for i, row in enumerate(ratios):
        begins = i == 0 or ratios[i - 1]["group"] != row["group"]
        if begins and i:
            table.add_section()
        goal = "" if row["target"] is None else f"≤ {row['target']}"
        what = row["group"] if begins else ""
        table.add_row(what, row["side"], f"{row['seconds']:.4g}", f"{row['ratio']:.2f}", goal, verdict(row["met"]))
    return table


def memory_table(rows: list[Row]) -> Table:
    """What, what the call added to the process, and the slope."""
    table = Table(title="Peak memory: MB that one call adds to its process")
    table.add_column("what")
    table.add_column("sizes")
    for column in ("MB", "ratio", "target", ""):
        table.add_column(column, justify="right")
    for row in rows:
        if "value" in row:
            table.add_row(row["what"], "", f"{row['value']:.3f}", "", f"< {row['target']}", verdict(row["met"]))
        else:
            sizes = ", ".join(f"{key}={value}" for key, value in row["sizes"].items())
            table.add_row(row["what"], sizes, f"{row['grown_mb']:.0f}", f"{row['ratio']:.2f}", "", "")
    return table


def verdict(met: bool | None) -> str:
    """Say it in a word."""
    return {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[met]


def rounded(value: float) -> float:
    """Keep four digits: more would be noise."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
