"""`torch.distributed.checkpoint` directories, read by one process, without a process group and without pickle's powers.

Such a directory holds a `.metadata` file, a pickle, and shards. PyTorch unpickles the metadata as it is, and loads
non-tensors with every power that pickle has. Here the metadata may name the classes that it is made of and no others,
and what is no tensor is read as weights only.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from fkernel.checkpoint.files import first_line
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError

METADATA = ".metadata"
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
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
}
"""What metadata is made of. Nothing else is looked up, no attribute of these either: `Path.unlink` has a dot."""


@libraries_quiet()
def read_distributed(path: str | Path) -> dict[str, Any]:
    """Read a directory of `torch.distributed.checkpoint.save` into one nested dictionary of tensors.

    Raises:
        CheckpointError: it is no such directory, it is damaged, or it names a class that metadata is not made of.
    """
    directory = Path(path)
    if not (directory / METADATA).is_file():
        raise CheckpointError(f"{directory} holds no {METADATA}: no directory of torch.distributed.checkpoint.")
    found: dict[str, Any] = {}
    reader = _Reader(directory)
    reader.read_metadata()  # what is wrong with it is said here; below it would be wrapped
    try:
        _load_state_dict(found, storage_reader=reader, planner=_Planner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # threads, planners and codecs have errors of their own
        raise CheckpointError(f"{directory} cannot be read: {_innermost(error)}") from error
    return found


def _innermost(error: BaseException) -> str:
    """Give the first line of what went wrong on the one rank that there is."""
    failures = getattr(error, "failures", {})
    return first_line(next(iter(failures.values()))[0] if failures else error)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Unpickle the metadata, if it is made of what metadata is made of."""
        path = Path(self.path) / METADATA
        try:
            metadata = _Restricted(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged, or no metadata: {first_line(error)}") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Give a class that metadata is made of; refuse every other."""
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"The metadata names {module}.{name}, which no checkpoint's metadata is made of; refused."
        )


class _Planner(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Read what is no tensor (a step, a group's numbers) as weights only."""
        fqn = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[fqn], torch.load(value, weights_only=True))
