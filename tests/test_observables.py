"""Other quantities than log π, and a kernel in parts: derivatives against differences, parts against the whole."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.func.handles.groups import by_kind, by_layer, contract_by, part_of
from fkernel.func.observables import Answers, Pair, expected_reward, kl_divergence, log_odds, mean_entropy
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def batches(case):
    _, params, E, U = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    half = func.Sequences(*(leaf[: len(case.E)] for leaf in U)) if len(case.U) >= len(case.E) else None
    other = half or func.Sequences(*(leaf.flip(0) for leaf in E))
    return apply, params, E, other


def test_jvps_are_central_differences(case):
    apply, params, E, other = batches(case)
    v, h = case.tree(21), 1e-5
    moved = lambda s: {name: leaf + s * h * v[name] for name, leaf in params.items()}  # noqa: E731
    reference = {name: leaf + 0.1 * case.tree(22)[name] for name, leaf in params.items()}
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(case.E), 2)
    for f, batch in (
        (mean_entropy(apply), E),
        (kl_divergence(apply, reference, 0.7), E),
        (log_odds(apply), Pair(E, other)),
        (expected_reward(apply), Answers((E, other), rewards)),
    ):
        expected = (f(moved(1), batch) - f(moved(-1), batch)) / (2 * h)
        torch.testing.assert_close(func.jvp(f)(params, batch, v), expected, rtol=1e-6, atol=1e-8)
        g = func.vjp(f)(params, batch, torch.ones(len(case.E), dtype=torch.float64))
        slope = sum((g[name] * v[name]).sum() for name in g)
        torch.testing.assert_close(slope, expected.sum(), rtol=1e-6, atol=1e-8)


def test_values(case):
    apply, params, E, other = batches(case)
    S = func.sequence_logprob(apply)
    assert kl_divergence(apply, params)(params, E).abs().max() < 1e-12
    torch.testing.assert_close(log_odds(apply)(params, Pair(E, other)), S(params, E) - S(params, other))
    rewards = torch.tensor([[2.0, -1.0]], dtype=torch.float64).expand(len(case.E), 2)
    p = torch.sigmoid(S(params, E) - S(params, other))
    torch.testing.assert_close(expected_reward(apply)(params, Answers((E, other), rewards)), 2 * p - (1 - p))
    with pytest.raises(fk.BatchError, match=r"rewards have shape \[\d, 2\] for 1 answers"):
        expected_reward(apply)(params, Answers((E,), rewards))


@pytest.mark.parametrize("key", [by_kind, by_layer])
def test_a_kernels_parts_add_up_to_it(case, key):
    S, params, E, U = case.engine(fk)
    D = {name: leaf.abs() for name, leaf in case.tree(23).items()}
    x, y = (func.per_sequence_handles(S)(params, batch) for batch in (E, U))
    parts = contract_by(x, y, key, diagonal=D)
    assert len(parts) > 1
    torch.testing.assert_close(torch.stack([*parts.values()]).sum(0), func.contract(x, y, diagonal=D))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", (None, "embedding")),
        ("model.layers.11.self_attn.o_proj.weight", (11, "attention o")),
        ("model.layers.0.input_layernorm.weight", (0, "norm")),
        ("model.layers.0.mlp.down_proj.weight", (0, "MLP")),
        ("lm_head.weight", (None, "head")),
        ("transformer.h.2.attn.c_attn.weight", (2, "attention qkv")),
        ("transformer.h.2.attn.c_proj.bias", (2, "attention o")),
        ("transformer.h.2.mlp.c_proj.weight", (2, "MLP")),
        ("transformer.wpe.weight", (None, "positions")),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight", (1, "LoRA A")),
        ("gpt_neox.layers.3.attention.query_key_value.weight", (3, "attention qkv")),
        ("anything", (None, "other")),
    ],
)
def test_names_of_the_families(name, part):
    assert part_of(name) == part
