"""One rank's part of a tensor: where in the whole it belongs, and the whole brought together from all ranks.

    DTensor          mesh of ranks, placements: Shard(d) cuts dimension d into n pieces of ⌈size / n⌉, the last shorter;
                     Replicate() holds a copy on each. Rank r's coordinate in the mesh says which piece is its own
    ShardedTensor    a list of shards, each with its offsets and sizes; a rank may have none
    Tensor           the whole

A ShardedTensor's classes start process groups when they are built, so inert stand-ins take their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel.checkpoint.chunks import Box, covers
from fkernel.checkpoint.files import Inert, check_saved_as, read_tensors
from fkernel.errors import CheckpointError, listing


class Part(NamedTuple):
    """A box of a tensor.

    Attributes:
        shape: of the whole tensor.
        start: where the box begins, one number a dimension.
        values: its numbers.
        layout: how the whole is spread over the ranks, which is the same for all of its boxes.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    values: torch.Tensor
    layout: Any = None


class ShardedTensor(torch.Tensor):
    """Stands in for `torch.distributed._shard.sharded_tensor.ShardedTensor`: keeps what it was saved with."""

    def __setstate__(self, state: Any) -> None:
        self.saved = state

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """No mathematics: it has no numbers of its own."""
        raise NotImplementedError(f"{func} of a ShardedTensor")


def attribute(owner: Any, name: str) -> type[Inert]:
    """Stands in for getattr, with which pickle names the members of an enumeration and classes in classes."""
    return Inert


SHARDED = "torch.distributed._shard"
STAND_INS = (
    *(f"{SHARDED}.sharded_tensor.metadata.{name}" for name in ("ShardedTensorMetadata", "TensorProperties")),
    *(f"{SHARDED}.sharded_tensor.metadata.MEM_FORMAT_ENCODING", f"{SHARDED}.sharded_tensor.shard.Shard"),
    *(f"{SHARDED}.metadata.ShardMetadata", f"{SHARDED}.sharding_spec.chunk_sharding_spec.ChunkShardingSpec"),
    *(f"{SHARDED}.sharding_spec.api.EnumerableShardingSpec", "torch.distributed.remote_device._remote_device"),
    # NumPy's random state, which verl saves beside its scheduler's
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
    "_codecs.encode",
)
"""What a ShardedTensor, or a random state, is made of; none of it does anything."""


