"""Temporary names of processes that are gone, and what lies about in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from fkernel.io import is_temporary
from fkernel.io.temporary import temporary_beside

NOBODY = 4194304
"""Linux gives no process a higher number than one less."""


def dead_beside(path: Path, old: bool = False) -> Path:
    """A temporary name beside `path`, of a process of this machine that does not exist."""
    name = temporary_beside(path, old)
    return name.with_name(name.name.replace(f"-{os.getpid()}-", f"-{NOBODY}-"))


def temporaries(root: Path) -> list[str]:
    """Temporary files and folders anywhere below a directory."""
    return sorted(str(each.relative_to(root)) for each in root.rglob("*") if is_temporary(each.name))
