"""Gradient handles on disk, computed once, in shards of a group of sequences each.

    manifest.json              identity of the gradients (`fkernel.engine.store.manifest`); written once
    shards.jsonl               which shards are complete, with their checksums (`fkernel.engine.store.journal`)
    shard-00000.safetensors …  the handles of one group each (`fkernel.engine.store.shards`)
    lock                       held by the one process that writes to the store, or by those that read it

A shard is written to a temporary file, flushed to disk, renamed and only then recorded, so an interrupted program
leaves it complete or absent. Its checksum is verified before its first read: SHA-256 costs about as much as reading
the file from disk, and detects flipped bits and shards whose files were swapped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fkernel.engine.store import journal
from fkernel.engine.store.journal import Journal, Record
from fkernel.engine.store.manifest import SCHEMA, describe, differences
from fkernel.engine.store.shards import Layout, layout, pack, unpack
from fkernel.errors import StoreError, listing
from fkernel.func.handles import Handle, Handles, count
from fkernel.io import (
    NO_ROOM,
    atomic_write,
    checksum,
    is_temporary,
    locked,
    make_directory,
    parse_json,
    plain_errors,
    sweep,
)

MANIFEST, LOCK = "manifest.json", "lock"
COARSE = 2 * 10**9
"""Nanoseconds between two times that any file system tells apart: FAT's and some network's clocks tick every 2 s."""
_BEGIN_ANEW = "choose another directory, or delete this one to begin anew"


class _Verified(NamedTuple):
    """A version of a shard's file whose checksum was right, and its header."""

    state: tuple[int, ...]
    layout: Layout


