"""`python -m benchmarks.sweep`: judge every causal language model in transformers, save JSON and the page.

    --only KIND ...     these model types
    --part I/N          every N-th type, beginning with the I-th (1/10 to 10/10 are all)
    --json FILE         write the rows there; nothing is committed

A part of the sweep is printed, a whole one also goes to benchmarks/results/sweep.json and docs/architectures.md. The
exit status is 1 if any row is wrong or raw.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

from rich.console import Console

from benchmarks.environment import ROOT, environment
from benchmarks.sweep.judge import FAILURES, Row
from benchmarks.sweep.settings import KINDS
from benchmarks.sweep.table import counts, page, terminal
from benchmarks.sweep.workers import sweep

RESULTS = ROOT / "benchmarks" / "results" / "sweep.json"
PAGE = ROOT / "docs" / "architectures.md"


def part_of(kinds: Sequence[str], part: str) -> list[str]:
    """Take every n-th model type, beginning with the i-th, of "i/n"."""
    try:
        i, n = (int(number) for number in part.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise ValueError(f"--part is {part!r}; expected I/N with 1 ≤ I ≤ N, such as 3/10.")
    return list(kinds)[i - 1 :: n]


def chosen(only: Sequence[str] | None, part: str | None) -> list[str]:
    """Take the model types that are asked for."""
    unknown = sorted(set(only or []) - set(KINDS))
    if unknown:
        raise ValueError(f"--only names {', '.join(unknown)}; the model types are {', '.join(KINDS)}.")
    kinds = [kind for kind in KINDS if not only or kind in only]
    return part_of(kinds, part) if part else kinds


def save(rows: Sequence[Row], machine: dict[str, object]) -> None:
    """Write the results and the page that is made of them."""
    results = {"environment": machine, "rows": sorted(rows, key=lambda row: row["kind"])}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def main() -> None:
    """Judge, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="KIND", help="these model types; nothing is saved")
    parser.add_argument("--part", metavar="I/N", help="every N-th model type from the I-th on; nothing is saved")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there; nothing else is saved")
    given = parser.parse_args()
    try:
        kinds = chosen(given.only, given.part)
    except ValueError as error:
        parser.error(str(error))
    machine, rows = environment(), []
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for row in sweep(kinds):
        rows.append(row)
        print(f"{len(rows)}/{len(kinds)} {row['kind']}: {row['verdict']} ({row['seconds']} s)", file=sys.stderr)
    console.print(terminal(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif not given.only and not given.part:
        save(rows, machine)
        console.print(f"{RESULTS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")
    console.print(counts(rows))
    sys.exit(any(row["verdict"] in FAILURES for row in rows))


if __name__ == "__main__":
    main()
