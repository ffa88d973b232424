"""A Hugging Face causal language model from a directory, ready to be differentiated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fkernel.errors import ModelError


def load_model(path: str | Path) -> Any:
    """Load what `save_pretrained` wrote, in float32, with eager attention, in eval mode, offline.

    Args:
        path: a directory with `config.json` and safetensors weights.

    Returns:
        A transformers causal language model.

    Raises:
        ModelError: no such directory, or no model in it.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        found = sorted(item.name for item in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise ModelError(f"{directory} holds no config.json ({found}); expected a directory of save_pretrained().")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval()
