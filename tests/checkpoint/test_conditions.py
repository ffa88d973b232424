"""What a training did that the function here does not is found where real writers leave it, told once, and kept."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, TrainingArguments

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint.arguments import trainer_settings
from fkernel.checkpoint.conditions import find_conditions, precision_conditions
from tests.checkpoint.writers import VOCABULARY, WRITERS, Loop, gpt2, nameless, qwen2


def saved(directory: Path, model: Any = None, optimizer: bool = True, steps: int = 1) -> Path:
    loop = Loop(nameless, model)
    for number in range(steps):
        loop.step(number)
    loop.model.save_pretrained(directory)
    if optimizer:
        torch.save(loop.optimizer.state_dict(), directory / "optimizer.pt")
    return directory


def told(path: Path, **options: Any) -> tuple[checkpoint.Checkpoint, list[str]]:
    """A checkpoint, and what loading it warned of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        loaded = checkpoint.load(path, **options)
    said = [str(one.message) for one in heard if issubclass(one.category, fk.CheckpointWarning)]
    assert said == [str(condition) for condition in loaded.conditions]
    return loaded, said


def kinds(path: Path, **options: Any) -> list[str]:
    return [condition.kind for condition in told(path, **options)[0].conditions]


def adapted(directory: Path, dropout: float, optimizer: bool = True) -> tuple[Path, Any]:
    from peft import LoraConfig
    from peft.mapping_func import get_peft_model

    qwen2().save_pretrained(directory / "base")
    base = type(qwen2()).from_pretrained(directory / "base")
    config = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, config)
    for name, leaf in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(leaf)
    return saved(directory / "run", model, optimizer, steps=0), model


# -------------------------------------------------------------------------------------------------------------- dropout


def test_an_adapters_dropout_is_told_and_matters(tmp_path):
    path, model = adapted(tmp_path, 0.3)
    loaded, (said,) = told(path)
    assert loaded.conditions[0].kind == "dropout"
    assert "lora_dropout 0.3" in said
    rows = torch.randint(2, VOCABULARY, (4, 9))

    def gradient(one: Any) -> torch.Tensor:
        one.zero_grad()
        one(input_ids=rows, labels=rows).loss.backward()
        return torch.cat([leaf.grad.flatten() for leaf in one.parameters() if leaf.grad is not None])

    drawn, ours = gradient(model.train()), gradient(loaded.model)
    torch.testing.assert_close(gradient(model.eval()), ours)
    assert float((drawn - ours).norm() / drawn.norm()) > 0.05


def test_an_adapter_without_dropout_tells_of_none(tmp_path):
    assert kinds(adapted(tmp_path, 0.0)[0]) == []


def test_an_adapters_dropout_is_told_without_an_optimizer(tmp_path):
    assert kinds(adapted(tmp_path, 0.1, optimizer=False)[0]) == ["dropout"]


@pytest.mark.parametrize("trained", [True, False])
def test_a_configurations_dropout_is_told_where_there_was_a_training(tmp_path, trained):
    loaded, said = told(saved(tmp_path, gpt2(), optimizer=trained))
    assert [condition.kind for condition in loaded.conditions] == ["dropout"] * trained
    assert all("resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1" in text for text in said)


def test_functional_dropout_of_attention_is_told(tmp_path):
    model = qwen2()
    model.config.attention_dropout = 0.2
    assert "attention_dropout 0.2" in told(saved(tmp_path, model))[1][0]


def test_dropout_of_a_model_without_a_configuration_is_told(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.25))
    optimizer = torch.optim.AdamW(net.named_parameters())
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    _, (said,) = told(tmp_path / "last.pt", model=net)
    assert "1 0.25" in said
    assert "the model's dropout modules" in said


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob 0.1"),
        ({"decoder_layerdrop": 0.05}, "decoder_layerdrop 0.05"),
        ({"attn_config": {"attn_pdrop": 0.1}}, "attn_config.attn_pdrop 0.1"),
        ({"dropout": 1}, "dropout 1"),
        ({"attention_dropout": 0.0, "resid_pdrop": 0}, None),
        ({"classifier_dropout": 0.1, "summary_first_dropout": 0.1}, None),  # of heads that are not here
        ({"drop_tokens": True, "dropout_positions": "all"}, None),
    ],
)
def test_rates_are_told_from_what_only_sounds_like_them(config, found):
    conditions = find_conditions(config, {}, {}, {})
    assert [condition.found for condition in conditions] == ([f"Dropout above 0: {found}"] if found else [])


def test_trls_disable_dropout_silences_modules_and_not_attention():
    off = {"disable_dropout": True}
    assert find_conditions({"resid_pdrop": 0.1}, {"lora_dropout": 0.1}, off, {}) == ()
    (left,) = find_conditions({"attention_dropout": 0.1}, {"lora_dropout": 0.1}, off, {})
    assert left.found == "Dropout above 0: attention_dropout 0.1"


# -------------------------------------------------------------------------------------------------------------- routers


def olmoe(**options: Any) -> Any:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
            **{"max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, **options},
        )
    )


def test_a_loss_of_the_routers_is_told(tmp_path):
    balanced = olmoe(output_router_logits=True, router_aux_loss_coef=0.02)
    _, (said,) = told(saved(tmp_path, balanced))
    assert "router_aux_loss_coef 0.02" in said
    rows = torch.randint(2, VOCABULARY, (4, 9))
    made, plain = (one(input_ids=rows, labels=rows).loss for one in (olmoe(output_router_logits=True), olmoe()))
    assert float(made - plain) > 1e-3  # the loss that is told of


