"""A side's gradients, read from disk where they are there, computed and written where they are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fkernel import func
from fkernel.errors import StoreError
from fkernel.func.handles import Handles
from fkernel.func.objective import Function, name_of
from fkernel.kernel.sides import Ordered, Pieces
from fkernel.kernel.store import open_store
from fkernel.kernel.store.fingerprint import fingerprint
from fkernel.shapes import Tree

TOLERANCE = 1e-3
"""Relative change of ⟨g, g⟩ beyond which a stored gradient is another function's; rounding stays far below."""


@contextmanager
def stored(
    directory: Path | str, f: Function, params: Tree, side: Ordered, cuts: Sequence[slice], pieces: Pieces
) -> Iterator[Pieces]:
    """Put a store between a side's microbatches and whoever asks for them.

    The store is known by the contents of θ and of the batch and by f's name. What f computes cannot be fingerprinted,
    so the first microbatch of a store that is not new is computed again and held against what is stored.

    Raises:
        StoreError: see `open_store`; or the stored gradients are not this f's.
    """
    identity = {"parameters": fingerprint(params), "batch": fingerprint(side.batch), "f": name_of(f)}
    with open_store(Path(directory) / side.name, identity, list(cuts)) as store:
        if store.has(0):
            _compare(pieces(0), store.read(0), Path(directory) / side.name)

        def piece(i: int) -> Handles:
            if not store.has(i):
                store.write(i, pieces(i))
            return store.read(i)

        yield piece


def _compare(computed: Handles, read: Handles, directory: Path) -> None:
    own, both, kept = (func.contract(x, y).diagonal() for x, y in ((computed,) * 2, (computed, read), (read,) * 2))
    scale = own.abs().clamp_min(1e-30)
    worst = float(max(((both - own).abs() / scale).max(), ((kept - own).abs() / scale).max()))
    if worst > TOLERANCE:
        raise StoreError(
            f"The store {str(directory)!r} holds gradients of this θ and this batch, but of another function: ⟨g, g⟩ "
            f"differs by {worst:.1%} (another temperature, another model code?). Choose another directory, or delete "
            f"this one."
        )
