"""What cannot be read, or would be read wrongly, is refused: by name, and with what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint.contents import optimizer_in, weights_in
from fkernel.checkpoint.files import check_saved_as, first_line, read_tensors
from tests.checkpoint.writers import VOCABULARY, WRITERS, Loop, nameless, qwen2

# ------------------------------------------------------------------------------------ optimizer files that are not read


def touched(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0")


UNREAD = {
    "verl, above": "optim_world_size_2_rank_0.pt",
    "NeMo-RL, beside": "optimizer/.metadata",
    "NeMo-RL 2, beside": "optimizer/optim/__0_0.distcp",
    "accelerate's second": "run/optimizer_1.bin",
    "fsdp ranks": "run/pytorch_optimizer_fsdp_0_rank0.bin",
    "beside": "optimizer.pt",
    "of another name": "run/my-optim.ckpt",
}


@pytest.mark.parametrize("kind", UNREAD)
def test_optimizer_files_that_are_not_read_are_named(tmp_path, kind):
    qwen2().save_pretrained(tmp_path / "run")
    touched(tmp_path, UNREAD[kind])
    with pytest.raises(
        fk.CheckpointError, match=r"an optimizer's state that is not read: .*Say optimizer=False"
    ) as told:
        checkpoint.load(tmp_path / "run")
    assert UNREAD[kind].partition("/")[2 if kind.startswith("run") else 0] in str(told.value)
    assert checkpoint.load(tmp_path / "run", optimizer=False).optimizer is None


def test_what_only_sounds_like_an_optimizer_is_passed_over(tmp_path):
    qwen2().save_pretrained(tmp_path / "run")
    touched(
        tmp_path,
        "run/optimizer_param_names.json.bak",
        "run/optimised.safetensors.txt",
        "run/checkpoint-200/optimizer.pt",  # of another step
        "optimizer_sweep/first/optimizer.pt",  # of other runs
        "a_second_optimizer_1/optimizer.pt",
        "optim.md",
    )
    assert checkpoint.load(tmp_path / "run").optimizer is None


def test_an_optimizer_beside_a_file_is_named(tmp_path):
    torch.save(qwen2().state_dict(), tmp_path / "model.pt")
    torch.save(torch.optim.AdamW(qwen2().parameters()).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(fk.CheckpointError, match=r"not read: .*optimizer.pt"):
        checkpoint.load(tmp_path / "model.pt", model=qwen2())


def test_the_inner_directory_of_a_checkpoint_lies_beside_its_optimizer(tmp_path):
    run = WRITERS["nested"](tmp_path)
    with pytest.warns(fk.CheckpointWarning, match=r"optimizer's state beside it was not read: .*optimizer.pt"):
        loaded = checkpoint.load(run.path / "model")
    assert [condition.kind for condition in loaded.conditions] == ["no optimizer"]
    assert checkpoint.load(run.path / "model", optimizer=False).conditions == ()


def test_without_its_optimizer_a_checkpoint_has_weights_alone(tmp_path):
    run = WRITERS["distributed, app"](tmp_path)
    loaded = checkpoint.load(run.path, model=run.model, optimizer=False)
    assert loaded.optimizer is None
    assert loaded.step is None
    assert loaded.provenance.optimizer is None


# -------------------------------------------------------------------------------------------------- an adapter's folder


def test_an_adapter_in_a_folder_keeps_its_name_and_its_optimizer(tmp_path):
    run = WRITERS["named adapter"](tmp_path)
    for path in (run.path, run.path / "mine"):
        loaded = checkpoint.load(path, decoupled=True)
        assert loaded.optimizer is not None
        assert all(".mine." in name for name in loaded.optimizer.names)
        assert loaded.provenance.layout == "adapter"


def test_an_optimizer_above_two_adapters_is_of_neither(tmp_path):
    from shutil import copytree

    run = WRITERS["named adapter"](tmp_path)
    copytree(run.path / "mine", run.path / "yours")
    with pytest.raises(fk.CheckpointError, match=r"holds 2 adapters \(mine, yours\), and nothing says which"):
        checkpoint.load(run.path)
    with pytest.raises(fk.CheckpointError, match=r"an optimizer's state that is not read: .*optimizer.pt"):
        checkpoint.load(run.path / "mine")
    assert checkpoint.load(run.path / "mine", optimizer=False).optimizer is None


# ------------------------------------------------------------------------------------------ bases that are drawn anew


def adapter_of(directory: Path, made: Any, path: str = "adapter") -> Any:
    from peft import LoraConfig
    from peft.mapping_func import get_peft_model

    qwen2().save_pretrained(directory / "base")
    torch.manual_seed(1)
    base = type(qwen2()).from_pretrained(directory / "base")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=made
    )
    model: Any = get_peft_model(base, config)
    loop = Loop(lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), model)
    loop.step(0)
    loop.model.save_pretrained(directory / path)
    return loop.model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("made", [True, "gaussian", "pissa", "olora", "orthogonal", "eva"])
def test_adapters_whose_base_is_the_same_again_give_their_own_log_probabilities(tmp_path, made, dtype):
    """PiSSA by a whole decomposition and OLoRA change the base, and change it alike at each loading."""
    model = adapter_of(tmp_path, made)
    loaded = checkpoint.load(tmp_path / "adapter", dtype=dtype)
    rows = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = (one(input_ids=rows).logits.double().log_softmax(-1) for one in (loaded.model, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_adapters_whose_base_is_drawn_anew_are_refused(tmp_path):
    adapter_of(tmp_path, "pissa_niter_4")
    with pytest.raises(fk.ModelError, match=r"init_lora_weights='pissa_niter_4', .*the base that was trained is in no"):
        checkpoint.load(tmp_path / "adapter")


@pytest.mark.parametrize("made", ["loftq", "corda", "lora_ga", "PiSSA_niter_16"])
def test_other_initialisations_that_change_the_base_are_refused(tmp_path, made):
    adapter_of(tmp_path, True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": made}))
    with pytest.raises(fk.ModelError, match=rf"init_lora_weights='{made}'.*merge_and_unload"):
        checkpoint.load(tmp_path / "adapter")


# -------------------------------------------------------------------------------------------------- what a file holds


def test_a_class_that_torch_refuses_is_named(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "last.pt")
    with pytest.raises(fk.CheckpointError, match=r"GLOBAL argparse.Namespace was not an allowed global") as told:
        checkpoint.load(tmp_path / "last.pt", model=qwen2())
    assert "\x1b" not in str(told.value)


def test_colours_of_a_terminal_are_taken_out_of_messages():
    assert first_line(ValueError("\x1b[1m\x1b[31mRed\x1b[0m and \x1b[38;5;208mamber\x1b[0m\nmore")) == "Red and amber"


def test_what_rebuilds_a_tensor_raises_no_bare_error(tmp_path):
    """A function that is none, in a file whose sums were not computed."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    data = bytearray((tmp_path / "x.pt").read_bytes())
    start = data.index(b"ctorch._utils")
    data[start : start + 10] = b"ctorch._ut"[:10]
    data[start + 5 : start + 13] = b"Xttt_uti"
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(fk.CheckpointError, match="could not be read as tensors only"):
        read_tensors(tmp_path / "x.pt", "an optimizer state")


