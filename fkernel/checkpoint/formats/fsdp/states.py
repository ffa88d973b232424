"""What the ranks' optimizer files hold, brought together under the numbers or names that they use.

What is a tensor of a parameter's numbers is put together; what is none (the steps taken, the settings of a group) must
be the same in every file: where it is not, a file is of another step or another training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.formats.fsdp.parts import Part, joined, opened, part_of
from fkernel.errors import CheckpointError

WHAT = "one rank's part of an optimizer's state_dict"
Entries = dict[Any, dict[str, Any]]
"""{number or name: {"step": …, "exp_avg": …}}."""
Pieces = dict[Any, dict[str, list[torch.Tensor]]]
"""{number: {"exp_avg": a stretch of each rank that holds any, in the order of the ranks}}."""


def checked(path: Path) -> Mapping[str, Any]:
    """Open one rank's file and check that it is a state_dict.

    Raises:
        CheckpointError: it is missing, damaged, another rank's, or no state_dict.
    """
    found = opened(path, WHAT)
    state: Any = found.get("state")
    groups: Any = found.get("param_groups")
    whole = isinstance(state, Mapping) and isinstance(groups, list | tuple) and len(groups) > 0
    whole = whole and all(isinstance(g, Mapping) and isinstance(g.get("params"), list | tuple) for g in groups)
    if not whole or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise CheckpointError(
            f"{path} holds {sorted(map(str, found))[:6]}; expected {WHAT}: state as {{number: {{…}}}} and param_groups "
            f"as a list of {{'params': […], …}}."
        )
    numbers = {index for group in groups for index in group["params"]}
    foreign = [index for index in state if index not in numbers]
    if foreign:
        raise CheckpointError(f"{path} holds the state of {foreign[0]!r}, which is in none of its parameter groups.")
    return found


def whole_tensors(files: Mapping[int, Path], groups: Any) -> Entries:
    """Bring together tensors that say where their parts belong.

    Args:
        files: {rank: file}.
        groups: the first file's parameter groups; the others' must be the same.

    Raises:
        CheckpointError: see `parts.part_of` and `parts.joined`; or files disagree.
    """
    entries: Entries = {}

    def parts() -> Iterator[tuple[Any, Part, Path]]:
        for rank, path in files.items():
            for index, key, leaf in _moments(path, groups, entries):
                part = part_of(leaf, rank, f"{key} of {index}", path)
                if part is not None:
                    yield (index, key), part, path

    for (index, key), whole in joined(parts()).items():
        entries[index][key] = whole
    return entries


def stretches(files: Mapping[int, Path], groups: Any) -> tuple[Entries, Pieces]:
    """Collect tensors that do not say where they belong, rank by rank.

    Args:
        files: {rank: file}.
        groups: as in `whole_tensors`.

    Returns:
        What is no tensor, and the tensors' stretches.

    Raises:
        CheckpointError: a file is damaged, or files disagree.
    """
    entries, pieces = Entries(), Pieces()
    for path in files.values():
        for index, key, leaf in _moments(path, groups, entries):
            if type(leaf) is not torch.Tensor:
                raise CheckpointError(f"{path} holds {key} of {index} as a {type(leaf).__name__}; expected a tensor.")
            kept = pieces.setdefault(index, {}).setdefault(key, [])
            if kept and kept[0].dtype != leaf.dtype:
                raise CheckpointError(f"{path} holds {key} of {index} in {leaf.dtype}, others in {kept[0].dtype}.")
            kept.append(leaf.detach().reshape(-1).clone())  # the file is closed when the next one is read
    return entries, pieces


def _moments(path: Path, groups: Any, entries: Entries) -> Iterator[tuple[Any, str, Any]]:
    """Go through one file's tensors; what is none is kept in `entries`."""
    found = checked(path)
    if not _alike(found["param_groups"], groups):
        raise CheckpointError(
            f"{path} has other parameter groups (numbers, learning rate, settings) than another rank's file: they are "
            f"of two steps, or of two trainings."
        )
    for index, entry in found["state"].items():
        kept = entries.setdefault(index, {})
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                yield index, key, value
            elif not isinstance(value, torch.Tensor | int | float | None):
                raise CheckpointError(
                    f"{path} holds {key} of {index} as a {type(value).__name__}; expected a tensor or a number."
                )
            elif not _alike(kept.setdefault(key, _own(value)), value):
                raise CheckpointError(
                    f"{path} says {key} {_shown(value)} of {index}, another rank's file {_shown(kept[key])}: they are "
                    f"of two steps, or of two trainings."
                )


def _own(value: Any) -> Any:
    """A number that stays when the mapped file goes."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _alike(a: Any, b: Any) -> bool:
    """Whether two things of plain containers are the same."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {*a} == {*b} and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)


def _shown(value: Any) -> str:
    return f"{value.item():g}" if isinstance(value, torch.Tensor) and value.numel() == 1 else repr(value)
