"""A small policy that reads and writes bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>"]
CONTEXT = 1200


def byte_tokenizer(**options: Any) -> Any:
    """One token a byte, three special ones; "<eos>" ends and "<pad>" pads unless options say otherwise."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": None, **options},
    )


def policy(seed: int = 0, context: int = CONTEXT) -> Any:
    """A Qwen2 of 259 tokens whose weights are large enough that what it reads matters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 2.5  # responses end now and then
    return model


@pytest.fixture(scope="session")
def model() -> Any:
    with torch.random.fork_rng():
        return policy()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()
