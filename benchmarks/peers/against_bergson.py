"""bergson against this library: one checkpoint, one thread each, turn by turn, K over the modules that bergson covers.

What had to be matched for K to agree: bergson divides by √v + 1e-8 whatever the optimizer's ε is, and does not correct
v's bias, so the library is given that diagonal (`our_side.Ours.kernel`); its gradients are of −S summed over a
response, both signs of which cancel; it covers linear layers' weights (no table, norm or head), so the library is given
those by name. Its own defaults stay: token budget a batch, attention, fp32.

Two ratios are kept. CPU time is the program's own (user) and the system's. bergson holds E's gradients dense, three
times over, and most of its system time is spent on pages of memory touched for the first time, which costs several
times more on a virtual machine than elsewhere; the ratio of user times shows what is left without that.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers.case import STEPS, Sizes, write
from benchmarks.peers.comparison import Comparison, relative_difference, rounded
from benchmarks.peers.left_out import LeftOut, left_out
from benchmarks.peers.turns import ROOT, Answer, Side
from benchmarks.ratios import compare

NAME = "bergson"
TARGET = 0.8
"""Ours over theirs, in CPU time."""
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
MISSING = "bergson is not measured: its environment .venv-peers is missing. `make peers` sets it up."


def available(python: Path = PYTHON) -> bool:
    """Tell whether bergson's environment has been set up."""
    return python.exists()


def against(sizes: Sizes, rounds: int, target: float | None = TARGET) -> Comparison:
    """Compare both at one size.

    Args:
        sizes: of the model and the batches.
        rounds: how many times each side is timed, after one round that is not.
        target: the largest ratio ours/theirs that is asked for.

    Raises:
        PeerError: a side's process failed.
    """
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        write(sizes, folder)
        with Side(NAME, [str(PYTHON), "-m", "benchmarks.peers.bergson_side", given]) as theirs:
            covered = theirs.ask()["covered"]
            with Side("fkernel", [sys.executable, "-m", "benchmarks.peers.our_side", given, *covered]) as ours:
                ours.ask()
                turns = [(theirs.ask(), ours.ask()) for _ in range(rounds)]
        return compared(sizes, turns, left_out(folder, covered), target)


def compared(sizes: Sizes, turns: list[tuple[Answer, Answer]], outside: LeftOut, target: float | None) -> Comparison:
    """Turn the answers of every round, (theirs, ours), into a comparison."""
    theirs, ours = ([turn[side] for turn in turns] for side in (0, 1))
    seconds = compare({"theirs": each(theirs, "cpu"), "ours": each(ours, "cpu"), "limit": each(ours, "limit")})
    user = compare({"theirs": each(theirs, "user"), "ours": each(ours, "user"), "limit": each(ours, "limit")})
    notes: dict[str, Any] = {
        "clock": "CPU, user and system",
        "user_ratio": rounded(user["ours"].ratio),
        "their_user_seconds": rounded(user["theirs"].seconds),
        "our_user_seconds": rounded(user["ours"].seconds),
        "their_build_seconds": rounded(median(each(theirs, "build"))),
        "their_score_seconds": rounded(median(each(theirs, "score"))),
        "limit_seconds": rounded(seconds["limit"].seconds),
        "limit_ratio": rounded(seconds["limit"].ratio),
        "limit_user_ratio": rounded(user["limit"].ratio),
        "left_out": {name: rounded(share) for name, share in outside._asdict().items()},
        "version": theirs[-1]["version"],
        "token_batch_size": theirs[-1]["token_batch_size"],
        "optimizer_steps": STEPS,
    }
    described = {"width": sizes.width, "T": sizes.T, "n_E": sizes.n_E, "n_U": sizes.n_U, "layers": sizes.layers}
    described |= {"vocab_size": sizes.vocab_size, "threads": 1}
    difference = relative_difference(torch.tensor(ours[-1]["K"]), torch.tensor(theirs[-1]["K"]))
    return Comparison(NAME, described, seconds["theirs"], seconds["ours"], len(turns), target, difference, notes)


def each(answers: list[Answer], name: str) -> list[float]:
    """One of a side's times, of every round."""
    return [answer[name] for answer in answers]
