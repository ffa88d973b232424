"""The complete shards of a store: one line each, appended once the shard is flushed to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fkernel.errors import StoreError
from fkernel.io import append_line, cut_to, parse_json

NAME = "shards.jsonl"


@dataclass(frozen=True)
class Record:
    """A complete shard.

    Attributes:
        index: its position among the groups.
        rows: [first row, row after the last].
        file: its file's name.
        bytes: its file's size.
        sha256: its file's checksum.
    """

    index: int
    rows: list[int]
    file: str
    bytes: int
    sha256: str


class Journal:
    """The records of a store, in the order in which they were written.

    Only whole lines count. A partial line after a crash or a full disk is truncated before another one is appended.
    """

    def __init__(self, directory: Path, groups: list[list[int]]) -> None:
        """Read the records of a store with these groups; nothing is changed."""
        self._path = directory / NAME
        self._records: dict[int, Record] = {}
        self._end = 0
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is None and number == len(lines):
                break
            if record is None or not _fits(record, groups) or record.index in self._records:
                raise StoreError(
                    f"Line {number} of {str(self._path)!r} is damaged; delete it to have its shard computed again, or "
                    f"the whole directory to begin anew."
                )
            self._records[record.index] = record
            self._end += len(line)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def get(self, i: int) -> Record | None:
        """Return the record of shard i, None where it is not complete."""
        return self._records.get(i)

    def line_of(self, i: int) -> int:
        """Return the line number of a complete shard, from 1."""
        return list(self._records).index(i) + 1

    def add(self, record: Record) -> None:
        """Record a shard that is flushed to disk."""
        self.cut()
        line = json.dumps(asdict(record)).encode() + b"\n"
        append_line(self._path, line)
        self._records[record.index] = record
        self._end += len(line)

    def cut(self) -> None:
        """Truncate after the last record: a partial line, or a whole one whose writing was interrupted."""
        cut_to(self._path, self._end)


def file_name(i: int) -> str:
    """Return the file name of shard i.

    Example:
        >>> file_name(3)
        'shard-00003.safetensors'
    """
    return f"shard-{i:05d}.safetensors"


def _parsed(line: bytes) -> Record | None:
    try:
        return Record(**parse_json(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


def _fits(record: Record, groups: list[list[int]]) -> bool:
    i = record.index
    return i in range(len(groups)) and record.rows == groups[i] and record.file == file_name(i)
