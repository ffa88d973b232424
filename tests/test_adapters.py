"""Adapters of PEFT's kinds: values, rows and derivatives are those of plain autograd, whatever the adapter computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import fkernel as fk
from fkernel import func
from tests.laws import close, rows
from tests.test_as_people_have_them import PROMPTS, RESPONSES, backward, qwen

LAYERS = ["q_proj", "v_proj", "down_proj"]
SHARED: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": LAYERS}
ONE: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
KINDS: dict[str, Callable[[], Any]] = {
    "rank-stabilised": lambda: peft.LoraConfig(r=2, use_rslora=True, **SHARED),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, **SHARED),
    "LoRA with biases": lambda: peft.LoraConfig(r=2, bias="all", **SHARED),
    "LoRA on head and embedding": lambda: peft.LoraConfig(
        r=2, target_modules=[*LAYERS, "lm_head", "embed_tokens"], task_type="CAUSAL_LM"
    ),
    "LoRA with a saved head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **SHARED),
    "LoRA with trained tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[1, 3], **SHARED),
    "VeRA": lambda: peft.VeraConfig(r=2, **ONE),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **SHARED),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, **SHARED),
    "OFT": lambda: peft.OFTConfig(oft_block_size=2, r=0, **ONE),
    "LoHa": lambda: peft.LoHaConfig(r=2, **SHARED),
    "LoKr": lambda: peft.LoKrConfig(r=2, **SHARED),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=8, **ONE),
}


@pytest.mark.filterwarnings("ignore::fkernel.ModelWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_differentiated_as_autograd_does(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(qwen(), KINDS[kind]()).double().eval()
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.requires_grad:
                leaf.add_(0.3 * torch.randn_like(leaf))
    values, J = backward(copy.deepcopy(model))
    apply, params = func.make_functional(model)
    S, U = func.sequence_logprob(apply), func.pad(PROMPTS, RESPONSES, 7)
    close(func.evaluate(S)(params, U), values)
    close(rows(func.per_sequence_grad(S, 2)(params, U)), J)
    v, h = {name: 0.1 * torch.randn_like(leaf) for name, leaf in params.items()}, 1e-3
    ends = [func.evaluate(S)(fk.tree.axpy(s * h, v, params), U) for s in (-1, 1)]
    E = func.true_derivative(S, params, U, v)
    assert (E is not S) is (kind == "DoRA")
    close(func.jvp(E)(params, U, v), (ends[1] - ends[0]) / (2 * h), 5e-3)  # norms are in float32
