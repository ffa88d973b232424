"""`python -m benchmarks.peers [--quick]`: measure the library beside its peers, print a table, save one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.environment import ROOT, environment
from benchmarks.peers import against_bergson, research
from benchmarks.peers.case import Sizes
from benchmarks.peers.comparison import Comparison

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
WIDTHS, LENGTHS = (128, 256, 512), (64, 256)


def main() -> None:
    """Measure, print, save. A missed target is reported, not an error; kernels that disagree are an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Measure the library's peers.")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round; nothing is saved")
    quick = parser.parse_args().quick
    os.environ["HF_HUB_OFFLINE"] = "1"
    disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    about, skipped = environment(), None if against_bergson.available() else against_bergson.MISSING
    with console.status("Both sides of every comparison in turns …"):
        found = [*against_research(quick), *([] if skipped else against_the_other(quick))]
    console.print(speed_table(found))
    if any("left_out" in one.notes for one in found):
        console.print(share_table(found))
    for line in remarks(found):
        console.print(line, highlight=False)
    if skipped:
        console.print(f"[yellow]{skipped}[/]")
    if quick or skipped:
        console.print(f"[yellow]Nothing was saved: {'--quick is tiny' if quick else 'a peer is missing'}.[/]")
    else:
        save({"environment": about, "comparisons": [one.as_record() for one in found]})
        console.print(f"\n{RESULTS.relative_to(ROOT)}", soft_wrap=True)
    if not all(one.agrees for one in found):
        sys.exit("The two sides of a comparison computed different kernels; their times mean nothing.")


def against_research(quick: bool) -> list[Comparison]:
    """The research code's method: the demo policy's shape, and a larger one."""
    if quick:
        return [research.compare("tiny", n_E=3, n_U=4, T=8, rounds=1)]
    return [
        research.compare("small", n_E=64, n_U=128, T=32, rounds=3, target=research.TARGET),
        research.compare("base", n_E=8, n_U=16, T=32, rounds=3),
    ]


def against_the_other(quick: bool) -> list[Comparison]:
    """bergson, at every width and length."""
    if quick:
        return [against_bergson.against(Sizes(32, 16, n_U=4, n_E=2, layers=2, vocab_size=64), 1, target=None)]
    return [against_bergson.against(Sizes(width, T), rounds=5) for width in WIDTHS for T in LENGTHS]


def save(found: dict[str, Any]) -> None:
    """Write the committed file."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def speed_table(found: list[Comparison]) -> Table:
    """Seconds of both sides, their ratio, the target, what else bounds it, and how far the kernels are apart."""
    drawn = Table(title="Ours over theirs: median seconds, median ratio within a round")
    for column in ("peer", "sizes"):
        drawn.add_column(column)
    for column in ("theirs", "ours", "ratio", "target", "", "ratio, user time", "limit", "difference of K"):
        drawn.add_column(column, justify="right")
    for one in found:
        drawn.add_row(*speed(one))
    return drawn


def speed(one: Comparison) -> list[str]:
    """One row of the table of times."""
    apart = f"{one.difference:.1e}"
    return [
        one.peer,
        described(one),
        f"{one.theirs.seconds:.3g}",
        f"{one.ours.seconds:.3g}",
        f"{one.ours.ratio:.3f}",
        "" if one.target is None else f"≤ {one.target}",
        {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[one.met],
        *(f"{one.notes[name]:.3f}" if name in one.notes else "" for name in ("user_ratio", "limit_ratio")),
        apart if one.agrees else f"[red]{apart}[/]",
    ]


def share_table(found: list[Comparison]) -> Table:
    """What a peer that covers some modules leaves out."""
    drawn = Table(title="Left out by the peer")
    for column in ("peer", "sizes"):
        drawn.add_column(column)
    for column in ("of the parameters", "of ‖g‖²", "of K, ‖K − K_covered‖ / ‖K‖"):
        drawn.add_column(column, justify="right")
    for one in found:
        if shares := one.notes.get("left_out"):
            drawn.add_row(one.peer, described(one), *(f"{share:.1%}" for share in shares.values()))
    return drawn


def described(one: Comparison) -> str:
    """The sizes that tell one row from another."""
    hidden = ("threads", "layers", "vocab_size", "P")
    return ", ".join(f"{name}={value}" for name, value in one.sizes.items() if name not in hidden)


def remarks(found: list[Comparison]) -> list[str]:
    """What a reader of the table has to know."""
    lines = {
        research.NAME: f"{research.NAME}: wall time, one process, all threads, all parameters.",
        against_bergson.NAME: (
            f"{against_bergson.NAME}: CPU time, one thread and one process each, on the weights that it covers; both "
            f"divide by √v + 1e-8 without bias correction, as it does. The limit is a plain batched backward pass over "
            f"E and U and the ideal GEMM, over its time."
        ),
    }
    present = {one.peer for one in found}
    return [line for peer, line in lines.items() if peer in present]


if __name__ == "__main__":
    main()
