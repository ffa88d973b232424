"""The tiny policy that every writer trains, on the same rows, with the same optimizer settings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 15
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.99), 1e-8, 0.1


def tiny(seed: int = 0, tied: bool = True) -> Any:
    """1,381 parameters (1,501 untied): RMSNorm, biases on q, k and v; sizes that do not divide by two ranks."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=13,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def rows(step: int) -> torch.Tensor:
    """[4, 9] tokens of step 0, 1 or 2; ranks take halves."""
    drawn = torch.randint(2, VOCABULARY, (3, 4, 9), generator=torch.Generator().manual_seed(1))
    return drawn[step]


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the rows."""
    return model(input_ids=tokens, labels=tokens).loss
