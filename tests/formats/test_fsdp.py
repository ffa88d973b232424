"""FSDP's checkpoints by verl's and accelerate's own writers: each loads into the state of its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint import formats
from fkernel.checkpoint.formats import fsdp
from fkernel.checkpoint.formats.fsdp.parts import copies, opened, part_of
from fkernel.checkpoint.formats.fsdp.places import rank_files
from tests.formats.family import check_next_step, check_state, copied, loaded, refused
from tests.formats.policy import BETAS, DECAY, EPS, tiny
from tests.formats.truth import Truth

ACTOR = "global_step_2/actor"
VERL = (
    *("verl_fsdp1", "verl_fsdp1_bf16", "verl_fsdp1_orig", "verl_fsdp1_one", "verl_fsdp1_hybrid"),
    *("verl_fsdp2", "verl_fsdp2_bf16", "verl_fsdp2_hybrid"),
)
LORA = ("verl_fsdp1_lora", "verl_fsdp1_orig_lora", "verl_fsdp2_lora")
RANKS = ("accelerate_fsdp1_ranks", "accelerate_fsdp2_ranks")
WHOLE = (
    *("accelerate_fsdp1_sharded", "accelerate_trainer_fsdp1_full"),
    *("accelerate_trainer_fsdp2_full", "accelerate_trainer_fsdp2_sharded"),
)
"""What torch.distributed.checkpoint, or one process, has written: other readers' work."""


def place(run: str, root: Path) -> Path:
    """What a user points at."""
    return root / "global_step_2" if run.startswith("verl") else root


def model_of(run: str, truth: Truth) -> dict[str, Any]:
    """What a user must say besides the path."""
    without = run in RANKS or run.endswith("sharded")
    return {"model": tiny(seed=7, tied="lm_head.weight" not in truth.theta)} if without else {}


@pytest.fixture(scope="module", params=(*VERL, *RANKS, *WHOLE))
def run(request, tmp_path_factory) -> tuple[str, Path, Truth]:
    return request.param, *copied(request.param, tmp_path_factory.mktemp(request.param))


def test_the_state_is_the_trainings(run):
    name, root, truth = run
    found = loaded(place(name, root), **model_of(name, truth))
    check_state(found, truth)
    check_next_step(found, truth)
    state: Any = found.optimizer
    assert {*state.lr.values()} == {truth.meta["lr"]}
    assert ({*state.beta1.values()}, {*state.beta2.values()}) == tuple({beta} for beta in BETAS)
    assert {*state.eps.values()} == {EPS}
    assert {*state.weight_decay.values()} <= {DECAY, 0.0}
    assert found.provenance.layout == ("fsdp ranks" if name not in WHOLE else found.provenance.layout)
    assert found.rounded == {}


def test_weights_alone(run):
    name, root, truth = run
    found = loaded(place(name, root), **model_of(name, truth), optimizer=False)
    assert found.optimizer is None
    for key, theta in truth.theta.items():
        assert torch.equal(found.model.get_parameter(key), theta), key


@pytest.mark.parametrize("name", ["verl_fsdp1", "verl_fsdp2_bf16"])
def test_verls_step_and_actor_are_one_checkpoint(name, tmp_path):
    root, truth = copied(name, tmp_path)
    found = [loaded(root / inside) for inside in ("global_step_2", ACTOR)]
    assert found[0].provenance.fingerprint == found[1].provenance.fingerprint
    for each in found:
        assert each.tokenizer is not None
        check_state(each, truth)


def test_verls_exported_model_is_not_taken_for_the_weights(tmp_path):
    """With hf_model, huggingface/ has the weights too: what the optimizer steps is in the ranks' files."""
    root, truth = copied("verl_fsdp2_bf16", tmp_path)
    assert (root / ACTOR / "huggingface" / "model.safetensors").is_file()
    check_state(loaded(root / "global_step_2"), truth)
    refused(
        lambda: loaded(root / ACTOR / "huggingface"), r"an optimizer's state that is not read: .*optim_world_size_2"
    )


def test_pure_half_precision_is_kept_and_told(tmp_path):
    """verl with model_dtype bf16: parameters and moments are rounded at each step."""
    root, truth = copied("verl_fsdp2_pure", tmp_path)
    with pytest.warns(fk.CheckpointWarning, match="stored in bfloat16 and the optimizer's moments in bfloat16"):
        found = checkpoint.load(root / "global_step_2")
    check_state(found, truth)
    assert {*found.trained_dtypes.values()} == {torch.bfloat16}
    assert found.stored is not None
    assert found.stored.entries["model.norm.weight"]["exp_avg"].dtype == torch.bfloat16


def test_before_the_first_step_there_are_no_moments(tmp_path):
    for number, name in enumerate(("verl_fsdp1", "verl_fsdp1_orig", "verl_fsdp2")):
        root, truth = copied(name, tmp_path / str(number))
        for path in rank_files(root / ACTOR, "optim"):
            edited(path, lambda found: found["state"].clear())
        state: Any = loaded(root / "global_step_2").optimizer
        assert set(state.names) == set(truth.theta)
        assert {*state.step.values()} == {0}


