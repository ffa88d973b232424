"""Which files are FSDP's rank files, told by their names, and of how many ranks."""

from __future__ import annotations

import re
from pathlib import Path

from fkernel.checkpoint.files import read_json
from fkernel.checkpoint.layout import Layout
from fkernel.errors import CheckpointError, listing

VERL = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")
ACCELERATE = re.compile(r"(pytorch_model_fsdp|optimizer)(?:_(\d+))?_rank(\d+)\.bin")
CONFIG, ADAPTER_SIZES = "fsdp_config.json", "lora_train_meta.json"
HUGGINGFACE, ACTOR = "huggingface", "actor"
NEWEST = "latest_checkpointed_iteration.txt"
"""verl's, beside its checkpoints global_step_N/: which of them is the newest."""


def find(root: Path) -> Layout | None:
    """Tell verl's actor and accelerate's rank files by their names; None where there are none.

    Args:
        root: verl's global_step_N/ or its actor/; a directory of accelerate's.

    Raises:
        CheckpointError: it is one rank's file by itself, or a directory of several checkpoints.
    """
    if VERL.fullmatch(root.name) or ACCELERATE.fullmatch(root.name):
        raise CheckpointError(
            f"{root} is one rank's part of a checkpoint. Load the directory that holds the files of all ranks: "
            f"{root.parent}."
        )
    if not root.is_dir():
        return None
    for place in (root, root / ACTOR):
        names = [item.name for item in place.iterdir()] if place.is_dir() else []
        if any(match and match[1] == "model" for match in map(VERL.fullmatch, names)):
            config = place / HUGGINGFACE
            optimizer = any(name.startswith("optim_") for name in names)
            described = config if (config / "config.json").is_file() else None
            return Layout("fsdp ranks", place, place if optimizer else None, config=described)
    names = [item.name for item in root.iterdir()]
    if any(match and match[1] != "optimizer" for match in map(ACCELERATE.fullmatch, names)):
        optimizer = any(match and match[1] == "optimizer" for match in map(ACCELERATE.fullmatch, names))
        scheduler = root / "scheduler.bin"
        return Layout(
            "fsdp ranks", root, root if optimizer else None, scheduler=scheduler if scheduler.is_file() else None
        )
    if (root / NEWEST).is_file() and any(name.startswith("global_step_") for name in names):
        newest = (root / NEWEST).read_text(errors="replace").strip()
        raise CheckpointError(
            f"{root} is verl's directory of checkpoints; name one of them, such as {root / f'global_step_{newest}'}."
        )
    return None


def is_verl(directory: Path) -> bool:
    """Whether a directory holds verl's files, and not accelerate's."""
    return any(VERL.fullmatch(item.name) for item in directory.iterdir())


def rank_files(directory: Path, kind: str) -> list[Path]:
    """List the files of all ranks, rank 0's first.

    Args:
        directory: where they lie.
        kind: verl's "model", "optim" or "extra_state"; accelerate's "pytorch_model_fsdp" or "optimizer".

    Raises:
        CheckpointError: a rank's file is missing, files are of several numbers of ranks, or fsdp_config.json says
            another; there are several models.
    """
    names = sorted(item.name for item in directory.iterdir())
    if kind in ("model", "optim", "extra_state"):
        return _verls(directory, [match for match in map(VERL.fullmatch, names) if match and match[1] == kind])
    return _accelerates(directory, [match for match in map(ACCELERATE.fullmatch, names) if match and match[1] == kind])


def fsdp_version(directory: Path) -> int | None:
    """Read which FSDP wrote a checkpoint, where verl says so.

    Raises:
        CheckpointError: its file says neither 1 nor 2.
    """
    version = _configured(directory, "FSDP_version")
    if version not in (None, 1, 2):
        raise CheckpointError(f"{directory / CONFIG} says that FSDP_version is {version!r}; expected 1 or 2.")
    return version


def _verls(directory: Path, matches: list[re.Match[str]]) -> list[Path]:
    sizes = {int(match[2]) for match in matches}
    if len(sizes) != 1:
        raise CheckpointError(
            f"{directory} holds {matches[0][1] if matches else 'no'} files of trainings of {sorted(sizes)} ranks; "
            f"expected one training's. Move the others elsewhere."
        )
    size, kind = sizes.pop(), matches[0][1]
    said = _configured(directory, "world_size")
    if said not in (None, size):
        raise CheckpointError(
            f"{directory / CONFIG} says that world_size is {said!r}; the names of the files {matches[0].string} … say "
            f"{size}: files of two trainings."
        )
    files = {int(match[3]): directory / match.string for match in matches}
    wanted = [f"{kind}_world_size_{size}_rank_{rank}.pt" for rank in range(size)]
    return _complete(directory, files, wanted)


def _accelerates(directory: Path, matches: list[re.Match[str]]) -> list[Path]:
    numbers = {match[2] for match in matches}
    if numbers == {None}:
        raise CheckpointError(
            f"{directory} holds {matches[0].string} …: FSDP's LOCAL_STATE_DICT, whose flat parameters have no names. "
            f"Save with state_dict_type SHARDED_STATE_DICT or FULL_STATE_DICT."
        )
    if len(numbers) != 1:
        raise CheckpointError(
            f"{directory} holds the parts of {len(numbers)} models or optimizers: "
            f"{listing(sorted(match.string for match in matches))}. Move all but one's elsewhere."
        )
    kind, number = matches[0][1], numbers.pop()
    files = {int(match[3]): directory / match.string for match in matches}
    return _complete(directory, files, [f"{kind}_{number}_rank{rank}.bin" for rank in range(max(files) + 1)])


def _complete(directory: Path, files: dict[int, Path], wanted: list[str]) -> list[Path]:
    there = {path.name for path in files.values()}
    missing = [name for name in wanted if name not in there]
    foreign = sorted(there - set(wanted))
    if missing or foreign:
        what, names = ("lacks", missing) if missing else ("has, beyond the number of ranks,", foreign)
        raise CheckpointError(
            f"{directory} {what} {listing(names)}: {len(wanted)} ranks saved one file each. Copy all of them."
        )
    return [files[rank] for rank in sorted(files)]


def _configured(directory: Path, key: str) -> int | None:
    if not (directory / CONFIG).is_file():
        return None  # verl writes it since 0.4
    config = read_json(directory / CONFIG, "verl's FSDP configuration")
    if not isinstance(config, dict) or not isinstance(config.get(key), int):
        raise CheckpointError(f"{directory / CONFIG} has no whole number {key!r}: {config!r}.")
    return config[key]
