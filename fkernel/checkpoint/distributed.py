"""`torch.distributed.checkpoint` directories, read by one process, without a process group and without pickle's powers.

Such a directory holds a `.metadata` file, a pickle, and shards. PyTorch unpickles the metadata as it is, and loads
non-tensors with every power that pickle has. Here the metadata may name the classes that it is made of and no others,
and what is no tensor is read as weights only.

Every tensor is made once, whole, and each chunk is copied into its place and dropped: at most the whole tensors and
one chunk are in memory. Each chunk is a file of torch.save by itself, whose sums are checked, and whose shape and dtype
must be what the metadata says.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.chunks import Box, Item, items_of
from fkernel.checkpoint.files import check_sums, first_line
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError
from fkernel.io import inside

METADATA = ".metadata"
Rows = Callable[[str, tuple[int, ...]], slice | None]
"""(a stored tensor's key, its shape) -> which of its rows are wanted; None for all."""
CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    # Megatron keeps the plans by which its ranks saved.
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
}
"""What metadata is made of. Nothing else is looked up, no attribute of these either: `Path.unlink` has a dot."""

STEP = re.compile(r"(^|\.)state\..+\.step$")
"""The key of the steps that an optimizer has taken with one parameter, nested or flattened."""
ASIDE = re.compile(r"^(app\.)?(dataloaders?|rng_state|extra_state)(\.|$)")
"""Keys of what a trainer keeps for itself and nothing here needs: they are not read."""

STATE = re.compile(r"^(app\.)?optim(izers?|izer_states?|izer_state_dict)?(\.|$)")
"""Keys of an optimizer's state beside weights, as trainers name it (`fkernel.checkpoint.contents`)."""


def whole(key: str, shape: tuple[int, ...]) -> slice | None:
    """Want all rows of every tensor."""
    return None


def everything(key: str) -> bool:
    """Want all that is stored, but for the state of data loaders and of random numbers."""
    return ASIDE.match(key) is None


def weights_alone(key: str) -> bool:
    """Want everything but an optimizer's state, which may be twice the weights.

    Example:
        >>> [weights_alone(key) for key in ("model.w", "optim_head.w", "app.optimizer.state.w.exp_avg")]
        [True, True, False]
    """
    return everything(key) and STATE.match(key) is None


@libraries_quiet()
def read_distributed(
    path: str | Path, wanted: Callable[[str], bool] = everything, rows_of: Rows = whole
) -> dict[str, Any]:
    """Read a directory of `torch.distributed.checkpoint.save` into one nested dictionary of tensors.

    Args:
        path: the directory.
        wanted: whether a key is read; a key joins what is nested by dots, "optimizer.state.w.exp_avg".
        rows_of: (key, shape) -> which rows of a tensor are read, None for all; chunks without any of them are not
            opened.

    Raises:
        CheckpointError: it is no such directory, it is damaged or lacks a file, its files are of several steps, or it
            names a class that metadata is not made of.
    """
    directory = Path(path)
    metadata = read_metadata(directory)
    try:
        items = [item for item in items_of(metadata, directory / METADATA) if wanted(item.key)]
        keys = {item.key for item in items}
        about_all: Mapping[str, Any] = metadata.state_dict_metadata
        rows = {key: rows_of(key, tuple(about_all[key].size)) for key in keys if hasattr(about_all[key], "size")}
        found = {key: _blank(about, rows.get(key)) for key, about in about_all.items() if key in keys}
        items = [item for item in items if item.box is None or _inside(item.box, rows[item.key])]
        paths = metadata.planner_data or {}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle that unpickles has anything in any place
        raise CheckpointError(f"{directory / METADATA} is damaged: {first_line(error)}") from error
    steps: dict[str, set[float]] = {}
    for name, own in groupby(items, key=lambda item: item.file):
        _read_file(_path(directory, name), [*own], found, rows, steps)
    _check_steps(directory, steps)
    return _nested(found, paths, directory / METADATA)


def _path(directory: Path, name: str) -> Path:
    try:
        return inside(directory, name)
    except ValueError as error:
        raise CheckpointError(f"{directory / METADATA} is damaged: {error}.") from error


def read_metadata(directory: Path) -> Any:
    """Unpickle the metadata, if it is made of what metadata is made of.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it names another class.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = directory / METADATA
    try:
        metadata = _Restricted(io.BytesIO(path.read_bytes())).load()
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} holds no {METADATA}: no directory of torch.distributed.checkpoint."
        ) from None
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise CheckpointError(f"{path} is damaged, or no metadata: {first_line(error)}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is damaged, or no metadata: it holds a {type(metadata).__name__}.")
    return metadata


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Give a class that metadata is made of; refuse every other."""
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"The metadata names {module}.{name}, which no checkpoint's metadata is made of; refused."
        )