@contextmanager
def inert() -> Iterator[None]:
    """Let files name the classes above, which stand-ins take the place of."""
    names: list[Any] = [(Inert, name) for name in STAND_INS]
    names += [(attribute, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    names += [Inert, (ShardedTensor, f"{SHARDED}.sharded_tensor.api.ShardedTensor")]
    with torch.serialization.safe_globals(names):
        yield


def opened(path: Path, what: str) -> Mapping[Any, Any]:
    """Read one rank's file.

    Raises:
        CheckpointError: it is missing, damaged, another rank's, or holds no dictionary.
    """
    check_saved_as(path)
    with inert():
        found = read_tensors(path, what, mmap=True)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; expected {what}, as a dictionary.")
    return found


def part_of(leaf: Any, rank: int, name: Any, path: Path) -> Part | None:
    """Tell which part of a tensor a rank's file holds; None where it holds nothing of it.

    Args:
        leaf: what the file has.
        rank: the file's.
        name: whose it is, for messages.
        path: the file, for messages.

    Raises:
        CheckpointError: it is laid out in a way that is not read, is another rank's, or its shape is another than its
            layout says.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(leaf, DTensor):
        return _of_dtensor(leaf, rank, name, path)
    if isinstance(leaf, ShardedTensor):
        return _of_sharded(leaf, rank, name, path)
    if type(leaf) in (torch.Tensor, torch.nn.Parameter):
        return Part(tuple(leaf.shape), (0,) * leaf.ndim, leaf.detach(), ("Tensor",))
    raise CheckpointError(f"{path} holds {name!r} as a {type(leaf).__name__}; expected a tensor.")


def copies(leaves: Iterable[Any], ranks: int) -> list[int]:
    """List the ranks that together hold one copy of every tensor: all, or where parameters are replicated fewer.

    Args:
        leaves: rank 0's.
        ranks: how many there are.

    Example:
        >>> copies([torch.ones(2)], 2)
        [0, 1]
    """
    from torch.distributed.tensor import DTensor, Replicate

    needed: set[int] = set()
    for leaf in leaves:
        if not isinstance(leaf, DTensor):
            return list(range(ranks))
        mesh = _mesh(leaf)
        for dim, placement in enumerate(_spec(leaf).placements):
            if isinstance(placement, Replicate):
                mesh = mesh.narrow(dim, 0, 1)
        needed |= {*mesh.flatten().tolist()}
    return sorted(needed) or list(range(ranks))


def joined(parts: Iterable[tuple[Any, Part, Path]]) -> dict[Any, torch.Tensor]:
    """Copy parts into whole tensors, each of which is allocated once.

    Args:
        parts: (whose it is, the part, its file); read lazily, so that one file is open at a time.

    Raises:
        CheckpointError: parts disagree about shape or dtype, do not cover a tensor once, or copies differ.

    Example:
        >>> a, b = (Part((3,), (start,), torch.arange(start, end)) for start, end in ((0, 2), (2, 3)))
        >>> joined([("w", a, Path("rank_0.pt")), ("w", b, Path("rank_1.pt"))])
        {'w': tensor([0, 1, 2])}
    """
    wholes: dict[Any, torch.Tensor] = {}
    boxes: dict[Any, list[Box]] = {}
    layouts: dict[Any, Any] = {}
    directory = Path()
    for key, part, path in parts:
        directory = path.parent
        whole = wholes.get(key)
        if whole is None:
            whole = wholes[key] = torch.empty(part.shape, dtype=part.values.dtype)
        if tuple(whole.shape) != part.shape or whole.dtype != part.values.dtype:
            raise CheckpointError(
                f"{path} holds a part of {_said(key)} of shape {list(part.shape)} in {part.values.dtype}; another "
                f"rank's file says {list(whole.shape)} in {whole.dtype}. They are of two trainings."
            )
        if layouts.setdefault(key, part.layout) != part.layout:
            raise CheckpointError(
                f"{path} holds a part of {_said(key)} that is laid out as {part.layout}; another rank's file says "
                f"{layouts[key]}. They are of two trainings."
            )
        box = (part.start, tuple(part.values.shape))
        region = tuple(slice(a, a + n) for a, n in zip(*box, strict=True))
        if box in boxes.setdefault(key, []):  # a copy, of another rank or of a tied weight
            if not torch.equal(whole[region], part.values):
                raise CheckpointError(
                    f"{path} holds other numbers of {_said(key)} than another rank's file, or than a weight that is "
                    f"tied to it in the model (tie_word_embeddings)."
                )
            continue
        whole[region] = part.values
        boxes[key].append(box)
    lacking = [key for key, whole in wholes.items() if whole.ndim and not covers(whole.shape, boxes[key])]
    if lacking:
        raise CheckpointError(
            f"The ranks' files in {directory} do not hold each number of {listing([_said(key) for key in lacking])} "
            f"once: one of them lacks it, or is of another training."
        )
    return wholes


def _said(key: Any) -> str:
    return " of ".join(str(each) for each in reversed(key)) if isinstance(key, tuple) else str(key)


def _spec(leaf: Any) -> Any:
    return leaf._spec


def _mesh(leaf: Any) -> torch.Tensor:
    """The ranks of a DTensor's mesh; versions of torch before 2.9 saved them as an attribute."""
    saved = vars(_spec(leaf).mesh)
    return saved["mesh"] if "mesh" in saved else _spec(leaf).mesh.mesh  # the second may not be there


def _of_dtensor(leaf: Any, rank: int, name: Any, path: Path) -> Part:
    from torch.distributed.tensor import Replicate, Shard

    spec, mesh, local = _spec(leaf), _mesh(leaf), leaf._local_tensor
    place = (mesh == rank).nonzero().tolist()
    wrote = vars(spec.mesh).get("_coordinate_on_dim")  # of the rank that saved it
    if len(place) != 1 or (wrote is not None and [*wrote] != place[0]):
        raise CheckpointError(
            f"{path} holds the part of {name!r} at {[*wrote] if wrote else wrote} in a mesh of the ranks "
            f"{mesh.tolist()}: it is not rank {rank}'s file. Put every rank's file back under its own name."
        )
    shape = tuple(leaf.shape)
    start, size = [0] * len(shape), [*shape]
    for dim, (placement, coordinate) in enumerate(zip(spec.placements, place[0], strict=True)):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard or size[placement.dim] != shape[placement.dim]:
            raise CheckpointError(
                f"{path} holds {name!r} laid out by {list(spec.placements)}, which is not read; expected Shard on "
                f"different dimensions, and Replicate. Save the whole state, or with torch.distributed.checkpoint."
            )
        length = shape[placement.dim]
        piece = -(-length // mesh.shape[dim])
        start[placement.dim] = min(piece * coordinate, length)
        size[placement.dim] = min(piece, length - start[placement.dim])
    if [*local.shape] != size and (local.numel() or all(size)):
        raise CheckpointError(
            f"{path} holds {list(local.shape)} of {name!r}; rank {rank}'s part of {list(shape)} is {size}. The file is "
            f"damaged, or of another training."
        )
    layout = ("DTensor", tuple(map(str, spec.placements)), tuple(mesh.shape), vars(spec.mesh).get("_mesh_dim_names"))
    return Part(shape, tuple(start), local.detach().reshape(size), layout)


def _of_sharded(leaf: ShardedTensor, rank: int, name: Any, path: Path) -> Part | None:
    """Read a ShardedTensor's own note of where its shard begins."""
    try:
        shards, about, wrote = leaf.saved[0], leaf.saved[1].state, leaf.saved[2].state["global_rank"]
        if wrote != rank:
            raise CheckpointError(
                f"{path} holds {name!r} of rank {wrote}: it is not rank {rank}'s file. Put every rank's file back "
                f"under its own name."
            )
        shape = tuple(int(length) for length in about["size"])
        if not shards:
            return None
        (shard,) = shards
        saved = _slots(shard.state)
        where = _slots(saved["metadata"].state)
        start, size = (tuple(int(n) for n in where[key]) for key in ("shard_offsets", "shard_sizes"))
        part = Part(shape, start, saved["tensor"].detach(), ("ShardedTensor",))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} holds {name!r} as a ShardedTensor that is not one shard with its offsets: {error!r}."
        ) from error
    ends = [a + n for a, n in zip(start, size, strict=True)]
    if (
        tuple(part.values.shape) != size
        or len(start) != len(shape)
        or any(e > n for e, n in zip(ends, shape, strict=True))
    ):
        raise CheckpointError(
            f"{path} holds {list(part.values.shape)} of {name!r} and says that it is {list(size)} from {list(start)} "
            f"of {list(shape)}: the file is damaged."
        )
    return part


def _slots(state: Any) -> Mapping[str, Any]:
    """The attributes of a class with __slots__, as pickle saves them: (None, {…})."""
    return state[1] if isinstance(state, tuple) else state
