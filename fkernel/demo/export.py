"""Write the demo's checkpoints, prompt files and the last step's batch."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from fkernel import checkpoint
from fkernel.rollout import GeneratedBatch, SampleGenerator, TablePrompts, save_batch


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; NaN and infinity are errors."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_prompts(directory: Path, prompts: Mapping[str, TablePrompts]) -> None:
    """Write ``<split>.jsonl``, one problem per line, as `fkernel.rollout.jsonl` reads them."""
    for split, source in prompts.items():
        lines = (json.dumps({"question": prompt.question, "answer": prompt.answer}) for prompt in source)
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(directory: Path, policy: SampleGenerator) -> None:
    """Write a model and its tokenizer in Hugging Face's format."""
    with _without_transformers_bars():
        policy.model.save_pretrained(directory)
        policy.tokenizer.save_pretrained(directory)


def write_before_step(
    directory: Path, policy: SampleGenerator, optimizer: torch.optim.Optimizer, update: GeneratedBatch
) -> None:
    """Write ``model/``, ``optimizer.pt`` and ``update/``: the inputs of the next step.

    Args:
        directory: an existing one.
        policy: the policy before the step.
        optimizer: its optimizer before the step.
        update: the step's batch; it is saved with the checkpoint's fingerprint.
    """
    write_model(directory / "model", policy)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    fingerprint = checkpoint.load(directory).provenance.fingerprint
    save_batch(replace(update, checkpoint=fingerprint), directory / "update")


@contextmanager
def _without_transformers_bars() -> Iterator[None]:
    """Disable transformers' progress bars in the block."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
