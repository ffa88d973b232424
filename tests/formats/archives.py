"""Packed runs: checkpoint/, as its writer left it, and truth.safetensors, as one .tar.xz."""

from __future__ import annotations

import tarfile
from pathlib import Path

WRITTEN = Path(__file__).parent / "written"


def pack(directory: Path, name: str) -> Path:
    """Pack a run; owners and times are left out, so that the same run packs to the same bytes."""
    archive = WRITTEN / f"{name}.tar.xz"
    with tarfile.open(archive, "w:xz", preset=9) as file:
        for item in sorted(directory.rglob("*")):
            if item.is_file():
                entry = file.gettarinfo(item, str(item.relative_to(directory)))
                entry.uid = entry.gid = entry.mtime = 0
                entry.uname = entry.gname = ""
                with item.open("rb") as data:
                    file.addfile(entry, data)
    return archive


def unpack(name: str, directory: Path) -> Path:
    """Unpack a run into a directory; it returns."""
    with tarfile.open(WRITTEN / f"{name}.tar.xz") as file:
        file.extractall(directory, filter="data")
    return directory


def names() -> list[str]:
    """List the packed runs."""
    return sorted(path.name.removesuffix(".tar.xz") for path in WRITTEN.glob("*.tar.xz"))
