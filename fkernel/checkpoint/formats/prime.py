"""prime-rl's `step_N/`: its trainer's state is one distributed checkpoint, in `step_N/trainer/`.

    step_N/trainer/.metadata, *.distcp     {"app": {"model", "optimizers", "scheduler", "progress"}}

`fkernel.checkpoint.contents` knows what is inside; with full optimizer offload each parameter's state has its float32
master, "prime_rl_master_weight".

Source: github.com/PrimeIntellect-ai/prime-rl at 559b447, `src/prime_rl/trainer/ckpt.py` (CheckpointManager).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel.checkpoint.distributed import METADATA
from fkernel.checkpoint.formats import plain
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout


def find(root: Path) -> Layout | None:
    """Tell a step of prime-rl's by its folder trainer/; None where it has none. trainer/ itself needs no telling.

    Args:
        root: step_N/.
    """
    trainer = root / "trainer"
    return Layout("distributed", trainer) if (trainer / METADATA).is_file() else None


def read(layout: Layout, model: Any, optimizer: bool = True) -> Saved:
    """Read the distributed checkpoint.

    Arguments and errors as in `fkernel.checkpoint.formats.read`.
    """
    return plain.read(layout, optimizer)
