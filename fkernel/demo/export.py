"""What the demo writes for the study: checkpoints, problems as prompt files, the last step's batch."""

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
    """Write a JSON file; NaN and infinity are errors, since JSON has no such numbers."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_prompts(directory: Path, prompts: Mapping[str, TablePrompts]) -> None:
    """Write ``<split>.jsonl``, one problem a line, as `fkernel.rollout.jsonl` reads them."""
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
    """Write ``model/``, ``optimizer.pt`` and ``update/``: all that the coming step is made of.

    Args:
        directory: where; exists.
        policy: the policy before the step.
        optimizer: its optimizer before the step.
        update: the step's batch; it is saved as one of the checkpoint that stands beside it.
    """
    write_model(directory / "model", policy)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    fingerprint = checkpoint.load(directory).provenance.fingerprint
    save_batch(replace(update, checkpoint=fingerprint), directory / "update")


@contextmanager
def _without_transformers_bars() -> Iterator[None]:
    """Keep the library's own bars from drawing into ours; as it was before afterwards."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