class Store:
    """Shards of gradient handles in one directory; made by `open_store`, and usable only within its context.

    Attributes:
        directory: its path.
        groups: [first row, row after the last] of each shard.
    """

    def __init__(self, directory: Path, groups: list[list[int]]) -> None:
        """Read the journal; `open_store` has checked the manifest."""
        self.directory, self.groups = directory, groups
        self._journal = Journal(directory, groups)
        self._verified: dict[int, _Verified] = {}
        self._open = True

    def clean(self) -> None:
        """Remove what a killed writer left: temporary files, and a partial line of the journal."""
        sweep(self.directory)
        self._journal.cut()

    def close(self) -> None:
        """Refuse further reads and writes; handles that were read stay valid."""
        self._open = False

    @property
    def complete(self) -> bool:
        """Whether every shard is complete."""
        return len(self._journal) == len(self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the complete shards."""
        return sum(record.bytes for record in self._journal)

    def has(self, i: int) -> bool:
        """Return whether shard i is complete.

        Args:
            i: its position among the groups.
        """
        return self._journal.get(self._checked(i)) is not None

    def write(self, i: int, handles: Handles) -> None:
        """Write shard i atomically.

        Args:
            i: its position among the groups.
            handles: {name: handle} of that group's rows.

        Raises:
            StoreError: the shard exists already, the handles have another number of rows or a dtype that cannot be
                stored, or the disk is full or not writable.
        """
        if self.has(i):
            raise StoreError(f"Shard {i} of {str(self.directory)!r} is complete already, and is never written twice.")
        start, stop = self.groups[i]
        for name, handle in handles.items():
            if (n := count(handle)) != stop - start:
                raise StoreError(
                    f"Shard {i} is of rows {start} to {stop - 1}, {stop - start} sequences; {name!r} has gradients of "
                    f"{n}."
                )
        packed, path = pack(handles), self._path(i)
        with self._room(i, packed.nbytes):
            self._journal.cut()
            sha256 = atomic_write(path, packed.chunks())
            self._journal.add(Record(i, [start, stop], path.name, packed.nbytes, sha256))
            self._verified[i] = _Verified(_state(path), layout(path))

    def read(self, i: int, names: Collection[str] | None = None) -> dict[str, Handle]:
        """Read shard i, after verifying its checksum unless that was done and the file is unchanged.

        Args:
            i: its position among the groups.
            names: of the parameters to read; None for all.

        Returns:
            {name: handle} as written, with the same kinds, dtypes, layouts and sharing, on the CPU. Changing a tensor
            in place changes no file.

        Raises:
            StoreError: the shard was never written, or its file is missing or not what was written.
        """
        record, path = self._journal.get(self._checked(i)), self._path(i)
        if record is None:
            raise StoreError(f"Shard {i} of {str(self.directory)!r} is not there; compute it and write it first.")
        try:
            state = _state(path)
            known = self._verified.get(i)
            if known is None or known.state != state:
                self._verify(record, path)
                known = _Verified(state, layout(path))
                if time.time_ns() - state[2] > COARSE:  # else a change within the tick of a coarse clock would not show
                    self._verified[i] = known
            return unpack(path, known.layout, names)
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise self._damaged(i, "is missing") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(i, f"cannot be read ({error})") from error

    def _verify(self, record: Record, path: Path) -> None:
        size = path.stat().st_size
        if size != record.bytes:
            raise self._damaged(record.index, f"has {size} bytes, {record.bytes} were written")
        sha256 = checksum(path)
        if sha256 != record.sha256:
            holds = next((f"shard {other.index}" for other in self._journal if other.sha256 == sha256), "other bytes")
            raise self._damaged(
                record.index, f"holds {holds} (SHA-256 {sha256[:12]}…, {record.sha256[:12]}… was written)"
            )

    def _damaged(self, i: int, what: str) -> StoreError:
        return StoreError(
            f"Shard {i}, {str(self._path(i))!r}, {what}, so its gradients are not served. Put the file back from a "
            f"copy, or delete line {self._journal.line_of(i)} of {journal.NAME} beside it to have this shard computed "
            f"again, or delete the directory to have all of them."
        )

    def _checked(self, i: int) -> int:
        if not self._open:
            raise StoreError(f"The store {str(self.directory)!r} is closed; use it inside of `with open_store(...)`.")
        if not 0 <= i < len(self.groups):
            raise IndexError(f"There is no shard {i} in a store of {len(self.groups)}.")
        return i

    def _path(self, i: int) -> Path:
        return self.directory / journal.file_name(i)

    @contextmanager
    def _room(self, i: int, needed: int) -> Iterator[None]:
        """Check for free space before writing; raise StoreError with the bytes needed if it runs out."""
        with plain_errors("write to", self.directory):
            try:
                if shutil.disk_usage(self.directory).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                yield
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                free, why = shutil.disk_usage(self.directory).free, os.strerror(error.errno or errno.ENOSPC)
                raise StoreError(
                    f"No room for shard {i} in {str(self.directory)!r}: it needs {needed} bytes and {free} are free "
                    f"({why}). Make room, or lift the quota or the limit on file sizes where there is one. What is "
                    f"complete, {len(self._journal)} of {len(self.groups)} shards, is kept, and another run goes on "
                    f"from there."
                ) from error


@contextmanager
def open_store(directory: Path | str, identity: Mapping[str, Any], groups: Sequence[slice]) -> Iterator[Store]:
    """Create or reopen a store of gradient handles, locked against other processes.

    Args:
        directory: its path; created if missing.
        identity: {field: JSON value}, everything that the gradients depend on: fingerprints of parameters and batch
            (`fkernel.io.fingerprint`), which parameters, which dtype. A store with another identity is refused.
        groups: the rows of each shard, contiguous from 0.

    Raises:
        StoreError: another process has it open; it has another identity, other groups or another layout; it is
            damaged; the directory holds other files or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> directory = tempfile.TemporaryDirectory()
        >>> with open_store(directory.name, {"seed": 0}, [slice(0, 2), slice(2, 3)]) as store:
        ...     store.write(0, {"w": torch.ones(2, 4)})
        >>> with open_store(directory.name, {"seed": 0}, [slice(0, 2), slice(2, 3)]) as store:
        ...     store.has(0), store.has(1), store.read(0)["w"].shape
        (True, False, torch.Size([2, 4]))
        >>> directory.cleanup()
    """
    directory, wanted = Path(directory), describe(identity, groups)
    with plain_errors("open", directory):
        make_directory(directory)
        _refuse_strangers(directory)
    with locked(directory, LOCK):
        with plain_errors("open", directory):
            if (directory / MANIFEST).exists():
                _compare(directory / MANIFEST, wanted)
            else:
                atomic_write(directory / MANIFEST, [json.dumps(wanted, indent=1).encode() + b"\n"])
            store = Store(directory, wanted["groups"])
            store.clean()
        try:
            yield store
        finally:
            store.close()


@contextmanager
def read_store(directory: Path | str, identity: Mapping[str, Any], groups: Sequence[slice]) -> Iterator[Store]:
    """Open a store that is there beside others who read it, also where it cannot be written to.

    Args:
        directory: its path.
        identity: as of `open_store`.
        groups: as of `open_store`.

    Raises:
        StoreError: there is none, a process writes to it, or as `open_store`.
    """
    directory, wanted = Path(directory), describe(identity, groups)
    with locked(directory, LOCK, shared=True):
        with plain_errors("open", directory):
            _compare(directory / MANIFEST, wanted)
            store = Store(directory, wanted["groups"])
        try:
            yield store
        finally:
            store.close()


def _refuse_strangers(directory: Path) -> None:
    """Raise StoreError where a directory without a manifest holds other files."""
    strangers = sorted(path.name for path in directory.iterdir() if path.name != LOCK and not is_temporary(path.name))
    # Checked after the listing: another process that creates the store writes the manifest before all other files.
    if strangers and not (directory / MANIFEST).exists():
        raise StoreError(
            f"{str(directory)!r} is no store, for it has no {MANIFEST}, and it is not empty: it holds "
            f"{listing(strangers)}. Nothing was touched; {_BEGIN_ANEW}."
        )


def _compare(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse a store with another manifest."""
    try:
        stored = parse_json(path.read_bytes())
        schema = stored["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{str(path)!r} is damaged ({error}); {_BEGIN_ANEW}.") from error
    if schema != SCHEMA:
        raise StoreError(
            f"The store {str(path.parent)!r} has layout {schema!r}, and this version of fkernel reads layout {SCHEMA}; "
            f"open it with the version that made it, or {_BEGIN_ANEW}."
        )
    if differ := differences(stored, wanted):
        lines = "".join(f"\n  {line}" for line in differ)
        raise StoreError(
            f"The store {str(path.parent)!r} is of something else, and is left as it is:{lines}\n"
            f"{_BEGIN_ANEW.capitalize()}."
        )


def _state(path: Path) -> tuple[int, ...]:
    """Return what identifies a file's version."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
