"""Files of lines that grow: a line is added whole, and a partial last line, of a crash, is cut off."""

from __future__ import annotations

import os
from pathlib import Path

from fkernel.io.atomic import flush_to_disk


def append_line(path: Path, line: bytes, durable: bool = True) -> None:
    r"""Add bytes to the end of a file, which is made where it is missing; `durable` flushes them to disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     append_line(Path(directory) / "log", b"one\n")
        ...     append_line(Path(directory) / "log", b"two\n")
        ...     (Path(directory) / "log").read_bytes()
        b'one\ntwo\n'
    """
    new = not path.exists()
    file, rest = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), memoryview(line)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)
    if durable:
        flush_to_disk(path)
    if durable and new:
        flush_to_disk(path.parent)


def cut_to(path: Path, size: int) -> None:
    """Cut a file off after so many bytes, where it is longer, and flush it to disk."""
    if path.exists() and path.stat().st_size != size:
        os.truncate(path, size)
        flush_to_disk(path)


def cut_partial_line(path: Path) -> None:
    r"""Cut off a last line that has no end.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     append_line(Path(directory) / "log", b"one\ntw")
        ...     cut_partial_line(Path(directory) / "log")
        ...     (Path(directory) / "log").read_bytes()
        b'one\n'
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                cut_to(path, start + found + 1)
                return
            end = start
    if size:
        cut_to(path, 0)
