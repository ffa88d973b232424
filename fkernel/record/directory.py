"""The files of a recording.

<directory>/
  recording.json              what is trained: model, parameters, optimizers, temperature, precision
  steps/000012/
    step.json                 learning rates, settings, norms, clipping, losses, the check; checksums of the other two
    tokens.safetensors        of each micro-batch i: i/input_ids, i/attention_mask, i/response_mask, i/token_weights,
                              i/logprobs, and i/entropy_weights, i/entropies, i/kl_weights, i/others/… where there are
                              any, [b t]
    sequences.jsonl           one sequence a line: texts, rewards, advantage, group, whatever else was given
  snapshots/000012/           before step 12
    snapshot.json             optimizers' settings and numbers; checksums of the other two
    weights.safetensors       θ, what is trained of it
    optimizer.safetensors     "name/exp_avg", "name/exp_avg_sq", … in their own dtypes
  replaced/                   steps that a resumed run took otherwise

A step or snapshot is written to a temporary directory and renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from fkernel.errors import StoreError
from fkernel.io import (
    atomic_directory,
    atomic_write,
    checksum,
    checksummed_json,
    flush_to_disk,
    make_directory,
    parse_json,
    plain_errors,
    read_checksummed,
    safetensors_chunks,
    sweep,
    write_file,
)
from fkernel.record.layout import RecordedMicrobatch
from fkernel.shapes import Tensor, Tree

Read = TypeVar("Read", bound=Callable[..., Any])
SCHEMA = 1
ABOUT, STEPS, SNAPSHOTS, REPLACED = "recording.json", "steps", "snapshots", "replaced"
STEP, TOKENS, ROWS = "step.json", "tokens.safetensors", "sequences.jsonl"
SNAPSHOT, WEIGHTS, OPTIMIZER = "snapshot.json", "weights.safetensors", "optimizer.safetensors"
MASKS = ("attention_mask", "response_mask")
OPTIONAL = ("entropy_weights", "entropies", "kl_weights")


def numbered(directory: Path, kind: str) -> tuple[int, ...]:
    """Numbers of the steps or snapshots that are there, sorted.

    Args:
        directory: of the recording.
        kind: "steps" or "snapshots".
    """
    place = directory / kind
    names = [each.name for each in place.iterdir()] if place.is_dir() else []
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def place_of(directory: Path, kind: str, number: int) -> Path:
    """Directory of a step or snapshot."""
    return directory / kind / f"{number:06d}"


def remove_partial(directory: Path) -> None:
    """Delete what a killed process left half-written."""
    for kind in (STEPS, SNAPSHOTS):
        sweep(directory / kind)


def write_about(directory: Path, about: Mapping[str, Any]) -> None:
    """Write what a recording is about; one that is there must agree.

    Raises:
        StoreError: another run's is there.
    """
    path, given = directory / ABOUT, json.loads(json.dumps({"schema": SCHEMA, **about}))
    if path.exists():
        before = read_about(directory)
        differ = sorted(key for key in {*before, *given} if before.get(key) != given.get(key))
        if differ:
            raise StoreError(
                f"{str(directory)!r} holds the recording of another run: its {', '.join(differ)} differ(s). Choose "
                f"another directory, or resume with what the run began with."
            )
        return
    atomic_write(path, [checksummed_json(given)])


def read_about(directory: Path) -> dict[str, Any]:
    """Read what a recording is about.

    Raises:
        StoreError: there is none, it is damaged, or of a newer schema.
    """
    about = _read(directory / ABOUT)
    if about.get("schema") != SCHEMA:
        raise StoreError(
            f"The recording at {str(directory)!r} has schema {about.get('schema')}; this version of fkernel reads "
            f"{SCHEMA}. Update it."
        )
    return about


def damage_told(read: Read) -> Read:
    """Raise StoreError where whole files of a recording do not say what they should: edited, and sealed again."""

    @wraps(read)
    def told(self: Any, *args: Any) -> Any:
        try:
            return read(self, *args)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise StoreError(
                f"The recording at {str(self.directory)!r} is damaged: {type(error).__name__} {error}. Copy it again."
            ) from error

    return told  # pyright: ignore[reportReturnType]


def write_step(
    place: Path, facts: Mapping[str, Any], microbatches: Sequence[RecordedMicrobatch], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write a step's directory.

    Args:
        place: it does not exist.
        facts: JSON.
        microbatches: its backward passes.
        rows: JSON of each sequence.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    tensors = {f"{i}/{name}": leaf for i, each in enumerate(microbatches) for name, leaf in _tensors(each).items()}
    _write(place, STEP, facts, {TOKENS: tensors, ROWS: lines})


def read_step(place: Path) -> tuple[dict[str, Any], tuple[RecordedMicrobatch, ...], tuple[dict[str, Any], ...]]:
    """Read a step's directory, its checksums verified.

    Returns:
        What `write_step` was given.

    Raises:
        StoreError: it is missing or damaged.
    """
    facts = _checked(place, STEP, (TOKENS, ROWS))
    tensors = load_file(place / TOKENS)
    rows = tuple(parse_json(line) for line in (place / ROWS).read_text("utf-8").split("\n") if line)
    passes = [_microbatch(tensors, i, each["loss"]) for i, each in enumerate(facts["microbatches"])]
    return facts, tuple(passes), rows


def step_checksums(place: Path) -> dict[str, str]:
    """Read the checksums of a step's files.

    Raises:
        StoreError: it is missing or damaged.
    """
    return _read(place / STEP)["sha256"]


def write_snapshot(place: Path, facts: Mapping[str, Any], weights: Tree, optimizer: Tree) -> None:
    """Write a snapshot's directory."""
    _write(place, SNAPSHOT, facts, {WEIGHTS: weights, OPTIMIZER: optimizer})


