"""Sources of parameters for models that run a layer at a time: as they are, along a path, or from elsewhere.

    plain    θ                 half precision widened to float32
    moved    θ + s δ           computed on demand, for a table only the rows that are looked up

Where θ is a `ShardedTree`, both are made of this rank's shards and gathered from all ranks when they are asked for: all
ranks must then ask for the same names in the same order, for rows of a table each for its own.

Any other function of a name and, for tables, of rows can be a `Source` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from fkernel.distributed import ShardedTree
from fkernel.shapes import Tensor, Tree

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Source:
    """Gives parameters by name, in the dtype of the computation (float32 or float64).

    Attributes:
        leaf: (name, rows) -> the parameter, or some rows of it; None for all of them.
        gather: names -> the parameters, which are no longer there once they are let go; None where each call of `leaf`
            is cheap.
    """

    leaf: Callable[[str, slice | Tensor | None], Tensor]
    gather: Callable[[list[str]], Tree] | None = None

    def __call__(self, names: Iterable[str]) -> Tree:
        """Return the parameters of these names."""
        if self.gather is not None:
            return self.gather([*names])
        return {name: self.leaf(name, None) for name in names}

    def table(self, name: str) -> Callable[[slice | Tensor], Tensor]:
        """Return a table by its rows; one that is gathered is whole as long as what is returned is held."""
        if self.gather is None:
            return lambda rows: self.leaf(name, rows)
        return self.leaf(name, None).__getitem__

    def with_rows(self, ids: Mapping[str, Tensor]) -> Source:
        """Fetch rows of tables from the other ranks now, for lookups that no other rank takes part in."""
        if self.gather is None:
            return self
        wanted = {name: each.reshape(-1).unique() for name, each in ids.items()}
        there = {name: self.leaf(name, rows) for name, rows in wanted.items()}

        def leaf(name: str, rows: slice | Tensor | None) -> Tensor:
            if name not in there or not isinstance(rows, Tensor):
                return self.leaf(name, rows)
            place = torch.searchsorted(wanted[name], rows.reshape(-1)).clamp(max=max(0, len(wanted[name]) - 1))
            if not torch.equal(wanted[name][place], rows.reshape(-1)):
                raise IndexError(f"{name} is looked up in rows that the first pass over the sequences did not ask for")
            return there[name][place].view(*rows.shape, *there[name].shape[1:])

        return replace(self, leaf=leaf)


def is_half(params: Tree) -> bool:
    """Return whether any parameter is in half precision.

    Example:
        >>> is_half({"w": torch.ones(1, dtype=torch.bfloat16)})
        True
    """
    return any(getattr(leaf, "dtype", None) in HALF for leaf in params.values())


def widened(x: Tensor) -> Tensor:
    """Cast half precision to float32; return everything else unchanged.

    Example:
        >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in HALF else x


def computed_like(params: Tree) -> Tensor:
    """Return an empty tensor of the device and the dtype in which θ is computed with.

    Example:
        >>> computed_like({"scale": torch.tensor(2.0, dtype=torch.bfloat16)}).dtype
        torch.float32
    """
    return widened(next(iter(params.values())).new_empty(0))


def plain(params: Tree) -> Source:
    """Return a source of parameters as they are, half precision widened.

    Args:
        params: θ, {name: tensor}.

    Example:
        >>> plain({"w": torch.ones(2, dtype=torch.bfloat16)})(["w"])
        {'w': tensor([1., 1.])}
    """
    if isinstance(params, ShardedTree):
        return _gathering(params, lambda name: params.shards[name])
    return Source(lambda name, rows: widened(params[name] if rows is None else params[name][rows]))


def moved(params: Tree, direction: Tree, s: float) -> Source:
    """Return a source of θ + s δ, computed on demand.

    Args:
        params: θ.
        direction: δ; parameters without an entry are unchanged. This rank's shards, where θ is in shards.
        s: the scale.

    Example:
        >>> moved({"w": torch.ones(2)}, {"w": torch.ones(2)}, 0.5)(["w"])
        {'w': tensor([1.5000, 1.5000])}
    """
    if isinstance(params, ShardedTree):
        return _gathering(params, partial(_moved_shard, params, direction, s))

    def leaf(name: str, rows: slice | Tensor | None) -> Tensor:
        δ = direction.get(name)
        θ = params[name] if rows is None else params[name][rows]
        return widened(_moved(θ, δ if δ is None or rows is None else δ[rows], s))

    return Source(leaf)


class Together(NamedTuple):
    """Sources of several θ that share what they gather.

    Attributes:
        sources: all of them are asked for the same names before the next ones are.
        let_go: called between the two; frees what was gathered.
    """

    sources: list[Source]
    let_go: Callable[[], None]


def moved_together(params: ShardedTree, direction: Tree, scales: Sequence[float]) -> Together:
    """Return sources of θ + s δ for several s: θ and δ are gathered once for all of them.

    Args:
        params: θ.
        direction: δ, this rank's shards; parameters without an entry are unchanged.
        scales: the s.
    """
    here: dict[str, tuple[Tensor, Tensor | None]] = {}

    def gather(s: float, names: list[str]) -> Tree:
        wanted = [name for name in names if name not in here]
        θ = params.gathered({name: params.shards[name] for name in wanted})
        δ = params.gathered({name: direction[name] for name in wanted if name in direction})
        here.update({name: (θ.pop(name), δ.pop(name, None)) for name in wanted})
        return {name: _moved(*here[name], s) for name in names}

    shards = [partial(_moved_shard, params, direction, s) for s in scales]
    return Together(
        [_gathering(params, shard, partial(gather, s)) for shard, s in zip(shards, scales, strict=True)], here.clear
    )


def _moved_shard(params: ShardedTree, direction: Tree, s: float, name: str) -> Tensor:
    return _moved(params.shards[name], direction.get(name), s)


def _moved(θ: Tensor, δ: Tensor | None, s: float) -> Tensor:
    return θ if δ is None else widened(θ) + s * widened(δ).to(widened(θ))


def _gathering(
    params: ShardedTree, shard: Callable[[str], Tensor], gather: Callable[[list[str]], Tree] | None = None
) -> Source:
    """Make a source of what is gathered from the ranks' shards; `shard` makes this rank's when it is asked for."""

    def alone(names: list[str]) -> Tree:
        whole = params.gathered({name: shard(name) for name in names})
        return {name: whole.pop(name) for name in names}

    def whole(names: list[str]) -> Tree:
        found = (gather or alone)(names)
        return {name: widened(found.pop(name)) for name in names}

    def leaf(name: str, rows: slice | Tensor | None) -> Tensor:
        if isinstance(rows, Tensor):
            return widened(params.fetched(name, shard(name), rows))
        leaf = whole([name])[name]
        return leaf if rows is None else leaf[rows]

    return Source(leaf, whole)
