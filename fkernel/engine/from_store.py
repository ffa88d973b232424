"""Per-sequence gradients on disk: read where present, computed and written where missing.

An inner product is a sum over parameters, so gradients are read a few parameters at a time. A thread writes each
microbatch while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fkernel import func
from fkernel.boundary import public
from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import Gradients, Read, computed
from fkernel.engine.store import Store, open_store
from fkernel.errors import StoreError
from fkernel.func.handles import Handles, nbytes
from fkernel.func.inputs import name_of
from fkernel.io import fingerprint
from fkernel.shapes import Tree

TOLERANCE = 1e-3
"""Relative difference of ⟨g, g⟩ above which a stored gradient must be of another function; rounding is far below."""


@contextmanager
def kernel_from_store(
    directory: Path | str, params: Tree, side: SortedBatch, cuts: Sequence[slice]
) -> Iterator[Gradients]:
    """Open a batch's gradients from its store; missing microbatches are computed and written first.

    A store is identified by the contents of θ and of the batch, by f's name and by its microbatches, and its folder is
    named by their fingerprint. What f computes cannot be fingerprinted, so the first microbatch of an existing store is
    computed again and compared with what is stored.

    Raises:
        StoreError: see `open_store`; or the stored gradients are of another f.
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


@public
def complete(store: Store, pieces: Read, on_progress: Callable[[int], Any] = lambda n: None) -> int:
    """Compute and write the missing microbatches, each written while the next one is computed.

    Args:
        store: an open store.
        pieces: i ↦ the gradients of microbatch i.
        on_progress: called after every computed microbatch with its number of sequences.

    Returns:
        The number of sequences whose gradients were computed.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as place, open_store(f"{place}/store", {"f": "f"}, [slice(0, 2)]) as store:
        ...     complete(store, lambda i: {"w": torch.ones(2, 3)})
        2
    """
    writing: Future[None] | None = None
    missing = [i for i in range(len(store.groups)) if not store.has(i)]
    with ThreadPoolExecutor(1) as writer:
        for i in missing:
            handles = pieces(i)
            if writing is not None:
                writing.result()
            writing = writer.submit(store.write, i, handles)
            del handles  # only the writer keeps them: one microbatch in memory beside the pass
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
    """Group successive parameters so that no group is larger than the largest parameter."""
    most, share, held = max(sizes.values()), list[str](), 0
    for name, size in sizes.items():
        if share and held + size > most:
            yield share
            share, held = [], 0
        share.append(name)
        held += size
    yield share
