"""What the tests of this folder share."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fkernel import func
from tests.bad_input.common import CONTEXT, DTYPE, VOCABULARY


@pytest.fixture
def params() -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE), "b": torch.tensor(0.3, dtype=DTYPE)}


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).double().train()


@pytest.fixture(scope="module")
def language(gpt2: GPT2LMHeadModel) -> tuple[func.Apply, dict[str, torch.Tensor]]:
    return func.make_functional(gpt2)
