"""Megatron's distributed checkpoints by its own model, optimizer and writer: what loads, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from fkernel.checkpoint.distributed import read_distributed
from fkernel.checkpoint.formats.megatron import read
from fkernel.checkpoint.formats.megatron_names import pieces_of
from fkernel.checkpoint.layout import Layout
from tests.checkpoint.writers import gpt2
from tests.formats.family import check_next_step, check_state, copied, loaded, refused
from tests.formats.policy import tiny
from tests.formats.truth import Truth

RUNS = ("megatron_qwen2", "megatron_qwen3")
STEP = {"megatron_qwen2": "iter_0000002", "megatron_qwen3": "global_step_2", "megatron_dp_reshardable": "iter_0000002"}


def model_of(run: str) -> Any:
    """The second has its configuration beside it."""
    return None if run == "megatron_qwen3" else tiny(seed=7, tied=False)


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> tuple[str, Path, Truth]:
    return request.param, *copied(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def fresh(request, tmp_path) -> tuple[Path, Any]:
    """A copy that may be damaged, and the model."""
    path, _ = copied(request.param, tmp_path)
    return path / STEP[request.param], model_of(request.param)


ALL = pytest.mark.parametrize("fresh", RUNS, indirect=True)
ONE = pytest.mark.parametrize("fresh", RUNS[:1], indirect=True)


def test_the_state_is_the_writers(run):
    name, path, truth = run
    found = loaded(path / STEP[name], model=model_of(name))
    check_state(found, truth)
    check_next_step(found, truth)
    state: Any = found.optimizer
    assert {*state.lr.values()} == {truth.meta["lr"]}
    for key, decay in state.weight_decay.items():  # Megatron's rule: two groups, vectors do not decay
        assert decay == (truth.meta["decays"][0] if truth.theta[key].ndim > 1 else truth.meta["decays"][1]), key
    assert truth.meta["decays"] == [0.1, 0.0]
    assert len(found.rounded) == (len(truth.theta) if name == "megatron_qwen2" else 0)


def test_verls_configuration_and_tokenizer_come_along(tmp_path):
    path, truth = copied("megatron_qwen3", tmp_path)
    for place in ("global_step_2", "global_step_2/actor", "global_step_2/actor/dist_ckpt"):
        found = loaded(path / place)
        assert found.model.config.model_type == "qwen3"
        assert found.tokenizer is not None
        assert found.provenance.layout == "megatron"
        assert {*found.model.state_dict()} - {"lm_head.weight"} == {*truth.theta}


def test_nemos_and_slimes_places(tmp_path):
    path, truth = copied("megatron_qwen2", tmp_path)
    check_state(loaded(path, model=model_of("megatron_qwen2")), truth)  # with latest_checkpointed_iteration.txt
    shutil.copytree(path / "iter_0000002", tmp_path / "step_2" / "policy" / "weights" / "iter_0000002")
    for place in ("step_2", "step_2/policy", "step_2/policy/weights"):
        check_state(loaded(tmp_path / place, model=model_of("megatron_qwen2")), truth)
    shutil.copytree(path / "iter_0000002", path / "iter_0000004")
    refused(lambda: loaded(path, model=tiny()), "holds 2 checkpoints; name one of them: .*iter_0000004")


def test_weights_alone(run):
    name, path, truth = run
    found = loaded(path / STEP[name], model=model_of(name), optimizer=False)
    assert found.optimizer is None
    for key, leaf in found.model.named_parameters():
        assert torch.equal(leaf, truth.rounded.get(key, truth.theta[key]).float()), key


def test_flat_buffers_without_names_are_refused(tmp_path):
    path, truth = copied("megatron_dp_reshardable", tmp_path)
    path = path / STEP["megatron_dp_reshardable"]
    model = model_of("megatron_qwen2")
    refused(
        lambda: loaded(path, model=model),
        "dp_reshardable, flat buffers without names",
        "dist_ckpt_optim_fully_reshardable=True",
        "optimizer=False",
    )
    found = loaded(path, model=model, optimizer=False)
    for key, leaf in found.model.named_parameters():
        assert torch.equal(leaf, truth.rounded[key].float()), key


class Named(torch.nn.Module):
    """A model that has the parameters it is told of, under their names."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            place: torch.nn.Module = self
            *above, last = name.split(".")
            for part in above:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))