def read_snapshot(place: Path) -> tuple[dict[str, Any], Tree, Tree]:
    """Read a snapshot's directory, its checksums verified.

    Raises:
        StoreError: it is missing or damaged.
    """
    facts = _checked(place, SNAPSHOT, (WEIGHTS, OPTIMIZER))
    return facts, load_file(place / WEIGHTS), load_file(place / OPTIMIZER)


def set_aside(directory: Path, kind: str, number: int) -> Path:
    """Move a step or snapshot to `replaced/`, under a name that is free."""
    place, target = place_of(directory, kind, number), directory / REPLACED
    make_directory(target)
    i = 0
    while (free := target / f"{kind}-{place.name}-{i}").exists():
        i += 1
    with plain_errors("move", place):
        place.rename(free)
        flush_to_disk(target)
        flush_to_disk(place.parent)
    return free


def _write(place: Path, name: str, facts: Mapping[str, Any], contents: Mapping[str, Tree | str]) -> None:
    make_directory(place.parent)
    with atomic_directory(place) as work:
        sums = dict[str, str]()
        for file, content in contents.items():
            chunks = [content.encode()] if isinstance(content, str) else safetensors_chunks(content)
            sums[file] = write_file(work / file, chunks)
        write_file(work / name, [checksummed_json({**facts, "sha256": sums})])


def _checked(place: Path, name: str, files: Sequence[str]) -> dict[str, Any]:
    """Read the facts of a directory, and compare its other files with their checksums."""
    facts = _read(place / name)
    for file in files:
        try:
            same = checksum(place / file) == facts["sha256"][file]
        except OSError as error:
            raise StoreError(f"{place / file} cannot be read ({error}); the record is damaged.") from error
        if not same:
            raise StoreError(f"{place / file} is not what was written: it is damaged.")
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_checksummed(path)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path.name == ABOUT:
            raise StoreError(
                f"There is no recording at {str(path.parent)!r}: it has no {ABOUT}. Expected a directory that a "
                f"Recorder wrote."
            ) from error
        raise StoreError(f"{str(path)!r} cannot be read: {error}. Is {str(path.parent)!r} a recording?") from error


def _tensors(each: RecordedMicrobatch) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {"input_ids": each.input_ids.to(torch.int32)}
    tensors |= {name: getattr(each, name).to(torch.uint8) for name in MASKS}
    tensors |= {name: getattr(each, name) for name in ("token_weights", "logprobs", *OPTIONAL)}
    tensors |= {f"others/{name}": leaf for name, leaf in each.others.items()}
    return {name: leaf for name, leaf in tensors.items() if leaf is not None}


def _microbatch(tensors: Tree, i: int, loss: float | None) -> RecordedMicrobatch:
    own = {name.partition("/")[2]: leaf for name, leaf in tensors.items() if name.partition("/")[0] == str(i)}
    masks = {name: own[name].bool() for name in MASKS}
    numbers = {name: own.get(name) for name in ("token_weights", "logprobs", *OPTIONAL)}
    others = {name.partition("/")[2]: leaf for name, leaf in own.items() if name.startswith("others/")}
    return RecordedMicrobatch(own["input_ids"].long(), **masks, **numbers, others=others, loss=loss)  # pyright: ignore
