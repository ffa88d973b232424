"""A tree of which every rank holds its shards, and no rank holds more than what it gathers for a moment.

    leaf [l, *rest]  →  rank r has rows r⌈l/W⌉ … (r+1)⌈l/W⌉ − 1       torch.chunk's rule, which is FSDP2's

What is given may be shards already (`shard_tree`), `DTensor`s that are sharded so, or whole leaves. A `ShardedTree`
looks like the whole tree: names, shapes, dtypes and devices are its, and its values are NaN, of one number's memory, so
that whoever computes with them instead of gathering them does not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fkernel.distributed.exchange import all_sum, buckets, fetch_rows, gather_shards, shard_of
from fkernel.distributed.group import Group
from fkernel.errors import TreeError, listing
from fkernel.shapes import Tensor, Tree

Shapes = Mapping[str, Sequence[int]]


class ShardedTree(dict[str, Tensor]):
    """{name: leaf of the whole's shape, without values}, with this rank's shards.

    Attributes:
        group: the ranks.
        shards: {name: [l_r, *rest]}, this rank's; of constants too, which are not among the names.
        shapes: {name: the whole's shape}, of all of them.
    """

    def __init__(self, group: Group, shards: Tree, shapes: Shapes, constants: Iterable[str] = ()) -> None:
        """Take this rank's shards; `constants` are gathered like the others, and are no part of the tree."""
        self.group, self.shards = group, shards
        self.shapes = {name: tuple(shapes[name]) for name in shards}
        without = {*constants}
        super().__init__({name: self.like(name) for name in shards if name not in without})

    @property
    def own(self) -> Tree:
        """This rank's shards of the tree, constants apart."""
        return {name: self.shards[name] for name in self}

    def selected(self, names: Iterable[str]) -> ShardedTree:
        """Return the tree of some parameters, in their order; the others are constants."""
        names = [*names]
        others = [name for name in self.shards if name not in {*names}]
        shards = {name: self.shards[name] for name in (*names, *others)}
        return ShardedTree(self.group, shards, self.shapes, others)

    def replaced(self, shards: Tree) -> ShardedTree:
        """Return the tree with other shards in the place of some."""
        constants = [name for name in self.shards if name not in self]
        return ShardedTree(self.group, {**self.shards, **shards}, self.shapes, constants)

    def each_gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Gather one parameter after the other, sorted by name; of constants too."""
        for name in sorted(self.shards, key=repr):
            yield name, gather_tree(self.group, {name: self.shards[name]}, self.shapes)[name]

    def moved(self, delta: Tree) -> ShardedTree:
        """Return the tree θ + δ, constants as they are; δ is this rank's shards."""
        return self.replaced({name: shard + delta[name] for name, shard in self.own.items()})

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's shard of a leaf that is whole."""
        rows = whole if whole.ndim else whole[None]
        return rows[shard_of(len(rows), self.group.size, self.group.rank)]

    def summed(self, values: Tensor) -> Tensor:
        """Sum what each rank has of its shards, over all ranks."""
        return all_sum(self.group, [values])[0]

    def like(self, name: str) -> Tensor:
        """Make a leaf of a shape, dtype and device, of which each number is the same NaN in memory."""
        shard = self.shards[name]
        value = float("nan") if shard.is_floating_point() else 0
        return shard.new_full((), value).expand(self.shapes[name])

    def gathered(self, shards: Tree) -> Tree:
        """Gather some leaves whole, from this rank's shards of them."""
        return gather_tree(self.group, shards, {name: self.shapes[name] for name in shards})

    def fetched(self, name: str, shard: Tensor, rows: Tensor) -> Tensor:
        """Fetch some rows of a leaf, from this rank's shard of it; each rank asks for its own."""
        return fetch_rows(self.group, shard, self.shapes[name][0], rows)


def gather_tree(group: Group, shards: Tree, shapes: Shapes) -> Tree:
    """Gather leaves from their shards on all ranks, in buckets of one dtype; {name: [*shape]}."""
    kinds: dict[torch.dtype, dict[str, int]] = {}
    for name, shard in shards.items():
        kinds.setdefault(shard.dtype, {})[name] = torch.Size(shapes[name]).numel() * shard.element_size()
    whole: Tree = {}
    for sizes in kinds.values():
        for names in buckets(sizes):
            own = {name: shards[name] for name in names}
            whole |= gather_shards(group, own, {name: shapes[name] for name in names})
    return {name: whole[name] for name in shards}


def is_distributed(leaf: Any) -> bool:
    """Tell whether a leaf is a `DTensor`; the class is not imported, which takes seconds."""
    return hasattr(leaf, "placements") and hasattr(leaf, "to_local")


def local_tree(group: Group, given: Tree, shapes: Shapes, what: str) -> Tree:
    """Return this rank's shards of leaves that are shards already (as of a `DTensor`), or whole.

    Args:
        group: the ranks.
        given: {name: leaf}.
        shapes: {name: the whole's shape}.
        what: what a message calls the tree.

    Raises:
        TreeError: a leaf is neither whole nor this rank's shard of it.
    """
    return {name: _local(group, leaf, tuple(shapes[name]), f"{what}[{name!r}]") for name, leaf in given.items()}


def _local(group: Group, leaf: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    if is_distributed(leaf):
        leaf = _own_part(group, leaf.detach(), what)
    l, *rest = shape or (1,)
    rows = shard_of(l, group.size, group.rank)
    if tuple(leaf.shape) == shape:
        return leaf.detach().view(l, *rest)[rows] if not shape else leaf.detach()[rows]
    if tuple(leaf.shape) != (rows.stop - rows.start, *rest):
        raise TreeError(
            f"{what} has shape {list(leaf.shape)} on rank {group.rank} of {group.size}; expected the whole, "
            f"{list(shape)}, or rows {rows.start} to {rows.stop} of it, {[rows.stop - rows.start, *rest]}, as "
            f"fkernel.distributed.shard_tree and FSDP2's fully_shard deal them. Is it of another mesh?"
        )
    return leaf.detach()


def _own_part(group: Group, leaf: Any, what: str) -> Tensor:
    """Return the local tensor of a `DTensor` that is dealt over the group's ranks along its rows, or is on all."""
    where = leaf.device_mesh
    dealt = [d for d, place in enumerate(leaf.placements) if not place.is_replicate()]
    place = leaf.placements[dealt[0]] if dealt else None
    fits = place is None or (len(dealt) == 1 and type(place).__name__ == "Shard" and place.dim == 0)
    if fits and place is not None:
        own, size = where.get_local_rank(dealt[0]), where.size(dealt[0])
        fits = (own, size) == (group.rank, group.size)
    if not fits:
        raise TreeError(
            f"{what} is a DTensor with placements {listing([str(each) for each in leaf.placements])} on a mesh of "
            f"{list(where.shape)}; expected [Shard(dim=0)] over the {group.size} ranks of mesh=, or replicated. Give "
            f"the mesh that it is sharded over (mesh['shard'] of two dimensions), or leaf.redistribute(mesh, "
            f"[Shard(0)])."
        )
    return leaf.to_local()
