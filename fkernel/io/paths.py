"""The cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_root() -> Path:
    """``$FKERNEL_CACHE`` if it is set and not empty, else ``~/.cache/fkernel``."""
    chosen = os.environ.get("FKERNEL_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fkernel"
