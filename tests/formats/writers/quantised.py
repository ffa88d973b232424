"""`optimizer.pt` of quantised AdamW: bitsandbytes' and torchao's, by Hugging Face's Trainer; torchao's fp8 by a loop.

    quantised_bnb_8bit    bitsandbytes.optim.AdamW8bit     (optim="adamw_8bit")
    quantised_ao_8bit     torchao.optim.AdamW8bit          (optim="adamw_torch_8bit")
    quantised_ao_4bit     torchao.optim.AdamW4bit          (optim="adamw_torch_4bit")
    quantised_ao_fp8      torchao.optim.AdamWFp8           which Trainer does not offer: torch.save, save_pretrained

Moments of at least 4,096 numbers are codes: the head's, 512 × 8, under bitsandbytes, which keeps a table of tokens in
float32, and under torchao the table's. Of the two matrices the other one is frozen. Rows that no token uses are 0,
which packs to little. The truth's moments are decoded by the packages themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fkernel.shapes import Tree
from tests.checkpoint.writers import USUAL
from tests.formats.policy import BETAS, DECAY, EPS, LR, VOCABULARY, loss_of, rows
from tests.formats.truth import Truth, save_truth

RUNS = {"quantised_bnb_8bit": 1, "quantised_ao_8bit": 1, "quantised_ao_4bit": 1, "quantised_ao_fp8": 1}
OPTIM = {
    "quantised_bnb_8bit": "adamw_8bit",
    "quantised_ao_8bit": "adamw_torch_8bit",
    "quantised_ao_4bit": "adamw_torch_4bit",
}


SPREAD = 36
"""Tokens are these many rows apart, so that each block of codes has some that are used."""


def tokens(step: int) -> torch.Tensor:
    """The rows of a step."""
    return rows(step) * SPREAD


def policy(head: bool) -> Any:
    """One layer; a head or a table of 4,096 numbers that is trained, the other one frozen."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=8,
        intermediate_size=13,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    table, output = model.model.embed_tokens.weight, model.lm_head.weight
    unused = [row for row in range(len(table)) if row not in range(0, SPREAD * VOCABULARY, SPREAD)]
    with torch.no_grad():
        table[unused] = 0.0
        if not head:
            output[unused] = 0.0
    (table if head else output).requires_grad_(False)
    return model


def decoded(state: Mapping[str, Any], key: str) -> torch.Tensor:
    """Decode a moment with its own package."""
    if key in state:
        moment = state[key]
        return (moment.dequantize() if hasattr(moment, "dequantize") else moment).float().clone()
    from bitsandbytes.functional import dequantize_blockwise

    number = {"exp_avg": "1", "exp_avg_sq": "2"}[key]
    codes = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.float().clone()
    return dequantize_blockwise(codes, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256)


class Watch(TrainerCallback):
    """Keeps what is known before the third step."""

    before: Tree
    grads: Tree
    moments: dict[str, Tree]
    lr: float

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look after clipping, before the step."""
        if state.global_step != 2:
            return
        leaves = {name: leaf for name, leaf in given["model"].named_parameters() if leaf.requires_grad}
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        self.before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        self.grads = {name: leaf.grad.detach().clone() for name, leaf in leaves.items()}
        self.moments = {
            key: {name: decoded(optimizer.state[leaf], key) for name, leaf in leaves.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }
        self.lr = optimizer.param_groups[0]["lr"]


def write(name: str, directory: Path) -> None:
    """Write a run."""
    model, watch = policy(head="bnb" in name), Watch()
    with torch.compiler.set_stance("force_eager"):
        (_by_trainer if name in OPTIM else _by_loop)(name, directory, model, watch)
    after = {key: leaf.detach().clone() for key, leaf in model.named_parameters() if leaf.requires_grad}
    package = "bitsandbytes" if "bnb" in name else "torchao"
    meta: dict[str, Any] = {"step": 2, "lr": float(watch.lr)}
    meta["versions"] = {each: version(each) for each in ("torch", "transformers", package)}
    save_truth(directory, Truth(watch.before, **watch.moments, grads=watch.grads, after=after, rounded={}, meta=meta))


def _by_trainer(name: str, directory: Path, model: Any, watch: Watch) -> None:
    every = [row for step in range(3) for row in tokens(step)]
    data: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in every]
    place = directory / "run"
    arguments = TrainingArguments(output_dir=str(place), per_device_train_batch_size=4, optim=OPTIM[name], **USUAL)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[watch]).train()
    (place / "checkpoint-2").rename(directory / "checkpoint")
    _remove(place)


def _by_loop(name: str, directory: Path, model: Any, watch: Watch) -> None:
    from types import SimpleNamespace

    from torchao.optim import AdamWFp8  # pyright: ignore[reportMissingImports]

    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = AdamWFp8(leaves, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for number in range(3):
        model.zero_grad()
        loss_of(model, tokens(number)).backward()
        if number == 2:
            model.save_pretrained(directory / "checkpoint")
            torch.save(optimizer.state_dict(), directory / "checkpoint" / "optimizer.pt")
            watch.on_pre_optimizer_step(None, SimpleNamespace(global_step=2), None, model=model, optimizer=optimizer)
        optimizer.step()


def _remove(place: Path) -> None:
    import shutil

    shutil.rmtree(place)
