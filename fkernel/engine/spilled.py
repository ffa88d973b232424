"""K with the gradients of both sides on disk: each is computed once, and multiplied out a few parameters at a time.

    for block in U:  for tile in E:
        for names in shares:  K[tile, block] += contract(J_E[tile, names], J_U[block, names])

An inner product is a sum over parameters, so no more of a gradient need be in memory than a share of them; with one
tile and one block, which is the usual case, every gradient is multiplied out once. What is written is written beside
the next microbatch's pass, by a thread of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from fkernel import func
from fkernel.engine.planning import Strategy
from fkernel.engine.sides import Ordered, blocks, cuts_of, gathered, rows_under
from fkernel.engine.stored import stored
from fkernel.func.handles import Handles, nbytes, stack_handles
from fkernel.precond import Diagonal, Preconditioner
from fkernel.shapes import Tensor, Tree


def spilled(
    strategy: Strategy,
    params: Tree,
    E: Ordered,
    U: Ordered,
    precond: Preconditioner,
    directory: Path | str,
) -> Tensor:
    """Compute K by way of a store; [n_E, n_U], in the sides' own orders, float64.

    Args:
        strategy: how many tokens of each side are contracted at a time, and how many are under way in a pass.
        params: θ.
        E: one side.
        U: the other; E itself where they are one and P is a diagonal.
        precond: P.
        directory: where the store is.

    Raises:
        StoreError, NonFiniteError: see `fkernel.engine.store`; a gradient is not finite.
    """
    tile, block = (strategy.tile, strategy.block)[:: 1 if strategy.held == "E" else -1]
    cuts_E, cuts_U = cuts_of(E, strategy.tokens), cuts_of(U, strategy.tokens)
    D = precond.d if isinstance(precond, Diagonal) else None
    K = torch.zeros(len(E), len(U), dtype=torch.float64, device=next(iter(params.values())).device)
    with ExitStack() as opened:
        x = opened.enter_context(stored(directory, params, E, cuts_E))
        y = x if U is E else opened.enter_context(stored(directory, params, U, cuts_U))
        rows_of_U = None if isinstance(precond, Diagonal) else rows_under(precond, y.read, params, U, cuts_U)
        shares = [*_shares({name: nbytes({name: handle}) for name, handle in x.read(0).items()})]
        for own in blocks(U, cuts_U, block):
            columns, dense = _rows(own, cuts_U), None if rows_of_U is None else gathered(rows_of_U, own)
            for others in blocks(E, cuts_E, tile):
                rows = _rows(others, cuts_E)
                for names in shares:
                    left = stack_handles(x.read(i, names) for i in others)
                    if dense is not None:
                        right: Handles = {name: dense[name] for name in names}
                    elif x is y and rows == columns:
                        right = left
                    else:
                        right = stack_handles(y.read(i, names) for i in own)
                    part = None if D is None else {name: D[name] for name in names}
                    K[rows, columns] += func.contract(left, right, diagonal=part)
                    del left, right  # or they would be alive while the next are read
    return K


def _rows(block: list[int], cuts: list[slice]) -> slice:
    return slice(cuts[block[0]].start, cuts[block[-1]].stop)


def _shares(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group successive parameters so that no group takes more than the largest one of them takes alone."""
    most, share, held = max(sizes.values()), list[str](), 0
    for name, size in sizes.items():
        if share and held + size > most:
            yield share
            share, held = [], 0
        share.append(name)
        held += size
    yield share