@pytest.mark.parametrize(
    "options", [{"router_aux_loss_coef": 0.02}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}]
)
def test_routers_without_a_loss_are_not(tmp_path, options):
    assert kinds(saved(tmp_path, olmoe(**options))) == []


# ------------------------------------------------------------------------------------------------- a trainer's settings


def test_what_is_listed_of_a_pickle_is_what_the_trainer_had(tmp_path):
    """Every flag and number that is read is the one that the object has."""
    args = TrainingArguments(
        output_dir=str(tmp_path), bf16=True, use_cpu=True, neftune_noise_alpha=5.0, learning_rate=3e-7, report_to=[]
    )
    torch.save(args, tmp_path / "training_args.bin")
    settings = trainer_settings(tmp_path)
    checked = {key: value for key, value in settings.items() if key in vars(args)}
    assert len(checked) > 50
    assert checked == {key: vars(args)[key] for key in checked}
    assert (settings["bf16"], settings["fp16"], settings["neftune_noise_alpha"]) == (True, False, 5.0)


@pytest.mark.parametrize("disabled", [True, False])
def test_trls_settings_are_read(tmp_path, disabled):
    from trl.trainer.grpo_config import GRPOConfig

    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to=[], disable_dropout=disabled)
    torch.save(args, tmp_path / "training_args.bin")
    assert trainer_settings(tmp_path)["disable_dropout"] is disabled


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
@pytest.mark.parametrize("form", ["bin", "json"])
def test_autocast_is_told(tmp_path, flag, form):
    path = saved(tmp_path)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    setattr(args, flag, True)
    if form == "bin":
        torch.save(args, path / "training_args.bin")
    else:
        (path / "training_args.json").write_text(json.dumps({flag: True}))
    _, (said,) = told(path)
    assert f"{flag} true: the training computed in {'bfloat16' if flag == 'bf16' else 'float16'} (autocast)" in said


def test_a_training_in_float32_tells_nothing(tmp_path):
    path = saved(tmp_path)
    torch.save(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]), path / "training_args.bin")
    assert kinds(path) == []


def test_a_loss_scaler_tells_of_float16(tmp_path):
    path = saved(tmp_path)
    torch.save(torch.amp.GradScaler("cpu").state_dict(), path / "scaler.pt")
    assert kinds(path) == ["autocast"]


def test_embedding_noise_is_told(tmp_path):
    path = saved(tmp_path)
    (path / "training_args.json").write_text(json.dumps({"neftune_noise_alpha": 5}))
    assert kinds(path) == ["embedding noise"]


class Payload:
    """What a hostile file would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_settings_are_read_without_executing_anything(tmp_path):
    path = saved(tmp_path)
    torch.save({"bf16": True, "run": Payload()}, path / "training_args.bin")
    assert kinds(path) == ["autocast"]


def test_damaged_settings_tell_nothing(tmp_path):
    path = saved(tmp_path)
    (path / "training_args.bin").write_bytes(b"PK\x03\x04 cut off")
    assert kinds(path) == []


# ------------------------------------------------------------------------------------------------------------ precision


def rounded(state_dict: Any, dtype: torch.dtype) -> Any:
    for entry in state_dict["state"].values():
        entry.update({key: entry[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")})
    return state_dict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_half_precision_is_told(tmp_path, dtype):
    path = saved(tmp_path, qwen2().to(dtype))
    qwen2().to(dtype).save_pretrained(path)  # AdamW's ε is 0 in float16, and its weights soon NaN
    loaded, (said,) = told(path)
    assert loaded.conditions[0].kind == "half precision"
    assert f"stored in {str(dtype)[6:]}" in said
    assert kinds(path, optimizer=False) == []  # no step is explained


@pytest.mark.parametrize("kind", ["rounded weights", "rounded moments"])
def test_one_of_the_two_rounded_is_told_as_that(tmp_path, kind):
    path = saved(tmp_path)
    if kind == "rounded weights":
        qwen2().to(torch.bfloat16).save_pretrained(path)
    else:
        torch.save(rounded(torch.load(path / "optimizer.pt"), torch.bfloat16), path / "optimizer.pt")
    loaded, (said,) = told(path)
    assert loaded.conditions[0].kind == kind
    assert "bfloat16" in said
    assert "float32" in said


def test_weights_of_a_file_tell_their_precision(tmp_path):
    run = WRITERS["file"](tmp_path)
    found = torch.load(run.path)
    found["model"] = {name: leaf.bfloat16() for name, leaf in found["model"].items()}
    rounded(found["optimizer"], torch.bfloat16)
    torch.save(found, run.path)
    assert kinds(run.path, model=run.model) == ["half precision"]


def test_an_adapters_base_in_half_precision_is_told(tmp_path):
    path, _ = adapted(tmp_path, 0.0)
    qwen2().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert kinds(path) == ["half precision base"]


def test_a_part_in_half_precision_is_counted():
    (condition,) = precision_conditions({"float32": 3, "bfloat16": 1}, {"float32": 8})
    assert "bfloat16 (1 of 4)" in condition.found
    assert precision_conditions({"float32": 4}, {"float32": 8}) == ()


def test_conditions_name_what_where_how_much_and_what_to_do():
    found = find_conditions({"resid_pdrop": 0.1}, {}, {"bf16": True, "neftune_noise_alpha": 5.0}, {})
    for condition in (*found, *precision_conditions({"float16": 1}, {"float16": 1}, {"bfloat16": 1})):
        text = str(condition)
        assert all(
            part and part in text for part in (condition.found, condition.where, condition.effect, condition.advice)
        )
