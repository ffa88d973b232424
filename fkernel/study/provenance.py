"""Where a result was computed: versions, machine, revision."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fkernel", "torch", "transformers", "tokenizers", "numpy", "safetensors", "peft", "trl", "reasoning-gym")


def environment() -> dict[str, Any]:
    """What is needed to reproduce a result."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "git": revision(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def revision(directory: Path | None = None) -> str | None:
    """The git revision of a directory, with "+" for uncommitted changes; None outside a repository."""
    where = Path(__file__).parent if directory is None else directory
    try:
        head = _git(where, "rev-parse", "HEAD")
        return head + ("+" if _git(where, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