def _blank(about: Any, rows: slice | None) -> Any:
    """Make room for a tensor, or for some of its rows; None for what is no tensor."""
    chunks = getattr(about, "chunks", None)
    if chunks is None:
        return None
    shape = tuple(about.size) if rows is None else (rows.stop - rows.start, *about.size[1:])
    return torch.empty(shape, dtype=about.properties.dtype)


def _inside(box: Box, rows: slice | None) -> bool:
    """Tell whether a chunk has any of the rows; one without numbers has what there is of it."""
    (start, *_), (size, *_) = box if box[0] else ((0,), (1,))
    return rows is None or (start < rows.stop and rows.start < start + size)


def _read_file(
    path: Path,
    items: list[Item],
    found: dict[str, Any],
    rows: Mapping[str, slice | None],
    steps: dict[str, set[float]],
) -> None:
    """Read what is wanted of one file into its place."""
    try:
        with path.open("rb") as file:
            for item in items:
                file.seek(item.offset)
                value = _loaded(file.read(item.length), item, path)
                if item.box is None:
                    found[item.key] = value
                else:
                    _place(found[item.key], value, item, rows[item.key], path)
                if STEP.search(item.key):
                    steps.setdefault(path.name, set()).add(float(value))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no file {path}, which the checkpoint's {METADATA} names: a rank's file is missing. Copy the "
            f"whole directory."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def _loaded(data: bytes, item: Item, path: Path) -> Any:
    if len(data) < item.length:
        raise CheckpointError(
            f"{path} is cut off: {item.key!r} has {item.length} bytes at {item.offset}, and the file ends after "
            f"{len(data)} of them. Copy it again from where it was saved."
        )
    try:
        check_sums(io.BytesIO(data), path)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # what rebuilds a tensor raises whatever it likes
        raise CheckpointError(
            f"{path} has at {item.offset}, where its {METADATA} says {item.key!r} is, nothing that can be read as "
            f"tensors only ({first_line(error)}): it is damaged, of another rank or of another checkpoint."
        ) from error


def _place(whole: torch.Tensor, value: Any, item: Item, rows: slice | None, path: Path) -> None:
    """Copy a chunk into its tensor, of which only some rows may be wanted."""
    assert item.box is not None
    start, shape = item.box
    what = f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != whole.dtype:
        raise CheckpointError(
            f"{path} has {what} where its {METADATA} says a part of {item.key!r} is, {list(shape)} of {whole.dtype}: "
            f"it is of another rank or of another checkpoint."
        )
    value = value.detach()
    if rows is not None:
        first, last = max(start[0], rows.start), min(start[0] + shape[0], rows.stop)
        value = value[first - start[0] : last - start[0]]
        start = (first - rows.start, *start[1:])
    whole[tuple(slice(begin, begin + extent) for begin, extent in zip(start, value.shape, strict=True))] = value


def _check_steps(directory: Path, steps: Mapping[str, set[float]]) -> None:
    """Raise where files say different steps: within one, parameters may differ that were left out of some steps."""
    said = sorted((min(inside), max(inside), name) for name, inside in steps.items())
    for (_, earlier, first), (later, _, second) in pairwise(said):
        if earlier < later:
            raise CheckpointError(
                f"The files of {directory} are of different steps: parameters have taken {earlier:g} in {first} and "
                f"{later:g} in {second}. One of them was copied from another checkpoint."
            )


def _nested(found: Mapping[str, Any], paths: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Undo the flattening that DCP did: a path of names and numbers leads to each value."""
    root: dict[Any, Any] = {}
    for key, value in found.items():
        if paths and key not in paths:
            raise CheckpointError(f"{source} is damaged: it does not say where in the dictionary {key!r} was.")
        path = tuple(paths.get(key, (key,)))
        here = root
        for part in path[:-1]:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise CheckpointError(f"{source} is damaged: {key!r} is inside of something that is a value.")
        if path[-1] in here:
            raise CheckpointError(f"{source} is damaged: two values are at {path}.")
        here[path[-1]] = value
    return {key: _with_lists(value) for key, value in root.items()}


def _with_lists(tree: Any) -> Any:
    """Make lists of dictionaries whose keys number their items."""
    if not isinstance(tree, dict):
        return tree
    inside = {key: _with_lists(value) for key, value in tree.items()}
    numbered = bool(inside) and all(type(key) is int for key in inside) and sorted(inside) == [*range(len(inside))]
    return [inside[i] for i in range(len(inside))] if numbered else inside