@pytest.mark.parametrize("name", ["verl_fsdp1_orig", "verl_fsdp2"])
def test_what_was_frozen_is_not_trained(name, tmp_path):
    """verl gives its optimizer every parameter, frozen ones too, of which it then keeps nothing."""
    root, truth = copied(name, tmp_path)
    first = next(name for name, _ in tiny().named_parameters())
    for path in rank_files(root / ACTOR, "optim"):
        edited(path, lambda found: found["state"].pop(0, None))
    with pytest.warns(fk.CheckpointWarning, match=rf"taken as frozen: '{first}"):
        found = checkpoint.load(root / "global_step_2")
    assert not found.model.get_parameter(first).requires_grad
    assert found.optimizer is not None
    assert set(found.optimizer.names) == {*truth.theta} - {first}


def test_a_mesh_as_older_versions_saved_it(tmp_path):
    """Before torch 2.9 a DeviceMesh kept its ranks as an attribute."""
    root, truth = copied("verl_fsdp2_hybrid", tmp_path)
    found = opened(rank_files(root / ACTOR, "model")[0], "a model")
    part = part_of(found["model.norm.weight"], 0, "norm", root)
    mesh = vars(found["model.norm.weight"]._spec.mesh)
    mesh["mesh"] = torch.tensor([[0, 1], [2, 3]])
    for key in ("_layout", "_rank_map", "_rank"):
        del mesh[key]
    again = part_of(found["model.norm.weight"], 0, "norm", root)
    assert part is not None
    assert again is not None
    assert torch.equal(again.values, part.values)
    assert again[:2] == part[:2]
    assert copies([found["model.norm.weight"]], 4) == [0, 1]
    assert truth.theta["model.norm.weight"].shape == again.shape


# LoRA


@pytest.mark.parametrize("name", LORA)
def test_adapters_are_made_from_what_verl_saved_of_them(name, tmp_path):
    root, truth = copied(name, tmp_path)
    layout = formats.find_layout(root / "global_step_2")
    made = fsdp.adapted(layout, tiny(seed=7))
    assert {key for key, leaf in made.named_parameters() if leaf.requires_grad} == set(truth.theta)
    check_state(loaded(root / "global_step_2", model=made), truth)
    found = loaded(root / "global_step_2")
    check_state(found, truth)
    check_next_step(found, truth)
    for key, leaf in tiny().named_parameters():
        inside = f"base_model.model.{key}"
        held = dict(found.model.named_parameters())
        assert torch.equal(held.get(inside, held.get(_in_base_layer(inside))), leaf), key  # pyright: ignore[reportArgumentType, reportCallIssue]


def _in_base_layer(name: str) -> str:
    return ".base_layer.".join(name.rsplit(".", 1))


def test_adapters_saved_alone_want_their_base(tmp_path):
    root, truth = copied("verl_fsdp2_lora_only", tmp_path)
    layout = formats.find_layout(root / "global_step_2")
    saved = fsdp.read(layout, fsdp.adapted(layout, tiny()), True)
    assert set(saved.optimizer["state"]) == set(truth.theta)
    for key, theta in truth.theta.items():
        assert torch.equal(saved.weights[key], theta), key
    assert torch.equal(saved.weights["base_model.model.model.embed_tokens.weight"], tiny().lm_head.weight)
    refused(lambda: loaded(root / "global_step_2"), r"LoRA adapters only \(save_lora_only\)", "base='directory'")
    tiny().save_pretrained(tmp_path / "base")
    found = loaded(root / "global_step_2", base=tmp_path / "base")
    check_state(found, truth)
    check_next_step(found, truth)
    assert torch.equal(found.model.get_parameter("base_model.model.model.norm.weight"), tiny().model.norm.weight)


def test_adapters_with_a_configuration_of_pefts(tmp_path):
    """verl before 0.8 saved PEFT's own, with what lora_train_meta.json leaves out."""
    root, truth = copied("verl_fsdp2_lora", tmp_path)
    inside = root / ACTOR / "lora_adapter"
    inside.mkdir()
    whole = {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (inside / "adapter_config.json").write_text(json.dumps({**whole, "task_type": "CAUSAL_LM", "peft_type": "LORA"}))
    layout = formats.find_layout(root / "global_step_2")
    made = fsdp.adapted(layout, tiny())
    assert made.peft_config["default"].use_rslora
    check_state(loaded(root / "global_step_2", model=made), truth)


def test_adapters_that_cannot_be_made(tmp_path):
    root, _ = copied("verl_fsdp2_lora", tmp_path)
    layout = formats.find_layout(root / "global_step_2")
    plain = tiny()
    refused(lambda: fsdp.read(layout, plain, True), "holds a model with LoRA adapters", "PeftModel")
    meta = root / ACTOR / "lora_train_meta.json"
    kept = meta.read_text()
    for text, says in (("{}", "no whole number r"), ("[1]", "no whole number r"), ("{", "is no JSON")):
        meta.write_text(text)
        refused(lambda: fsdp.adapted(layout, tiny()), str(meta), says)
    meta.write_text(kept.replace('"r": 3', '"r": 4'))
    refused(
        lambda: loaded(root / "global_step_2", model=fsdp.adapted(layout, tiny())),
        r"of shape \[3, 8\], the model has \[4, 8\]",
    )
    meta.unlink()
    assert fsdp.adapted(layout, plain) is plain
    shutil.copy(root / ACTOR / "fsdp_config.json", meta)
    refused(lambda: fsdp.adapted(layout, tiny()), "no whole number r")


def edited(path: Path, change: Any) -> Path:
    """Change what a file holds and save it again under its name: its sums are right."""
    held = dict(opened(path, "a file"))
    change(held)
    path.unlink()  # it is mapped
    torch.save(held, path)
    return path