def test_several_optimizers_are_not_chosen_between(tmp_path):
    loop = Loop(nameless)
    both = {"state_dict": loop.model.state_dict(), "optimizer_states": [loop.optimizer.state_dict()] * 2}
    torch.save(both, tmp_path / "last.ckpt")
    with pytest.raises(fk.CheckpointError, match=r"under 'optimizer_states', holds the states of 2 optimizers"):
        checkpoint.load(tmp_path / "last.ckpt", model=loop.model)


@pytest.mark.parametrize("value", [{"momentum": {}}, {"inner": {"state": {}}}, 3])
def test_an_optimizer_of_another_form_is_named(value):
    with pytest.raises(fk.CheckpointError, match=r"a file holds under 'optimizer' no state_dict .*optimizer=False"):
        optimizer_in({"model": {}, "optimizer": value}, "a file")


def test_an_optimizer_of_another_name_is_named():
    with pytest.raises(fk.CheckpointError, match=r"holds 'optimizer_g', which looks like an optimizer's state"):
        optimizer_in({"model": {}, "optimizer_g": {"state": {}, "param_groups": []}}, "a file")
    assert optimizer_in({"model": {}, "optimizer": None}, "a file") is None
    assert optimizer_in({"model": {}, "optimizer_steps": 3}, "a file") is None


