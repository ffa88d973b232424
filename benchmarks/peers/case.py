"""One situation for both sides: a Llama-shaped model that AdamW has moved, its optimizer's state, and sequences.

It is written to a folder, as a training run would leave it (`save_pretrained`, `optimizer.pt`), and read by a process
of each side. Imports nothing of the library, and so runs in either side's environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, STEP_BATCH = 8, 8
"""AdamW steps that give the second moments their values, and the sequences of each."""
SEQUENCES, OPTIMIZER = "sequences.pt", "optimizer.pt"


@dataclass(frozen=True)
class Sizes:
    """How large a case is.

    Attributes:
        width: of the residual stream; heads are 64 wide (or as wide as it is), the MLP 2.75 times it.
        T: tokens of every sequence, the first quarter of them prompt.
        n_U: update sequences.
        n_E: evaluation sequences.
        layers: number of them.
        vocab_size: rows of the tied table.
    """

    width: int
    T: int
    n_U: int = 64
    n_E: int = 16
    layers: int = 4
    vocab_size: int = 1024


class Written(NamedTuple):
    """What a folder holds.

    Attributes:
        E: [n_E T] int64, the evaluation sequences.
        U: [n_U T] int64, the update sequences.
        prompt: tokens at the beginning of each that are not scored.
        exp_avg_sq: {name: [*shape]}, the optimizer's raw second moments, by parameter name.
    """

    E: Tensor
    U: Tensor
    prompt: int
    exp_avg_sq: dict[str, Tensor]


def write(sizes: Sizes, folder: Path, seed: int = 0) -> None:
    """Build the model from a configuration and a seed, take a few AdamW steps, draw the sequences, write everything.

    The steps are taken on random sequences, for S's own loss −Σ log π: second moments then have the gradients' own
    scale in every layer, which decides how large the part of K is that a tool leaves out.

    Args:
        sizes: how large.
        folder: an existing directory.
        seed: of the weights, the training sequences, and both batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(configuration(sizes)).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(STEPS):
            summed_loss(model, drawn(sizes, STEP_BATCH), sizes.T // 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        batches = {"E": drawn(sizes, sizes.n_E), "U": drawn(sizes, sizes.n_U), "prompt": sizes.T // 4}
    model.eval().save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)
    torch.save(batches, folder / SEQUENCES)


def read(folder: Path) -> tuple[LlamaForCausalLM, Written]:
    """Load the model and what belongs to it.

    The optimizer holds its state by position; one group in `named_parameters()` order, so positions are names.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    state: dict[int, Any] = torch.load(folder / OPTIMIZER)["state"]
    moments = {name: state[i]["exp_avg_sq"] for i, (name, _) in enumerate(model.named_parameters())}
    return model, Written(**torch.load(folder / SEQUENCES), exp_avg_sq=moments)


def configuration(sizes: Sizes) -> LlamaConfig:
    """Llama's shape: no biases, a tied table, rotary positions."""
    return LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        num_key_value_heads=max(1, sizes.width // 64),
        vocab_size=sizes.vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def drawn(sizes: Sizes, n: int) -> Tensor:
    """Draw n sequences, [n T]; nothing is padding."""
    return torch.randint(sizes.vocab_size, (n, sizes.T))


def summed_loss(model: LlamaForCausalLM, ids: Tensor, prompt: int) -> Tensor:
    """−Σ log π of the responses, over the batch."""
    logits = model(ids, use_cache=False).logits[:, prompt - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten(), reduction="sum")
