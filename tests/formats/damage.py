"""Damaged checkpoints: one file of a run is changed; it must be refused, or load to the same numbers as before.

    flip     one bit of a file
    zero     a stretch of bytes set to 0
    cut      a file ends early
    gone     a file is missing
    swap     two files of one kind under each other's names
    other    a file of another run under this one's name
    edit     a tensor or number in a file of torch.save, which is saved again: its sums are right
        key      a key is missing
        shape    a tensor is one row shorter
        dtype    a tensor is in float64
        nan      a number is NaN
        kind     a tensor is a string

`python -m benchmarks.checkpoints --only damage` tries 2,000 and saves what came of them.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fkernel as fk
from fkernel.checkpoint import Checkpoint
from tests.formats.archives import unpack
from tests.formats.places import load, readable
from tests.formats.saving import save_again

UNSUMMED = {".json", ".jinja", ".txt", ".model", ".yaml"}
"""Text: nothing tells a changed digit, or another run's. It is cut and deleted, and else left alone."""
BYTES = ("flip", "zero", "cut")
FILES = ("gone", "swap", "other")
EDITS = ("key", "shape", "dtype", "nan", "kind")


STATELESS = "no state"
RIGHT = ("refused", "same", "said")


class Trial(NamedTuple):
    """One change and what came of it.

    Attributes:
        run: which run.
        change: which of the changes above.
        file: the file, relative to the checkpoint.
        outcome: "refused", "same", "said" (that there is no state), "OTHER NUMBERS" or "RAW <class>".
        text: the message, or which numbers are others.
    """

    run: str
    change: str
    file: str
    outcome: str
    text: str


def damage(count: int, seed: int = 0, runs: list[str] | None = None) -> dict[str, Any]:
    """Try so many changes over all packed runs.

    Args:
        count: how many files are changed, one at a time.
        seed: of the changes.
        runs: which runs; all that load here by default.

    Returns:
        {"files": count, "outcomes": {change: {outcome: how many}}, "wrong": trials that were neither refused nor the
        same}.
    """
    with tempfile.TemporaryDirectory() as place:
        chosen = readable() if runs is None else runs
        copies = {run: unpack(run, Path(place) / run) / "checkpoint" for run in chosen}
        trials: list[Trial] = []
        for number, run in enumerate(chosen):
            true = numbers(run, copies[run])
            others = [copy for name, copy in copies.items() if name != run]
            seeds = range(seed + number, seed + count, len(chosen))
            trials += [tried(run, copies[run], true, each, others) for each in seeds]
    wrong = [trial._asdict() for trial in trials if trial.outcome not in RIGHT]
    return {"files": len(trials), "runs": len(chosen), "outcomes": summary(trials), "wrong": wrong}


def tried(run: str, checkpoint: Path, true: dict[str, Any], seed: int, others: list[Path]) -> Trial:
    """Change one file of a checkpoint, load it, and put the file back.

    Args:
        run: its name.
        checkpoint: its directory, in a place of its own.
        true: the numbers that it holds unchanged.
        seed: of the change.
        others: other runs' directories.
    """
    draw = random.Random(seed)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    kept = {path: path.read_bytes() for path in files}
    while True:
        file = draw.choice(files)
        change = draw.choice((*BYTES, *FILES, *(EDITS if is_torch(file) else ())))
        if change in ("flip", "zero", "swap", "other") and file.suffix in UNSUMMED:
            continue
        try:
            if damaged(file, change, draw, files, others):
                return Trial(run, change, str(file.relative_to(checkpoint)), *_outcome(run, checkpoint, true))
        finally:
            for path, data in kept.items():
                if not path.exists() or path.read_bytes() != data:
                    path.write_bytes(data)


def numbers(run: str, checkpoint: Path) -> dict[str, Any]:
    """Load a run and give what a computation takes from it; that it has no state is a number, too, where it is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load(run, checkpoint)
    said = any(condition.kind == "no optimizer" for condition in loaded.conditions)
    return {**dict(numbers_of(loaded)), **({STATELESS: True} if said else {})}


def numbers_of(loaded: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Give everything that a computation takes from a checkpoint."""
    for name, leaf in loaded.model.named_parameters():
        yield f"θ of {name}", leaf.detach()
        yield f"whether {name} is trained", leaf.requires_grad
    state: Any = loaded.stored
    if state is None:
        return
    for name in state.names:
        yield f"kind of {name}", state.kinds[name]
        for key, value in {**state.entries[name], **state.groups[name]}.items():
            if key == "initial_lr":  # a scheduler's note
                continue
            yield f"{key} of {name}", value


