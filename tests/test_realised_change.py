"""A change of S is a sum over tokens of small changes, and is not lost in the rounding of thousands of nats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fkernel as fk
from fkernel import func
from fkernel.func.evaluation import evaluate_in_float64
from fkernel.func.weighted import Weighted, weighted_logprob

T = 4000


def model() -> Qwen2ForCausalLM:
    """Of two heads and one layer, with a vocabulary so large that S of a long response is −28,000 nats."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(**shape, num_key_value_heads=1, num_hidden_layers=1, max_position_embeddings=T)
    ).eval()


@pytest.mark.turns(6)
@pytest.mark.parametrize("n", [1000, T], ids=["whole", "by layers"])
def test_a_small_change_of_a_long_response_is_known_to_the_rounding_of_its_tokens(n):
    small, rng = model(), torch.Generator().manual_seed(1)
    E = func.pad([[1, 2]] * 2, torch.randint(0, 1000, (2, n - 2), generator=rng).tolist())
    large = copy.deepcopy(small).double()
    S, before = _of(small)
    after = {name: leaf + 1e-5 * torch.randn(leaf.shape, generator=rng) for name, leaf in before.items()}
    S_exact, _ = _of(large)
    exactly = [fk.tree.cast(params, torch.float64) for params in (before, after)]
    exact = fk.realised_change(S_exact, exactly[0], exactly[1], E)
    realised = fk.realised_change(S, before, after, E)
    rounded = S(after, E) - S(before, E)
    error, usual = ((each.double() - exact).abs().max() for each in (realised, rounded))
    assert realised.dtype == torch.float32
    assert error < 1e-6 * n**0.5  # a float32 ε of about 8 nats a token, of random sign
    assert error < usual / 10


def test_weighted_tokens_are_added_up_in_float64_too():
    apply, params = func.make_functional(model())
    sequences = func.pad([[1, 2]], [[3, 4, 5]])
    batch = Weighted(sequences, torch.tensor([[0.0, 9.0, 1.0, -0.5, 2.0]]))
    f = weighted_logprob(apply, 0.7)
    found = evaluate_in_float64(f)(params, batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), f(params, batch))


def _of(model):
    apply, params = func.make_functional(model)
    return func.sequence_logprob(apply), params