def test_a_model_with_megatrons_own_names(tmp_path):
    path, _ = copied("megatron_qwen2", tmp_path)
    place = path / STEP["megatron_qwen2"]
    stored = read_distributed(place, lambda key: not key.startswith("optimizer.") and "_extra_state" not in key)
    renamed = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    leaves: dict[str, Any] = {}
    for key, leaf in stored.items():
        if ".layers." not in key:
            leaves[key] = leaf
        for layer in range(2) if ".layers." in key else ():
            name = key.replace(".layers.", f".layers.{layer}.")
            for new, old in renamed.items():
                name = name.replace(new, old)
            leaves[name] = leaf[layer]
    model = Named({name: tuple(leaf.shape) for name, leaf in leaves.items()})
    saved = read(Layout("megatron", place, place), model, True)
    assert {*saved.weights} == {*leaves}
    assert all(torch.equal(saved.weights[name], leaf) for name, leaf in leaves.items())
    assert {*saved.optimizer["state"]} == {*leaves}
    masters = read_distributed(place, lambda key: key.startswith("optimizer.state.param."))
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    master = masters["optimizer.state.param.decoder.layers.mlp.linear_fc1.weight"][1]
    assert torch.equal(saved.optimizer["state"][name]["master_param"], master)


def test_layers_that_are_not_stacked_and_halves_of_their_own():
    """Megatron's other ways to lay layers out: a number after "layers", and gate and up as two keys."""
    stacked = [
        *("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"),
        *(f"decoder.layers.self_attention.linear_qkv.{kind}" for kind in ("weight", "bias", "layer_norm_weight")),
        *("decoder.layers.self_attention.linear_proj.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
        *("decoder.layers.mlp.linear_fc1.weight_w", "decoder.layers.mlp.linear_fc1.weight_v"),
        "decoder.layers.mlp.linear_fc2.weight",
    ]
    keys = [key.replace(".layers.", f".layers.{layer}.") for key in stacked for layer in range(2)]
    pieces = pieces_of(tiny(tied=False), keys, "a test")
    assert pieces["model.layers.1.mlp.up_proj.weight"].key == "decoder.layers.1.mlp.linear_fc1.weight_v"
    assert {piece.key for piece in pieces.values()} == {*keys}
    assert {piece.layer for piece in pieces_of(tiny(tied=False), stacked, "a test").values()} == {None, 0, 1}


@ONE
def test_models_that_are_not_known_or_others(fresh):
    path, _ = fresh
    refused(lambda: loaded(path, model=gpt2()), "which of them a 'gpt2' has is not known here; qwen2, qwen3, llama are")
    refused(lambda: loaded(path, model=tiny(tied=True)), "holds 'output_layer.weight', of which nothing is a parameter")
    deeper = tiny(tied=False)
    deeper.model.layers.append(deeper.model.layers[1])
    from transformers import Qwen2ForCausalLM

    config = deeper.config
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    refused(lambda: loaded(path, model=Qwen2ForCausalLM(config)), "of which no 'model.layers.2.* can be cut")


@ALL
def test_a_missing_file_is_named(fresh):
    path, model = fresh
    for file in sorted(path.rglob("*.distcp")):
        data = file.read_bytes()
        file.unlink()
        refused(lambda: loaded(path, model=model), f"There is no file .*{file.name}")
        file.write_bytes(data[:-300])
        refused(lambda: loaded(path, model=model), f"{file.name} is cut off")
        file.write_bytes(data)


@ALL
def test_what_lies_beside_the_tensors_is_needed(fresh):
    path, model = fresh
    file = next(path.rglob("common.pt"))
    data = file.read_bytes()
    file.unlink()
    refused(lambda: loaded(path, model=model), "There is no file .*common.pt")
    file.write_bytes(data[:-40])
    refused(lambda: loaded(path, model=model), "common.pt")
    torch.save({"iteration": 2, "args": Fraction(1, 2)}, file)
    refused(lambda: loaded(path, model=model), "GLOBAL fractions.Fraction was not an allowed", "nothing .* is executed")
    torch.save({"iteration": 2, "optimizer": {}}, file)
    refused(lambda: loaded(path, model=model), "holds no parameter groups with their steps of one optimizer")


@ALL
def test_files_under_each_others_names_are_seen(fresh):
    path, model = fresh
    one, other, *_ = sorted(path.rglob("*.distcp"))
    one.rename(one.with_suffix(".kept"))
    other.rename(one)
    one.with_suffix(".kept").rename(other)
    refused(lambda: loaded(path, model=model), "distcp")


@ONE
def test_groups_whose_parameters_nothing_tells_are_refused(fresh):
    path, model = fresh
    file = path / "common.pt"
    common = torch.load(file, weights_only=False)

    def groups(**changes: Any) -> None:
        first, second = common["optimizer"]["optimizer"]["param_groups"]
        changed = {**common, "optimizer": {"optimizer": {"param_groups": [first, {**second, **changes}]}}}
        torch.save({key: value for key, value in changed.items() if key != "args"}, file)

    groups(wd_mult=1.0)
    refused(lambda: loaded(path, model=model), "nothing says which parameters each has")
    groups(step=3.0)
    refused(lambda: loaded(path, model=model), "differ in what they do")
    groups(wd_mult=1.0, weight_decay=0.1)  # alike: it does not matter
    state: Any = loaded(path, model=model).optimizer
    assert {*state.weight_decay.values()} == {0.1}
    torch.save({**common, "iteration": 3}, file)
    refused(lambda: loaded(path, model=model), "is of iteration 3, in a folder of iteration 2")


def edited(path: Path, change: Any) -> None:
    """Change a checkpoint's list and write it back."""
    file = next(path.rglob(".metadata"))
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


@ALL
def test_a_key_that_is_missing(fresh):
    path, model = fresh
    key = "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"

    def lose(metadata: Any) -> None:
        del metadata.state_dict_metadata[key]
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            del metadata.storage_data[index]

    edited(path, lose)
    refused(lambda: loaded(path, model=model), f"holds no '{key}'")


def test_masters_of_another_step_are_seen(tmp_path):
    """In float32 weights and masters are the same numbers, saved twice."""
    path, _ = copied("megatron_qwen3", tmp_path)
    place = path / "global_step_2" / "actor" / "dist_ckpt"

    def swap(metadata: Any) -> None:
        rows = {i: i.fqn for i in metadata.storage_data}
        one = [i for i, key in rows.items() if key == "optimizer.state.param.decoder.final_layernorm.weight"]
        two = [i for i, key in rows.items() if key == "optimizer.state.exp_avg.decoder.final_layernorm.weight"]
        data = metadata.storage_data
        data[one[0]], data[two[0]] = data[two[0]], data[one[0]]

    edited(place, swap)
    refused(lambda: loaded(path / "global_step_2"), "both in float32, and they differ: they are of different steps")


def test_newer_versions_keep_the_groups_among_the_tensors(tmp_path):
    """common_state, a ShardedObject of megatron-core's later versions, in the place of common.pt."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    from fkernel.checkpoint.formats.megatron import _groups

    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 4}
    common = [{"optimizer": {"optimizer": {"param_groups": [group]}}}]
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save({"common_state/shard_0_1": common}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    assert _groups(tmp_path, ["common_state/shard_0_1"]) == [{**group, "step": 4.0}]


def test_a_layout_is_not_taken_for_another(tmp_path):
    refused(lambda: loaded(tmp_path), "is no checkpoint that is recognised")
