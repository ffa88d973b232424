"""Hugging Face's Trainer makes the optimizer, its two groups and its file; the state is keyed by name, and steps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint, precond
from fkernel.checkpoint import optimizer_state, stored_optimizer_state
from fkernel.precond import updates
from tests.checkpoint.writers import TOKENIZER
from tests.optimizers.real import drawn, through_a_file

BITS = "bitsandbytes"
KINDS: dict[str, tuple[type, str, str]] = {
    "adamw_torch": (precond.AdamWState, "torch.optim.AdamW", ""),
    "adamw_torch_fused": (precond.AdamWState, "torch.optim.AdamW", ""),
    "adafactor": (updates.TransformersAdafactorState, "transformers.Adafactor", ""),
    "sgd": (updates.SGDState, "torch.optim.SGD", ""),
    "adagrad": (updates.AdagradState, "torch.optim.Adagrad", ""),
    "rmsprop": (updates.RMSpropState, "torch.optim.RMSprop", ""),
    "adamw_bnb_8bit": (precond.AdamWState, "bitsandbytes.optim.AdamW", BITS),
    "paged_adamw_32bit": (precond.AdamWState, "bitsandbytes.optim.AdamW", BITS),
    "paged_adamw_8bit": (precond.AdamWState, "bitsandbytes.optim.AdamW", BITS),
    "lion_32bit": (updates.LionState, "bitsandbytes.optim.Lion", BITS),
    "lion_8bit": (updates.LionState, "bitsandbytes.optim.Lion", BITS),
    "adamw_torch_8bit": (precond.AdamWState, "torchao.optim.AdamW8bit", "torchao"),
    "adamw_torch_4bit": (precond.AdamWState, "torchao.optim.AdamW4bit", "torchao"),
}


def policy() -> Any:
    """RMSNorm, biases, a tied head; matrices that are large enough for 8 bits, and some that are not."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=15, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=0,
        )
    )  # fmt: skip


def step(optimizer: Any, model: Any, seed: int) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    grads = drawn(seed, {n: tuple(leaf.shape) for n, leaf in params.items()}, torch.float32)
    for name, leaf in params.items():
        leaf.grad = grads[name].clone()
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return grads


def trainers_optimizer(directory: Path, kind: str, model: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(directory), optim=kind, learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to=[]
    )
    return Trainer(model=model, args=args, processing_class=TOKENIZER).create_optimizer()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_trainer_saves_is_recognised_and_steps_as_it_did(kind, tmp_path):
    state_type, writer, needs = KINDS[kind]
    if needs:
        pytest.importorskip(needs)
    model = policy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged states are plain ones on a CPU
        optimizer = trainers_optimizer(tmp_path, kind, model)
        for seed in range(3):
            step(optimizer, model, seed)
        state_dict = through_a_file(optimizer.state_dict())
        assert [len(group["params"]) for group in state_dict["param_groups"]] == [8, 6]
        assert "param_names" not in state_dict["param_groups"][0]
        before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
        options: Any = {"model": model, "decoupled": True}
        state = optimizer_state(state_dict, before, **options)
        stored = stored_optimizer_state(state_dict, before, **options)
        grads = step(optimizer, model, 9)
    assert type(state) is state_type
    assert {*stored.writers.values()} == {writer}
    taken = {name: leaf.detach() - before[name] for name, leaf in model.named_parameters()}
    for name, leaf in precond.optimizer_step(before, {**grads}, state).total.items():
        torch.testing.assert_close(leaf, taken[name], rtol=1e-4, atol=5e-7, msg=lambda text, n=name: f"{n}: {text}")
    for name, leaf in precond.executed_step(before, {**grads}, stored).delta.items():
        torch.testing.assert_close(leaf, taken[name], rtol=0, atol=2e-7)


