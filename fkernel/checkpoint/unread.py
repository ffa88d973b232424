"""Optimizer files that lie in or beside a checkpoint and that no layout reads: never passed over in silence."""

from __future__ import annotations

import re
from pathlib import Path

from fkernel.checkpoint.layout import Layout

NAMED = re.compile(r"(^|[_.-])(optim(izers?|s)?|opt_states?)([_.-]|\d|$)", re.IGNORECASE)
FOLDER = re.compile(r"(optim(izers?)?|opt(im(izer)?)?_states?)([_-]?\d+)?", re.IGNORECASE)
"""Of a folder that holds nothing else; another one that has the word in its name may be of runs."""
KINDS = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".distcp", ".tar"}
DEEPSPEED = re.compile(r"^global_step\d+$")


def unread_optimizers(path: str | Path) -> list[Path]:
    """List what looks like an optimizer's state in a checkpoint's directory, in its step's folder, and beside it.

    Checkpoints inside (checkpoint-200/) are of other steps, and are not looked into.

    Args:
        path: a checkpoint's directory or file.
    """
    root = Path(path).absolute()
    inside = _items(root)
    steps = [item for folder in inside if DEEPSPEED.match(folder.name) for item in _items(folder)]
    found = [item for item in (*inside, *_items(root.parent), *steps) if item != root and _is_optimizer(item)]
    # DeepSpeed without ZeRO keeps the optimizer's state in the file of the model's.
    return found + [item for item in steps if item.name.endswith("model_states.pt")]


def _items(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir()) if place.is_dir() else []
    except OSError:  # a folder above that may not be listed
        return []


def _is_optimizer(item: Path) -> bool:
    """Whether a file, or a folder of such files, is named like an optimizer's state; a folder of runs is not."""
    if not NAMED.search(item.name):
        return False
    if not item.is_dir():
        return item.suffix in KINDS
    return FOLDER.fullmatch(item.name) is not None and any(
        file.suffix in KINDS or file.name == ".metadata" or NAMED.search(file.name) for file in _items(item)
    )


def has_no_optimizer(layout: Layout, path: str | Path) -> bool:
    """Whether no optimizer's state lies in or beside a checkpoint; False where only reading its files tells.

    Args:
        layout: of the checkpoint.
        path: of the checkpoint.
    """
    apart = layout.kind in ("huggingface", "adapter", "nested", "accelerate")
    return apart and layout.optimizer is None and not unread_optimizers(path)