def test_weights_of_another_name_are_said():
    with pytest.raises(fk.CheckpointError, match=r"a file holds \['epoch', 'net'\]; expected the weights under"):
        weights_in({"net": {"w": torch.ones(1)}, "epoch": torch.tensor(1)}, "a file")
    with pytest.raises(fk.CheckpointError, match=r"a file, under 'app', holds \['net'\]"):
        weights_in({"app": {"net": {}}}, "a file")
    with pytest.raises(fk.CheckpointError, match="a file holds a list; expected a dictionary"):
        weights_in([1], "a file")


# -------------------------------------------------------------------------------------------------- nothing was saved


def test_a_trainer_that_saved_weights_only_says_what_is_missing(tmp_path):
    """transformers' save_only_model=True."""
    from tests.checkpoint.writers import trainer

    run = trainer(tmp_path, save_only_model=True)
    with pytest.warns(fk.CheckpointWarning, match=r"saved with save_only_model.*[Rr]ecording of the run has them"):
        loaded = checkpoint.load(run.path)
    assert loaded.optimizer is None
    assert loaded.step == 2
    assert "no optimizer" in [condition.kind for condition in loaded.conditions]
    assert "no optimizer" not in [condition.kind for condition in checkpoint.load(run.path, optimizer=False).conditions]


def test_weights_that_are_not_finite_are_refused(tmp_path):
    run = WRITERS["file"](tmp_path)
    found = torch.load(run.path)
    next(iter(found["model"].values()))[0, 0] = float("nan")
    torch.save(found, run.path)
    with pytest.raises(fk.ModelError, match=r"embed_tokens.weight' with a NaN or an infinite number"):
        checkpoint.load(run.path, model=run.model)


def test_a_master_that_is_no_number_is_refused():
    weights = {"w": torch.ones(2, dtype=torch.bfloat16)}
    with pytest.raises(fk.OptimizerStateError, match=r"master weights of 'w' are not those"):
        fk.precond.check_masters({"w": torch.tensor([1.0, float("nan")])}, weights)


# -------------------------------------------------------------------------------------------------- sums and names


@pytest.mark.parametrize("mmap", [True, False])
def test_a_flipped_byte_of_a_tensor_is_no_other_number(tmp_path, mmap):
    torch.save({"a": torch.ones(2000)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(b"\x00\x00\x80?" * 9) + 4] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    assert not torch.equal(torch.load(tmp_path / "x.pt")["a"], torch.ones(2000))  # torch does not look
    with pytest.raises(fk.CheckpointError, match=r"x.pt is damaged: Bad CRC-32 for file 'x/data/0'"):
        read_tensors(tmp_path / "x.pt", "tensors", mmap=mmap)


def test_a_file_without_sums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_tensors(tmp_path / "x.pt", "tensors")["a"], torch.ones(2))


def test_a_rank_s_file_under_another_ranks_name_is_told(tmp_path):
    torch.save({}, tmp_path / "rank_0.pt")
    check_saved_as(tmp_path / "rank_0.pt")
    (tmp_path / "rank_0.pt").rename(tmp_path / "rank_1.pt")
    with pytest.raises(fk.CheckpointError, match=r"rank_1.pt was saved as rank_0.pt: it is another rank's"):
        check_saved_as(tmp_path / "rank_1.pt")
    with (tmp_path / "buffer.pt").open("wb") as file:
        torch.save({}, file)  # has no name
    check_saved_as(tmp_path / "buffer.pt")
