"""bergson's side for a recorded run: K of probes and a run's sequences at one snapshot, scaled by its optimizer state.

Run as `python -m benchmarks.runs_bergson_side FOLDER` in `.venv-peers`; imports nothing of this library. FOLDER holds
the model, `optimizer.pt` and `ragged.pt`: (tokens, tokens of the prompt) of every sequence of both sides. K goes to
K.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]

from benchmarks.peers.bergson_side import Bergson


def ragged(rows: list[tuple[list[int], int]]) -> Any:
    """Hand over sequences of several lengths; −100 keeps prompts out of the loss."""
    labels = [[-100] * prompt + ids[prompt:] for ids, prompt in rows]
    ids = [ids for ids, _ in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(own) for own in ids]})


def main(folder: Path) -> None:
    """Build E, score U, write K."""
    torch.set_num_threads(1)
    given = torch.load(folder / "ragged.pt")
    theirs = Bergson(folder)
    theirs.E, theirs.U = ragged(given["E"]), ragged(given["U"])
    torch.save(theirs.score(theirs.build()), folder / "K.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
