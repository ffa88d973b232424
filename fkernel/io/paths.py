"""The cache directory, and files that an index names."""

from __future__ import annotations

import os
from pathlib import Path, PurePath


def default_cache_root() -> Path:
    """``$FKERNEL_CACHE`` if it is set and not empty, else ``~/.cache/fkernel``."""
    chosen = os.environ.get("FKERNEL_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fkernel"


def inside(directory: Path, name: object) -> Path:
    """Give the path of a file that an index names, which lies in the index's directory.

    Raises:
        ValueError: it does not.

    Example:
        >>> inside(Path("run"), "../other.safetensors")
        Traceback (most recent call last):
        ValueError: it names '../other.safetensors', which is not in its directory
    """
    parts = PurePath(name).parts if isinstance(name, str) else ()
    long = any(len(part.encode(errors="replace")) > 255 for part in parts)
    if not isinstance(name, str) or not parts or long or ".." in parts or "\0" in name or PurePath(name).is_absolute():
        shown = repr(name) if len(str(name)) < 200 else f"{str(name)[:60]!r}…"
        raise ValueError(f"it names {shown}, which is not in its directory")
    return directory / name