def test_loading_keeps_what_was_trained_in_bfloat16(tmp_path):
    """The model is float32 of the same numbers; what is stored tells the dtypes, and takes the real step."""
    model = policy().bfloat16()
    optimizer = trainers_optimizer(tmp_path, "adamw_torch", model)
    for seed in range(2):
        _half(optimizer, model, seed)
    model.save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    torch.save(optimizer.state_dict(), tmp_path / "run" / "optimizer.pt")
    with pytest.warns(fk.CheckpointWarning, match="stored in bfloat16"):
        loaded = checkpoint.load(tmp_path / "run", order="trainer")
    assert isinstance(loaded.optimizer, precond.AdamWState)
    assert {leaf.dtype for leaf in loaded.optimizer.exp_avg.values()} == {torch.float32}
    assert loaded.stored is not None
    assert {*loaded.stored.dtypes.values()} == {("bfloat16",)}
    params = {name: leaf.detach() for name, leaf in loaded.model.named_parameters()}
    assert loaded.trained_dtypes == dict.fromkeys(params, torch.bfloat16)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    assert loaded.step == 2
    before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    grads = _half(optimizer, model, 9)
    trained = {name: leaf.to(loaded.trained_dtypes[name]) for name, leaf in params.items()}
    executed = precond.executed_step(trained, {**grads}, loaded.stored)
    for name, leaf in model.named_parameters():
        assert torch.equal(executed.delta[name], leaf.detach().float() - before[name].float())


def _half(optimizer: Any, model: Any, seed: int) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    grads = drawn(seed, {n: tuple(leaf.shape) for n, leaf in params.items()}, torch.bfloat16)
    for name, leaf in params.items():
        leaf.grad = grads[name].clone()
    optimizer.step()
    return grads


def test_loading_amsgrad_is_no_plain_adamw(tmp_path):
    """Which was refused before, and must never be taken for AdamW."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.1, amsgrad=True)
    net(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    loaded = checkpoint.load(tmp_path / "last.pt", model=net)
    assert isinstance(loaded.optimizer, updates.AdamState)
    assert loaded.optimizer.amsgrad == {"weight": True, "bias": True}
    assert loaded.step == 1
    assert loaded.trained_dtypes == {"weight": torch.float32, "bias": torch.float32}


def test_a_group_of_muon_among_adams_is_muons():
    """As K. Jordan's optimizer writes it: use_muon in every group."""
    net = torch.nn.Linear(3, 2)
    params: dict[str, torch.Tensor] = dict(net.named_parameters())
    state_dict: Any = {
        "state": {
            0: {"momentum_buffer": torch.ones(2, 3)},
            1: {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)},
        },
        "param_groups": [
            {"params": [0], "param_names": ["weight"], "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1,
             "use_muon": True},
            {"params": [1], "param_names": ["bias"], "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10,
             "weight_decay": 0.1, "use_muon": False},
        ],
    }  # fmt: skip
    state = optimizer_state(state_dict, params)
    assert isinstance(state, precond.MixedState)
    assert [type(part) for part in state.parts] == [updates.MuonState, precond.AdamWState]
    state_dict["param_groups"][0]["tempo"] = 3
    with pytest.raises(fk.OptimizerStateError, match=r"has 'tempo', which no muon has"):
        optimizer_state(state_dict, params)


def test_unknown_optimizers_are_named_and_what_is_supported_is_said():
    net = torch.nn.Linear(3, 2)
    params: dict[str, torch.Tensor] = dict(net.named_parameters())
    for make, whose in ((torch.optim.Adadelta, "Adadelta's"), (torch.optim.Adamax, "Adamax's")):
        with pytest.raises(fk.OptimizerStateError, match=rf"{whose}.*supported are adamw, adam, nadam, radam, sgd"):
            optimizer_state(make(net.named_parameters()).state_dict(), params)
    with pytest.raises(fk.OptimizerStateError, match="lacks 'state' and 'param_groups'"):
        optimizer_state([{"state": {}}], params)
    turned = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(4, 3)).sum().backward()
    turned.step()
    with pytest.raises(fk.TreeError, match=r"'weight'\] has shape \[3, 2\].*moments have \[2, 3\]"):
        optimizer_state(turned.state_dict(), {**params, "weight": params["weight"].T})
