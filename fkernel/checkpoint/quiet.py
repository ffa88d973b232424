"""What other libraries say to each other while they load: kept from whoever called us, who cannot mend it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = (
    "accelerate", "bitsandbytes", "huggingface_hub", "numpy", "peft", "safetensors", "sentencepiece", "tokenizers",
    "torch", "transformers",
)  # fmt: skip
"""Those that are called while a checkpoint is loaded."""
MESH = logging.getLogger("torch.distributed.device_mesh")
"""Warns that a tensor's mesh has no process group: one process reads what several wrote, and needs none."""
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Keep off what libraries say to each other: deprecations, progress bars, meshes without process groups.

    A warning whose cause is a line of ours, or of the caller's, is of another module and stays, and so does every
    warning of another kind. Usable as a decorator.

    Example:
        >>> with warnings.catch_warnings(record=True) as seen, libraries_quiet():
        ...     warnings.warn_explicit("old name", FutureWarning, "model.py", 1, module="transformers.modeling_utils")
        ...     warnings.warn_explicit("old call", FutureWarning, "mine.py", 1, module="mine")
        >>> [str(one.message) for one in seen]
        ['old call']
    """
    from transformers.utils import logging as bars_of

    bars, disabled = bars_of.is_progress_bar_enabled(), MESH.disabled
    bars_of.disable_progress_bar()
    MESH.disabled = True
    try:
        with warnings.catch_warnings():
            for kind in DEPRECATIONS:
                warnings.filterwarnings("ignore", category=kind, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
            yield
    finally:
        MESH.disabled = disabled
        if bars:
            bars_of.enable_progress_bar()
