"""A side's gradients on disk: read where they are there, computed and written where they are not.

An inner product is a sum over parameters, so no more of a gradient need be in memory than a share of them: they are
read a few parameters at a time. What is written is written beside the next microbatch's pass, by a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fkernel import func
from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import Gradients, Read, computed
from fkernel.engine.store import Store, open_store
from fkernel.errors import StoreError
from fkernel.func.handles import Handles, nbytes
from fkernel.func.inputs import name_of
from fkernel.io import fingerprint
from fkernel.shapes import Tree

TOLERANCE = 1e-3
"""Relative change of ⟨g, g⟩ beyond which a stored gradient is another function's; rounding stays far below."""


@contextmanager
def kernel_from_store(
    directory: Path | str, params: Tree, side: SortedBatch, cuts: Sequence[slice]
) -> Iterator[Gradients]:
    """Give a side's gradients from its store: what it does not hold yet is computed and written first.

    A store is known by the contents of θ and of the batch, by f's name and by its microbatches, and lives in a folder
    that is named after them: stores of other checkpoints and of other batches lie beside it. What f computes cannot be
    fingerprinted, so the first microbatch of a store that is not new is computed again and held against what is stored.

    Raises:
        StoreError: see `open_store`; or the stored gradients are not this f's.
    """
    identity = {"parameters": fingerprint(params), "batch": fingerprint(side.batch), "f": name_of(side.f)}
    known_by = fingerprint({**identity, "cuts": [rows.stop for rows in cuts]})
    folder = Path(directory) / f"{side.name}-{known_by[:12]}"
    pieces = computed(side, ((1.0, params),), cuts).read
    with open_store(folder, identity, list(cuts)) as store:
        if store.has(0):
            _compare(pieces(0), store.read(0), folder)
        complete(store, pieces)
        shares = [*_shares({name: nbytes({name: handle}) for name, handle in store.read(0).items()})]
        yield Gradients(side, cuts, store.read, shares=shares)


def complete(store: Store, pieces: Read, on_progress: Callable[[int], Any] = lambda n: None) -> int:
    """Compute and write what is missing; a microbatch is written while the next one is computed.

    Args:
        store: an open one.
        pieces: i ↦ the gradients of microbatch i.
        on_progress: called with the number of sequences of every microbatch that is computed.

    Returns:
        How many sequences' gradients were computed.
    """
    writing: Future[None] | None = None
    missing = [i for i in range(len(store.groups)) if not store.has(i)]
    with ThreadPoolExecutor(1) as writer:
        for i in missing:
            handles = pieces(i)
            if writing is not None:
                writing.result()
            writing = writer.submit(store.write, i, handles)
            del handles  # the writer's alone, or two would be alive beside the pass
            on_progress(store.groups[i][1] - store.groups[i][0])
        if writing is not None:
            writing.result()
    return sum(store.groups[i][1] - store.groups[i][0] for i in missing)


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