def is_torch(file: Path) -> bool:
    """Whether a file is one of torch.save."""
    return file.suffix in (".pt", ".bin", ".pth")


def damaged(file: Path, change: str, draw: random.Random, files: list[Path], others: list[Path]) -> bool:
    """Change a file; False where it cannot be changed so."""
    data = bytearray(file.read_bytes())
    if change in BYTES:
        return _bytes(file, data, change, draw)
    if change == "gone":
        file.unlink()
        return True
    if change in ("swap", "other"):
        found = [path for path in (files if change == "swap" else _all(others)) if path.suffix == file.suffix]
        found = [
            path
            for path in found
            if path != file and path.read_bytes() != data and (change == "swap" or path.name == file.name)
        ]
        if not found:
            return False
        place = draw.choice(found)
        theirs = place.read_bytes()
        if change == "swap":
            place.write_bytes(data)
        file.write_bytes(theirs)
        return True
    return _edited(file, change, draw)


def _all(directories: list[Path]) -> list[Path]:
    return [path for place in directories for path in sorted(place.rglob("*")) if path.is_file()]


def _bytes(file: Path, data: bytearray, change: str, draw: random.Random) -> bool:
    end = len(data)
    if file.suffix == ".safetensors":  # has no sums: its header is held against itself, its numbers are as they are
        end = 8 + int.from_bytes(data[:8], "little")
    if end < 2:
        return False
    place = draw.randrange(end)
    if change == "flip":
        data[place] ^= 1 << draw.randrange(8)
    elif change == "zero":
        stretch = min(draw.choice((4, 64, 1024)), end - place)
        if not any(data[place : place + stretch]):
            return False
        data[place : place + stretch] = bytes(stretch)
    else:
        data = data[:place]
    file.write_bytes(data)
    return True


def _edited(file: Path, change: str, draw: random.Random) -> bool:
    """Change one entry of what a file of torch.save holds, and save it again."""
    try:
        from fkernel.checkpoint.files import read_tensors

        found = read_tensors(file, "a state")
    except fk.FKernelError:
        return False
    places = list(_places(found))
    draw.shuffle(places)
    for holder, key in places:
        value = holder[key]
        if change == "key" and isinstance(holder, dict):
            del holder[key]
        elif change == "kind" and isinstance(value, torch.Tensor):
            holder[key] = "a tensor"
        elif change == "shape" and _plain(value) and value.ndim and len(value) > 1:
            holder[key] = value[:-1].clone()
        elif change == "dtype" and _plain(value) and value.is_floating_point():
            holder[key] = value.double()
        elif change == "nan" and isinstance(value, float):
            holder[key] = float("nan")
        elif change == "nan" and _plain(value) and value.is_floating_point() and value.numel():
            with torch.no_grad():
                value.view(-1)[draw.randrange(value.numel())] = float("nan")
        else:
            continue
        save_again(found, file)
        return True
    return False


def _plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    """Walk through dictionaries and lists."""
    keys = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    for key in keys:
        yield found, key
        yield from _places(found[key])


def _outcome(run: str, checkpoint: Path, true: dict[str, Any]) -> tuple[str, str]:
    """Load the changed checkpoint and hold it against what it was."""
    try:
        changed = numbers(run, checkpoint)
    except fk.FKernelError as error:
        return "refused", str(error)
    except Exception as error:
        return f"RAW {type(error).__name__}", str(error)
    if STATELESS in changed:
        return "said", "it has no optimizer's state, and a warning says so"
    apart = [key for key in {**true, **changed} if not _same(true.get(key), changed.get(key))]
    return ("OTHER NUMBERS", ", ".join(apart[:4])) if apart else ("same", "")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.double(), b.double())
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return float(a) == float(b) if a is not None and b is not None else False
    return a == b


def summary(trials: list[Trial]) -> dict[str, dict[str, int]]:
    """Count outcomes by change."""
    return {
        change: dict(Counter(trial.outcome for trial in trials if trial.change == change))
        for change in (*BYTES, *FILES, *EDITS)
    }
