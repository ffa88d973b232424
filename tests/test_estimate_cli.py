"""`fkernel estimate`: what a kernel would take, from a configuration without weights."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config
from typer.testing import CliRunner

import fkernel as fk
from fkernel import func
from fkernel.checkpoint import estimate_model, load_model, skeleton_of, workload_of
from fkernel.checkpoint.skeleton import SHAPE
from fkernel.cli import app
from fkernel.engine.planning import Rates
from fkernel.engine.planning.strategy import NAMES
from fkernel.engine.planning.workloads import workload
from fkernel.func.inputs.objective import is_readable

RATES = Rates(flops=1e11, moved=1e10, call=5e-6, forming=1e11, write=1e9, read=2e9)
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
TINY_SHAPE = ",".join(f"{key}={value}" for key, value in TINY.items())
T = 12
SMALL = ("--n-u", "3", "--n-e", "2", "--tokens", "8")


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch):
    monkeypatch.setattr("fkernel.checkpoint.skeleton.rates", lambda dtype: RATES)
    planning = sys.modules["fkernel.engine.planning.estimates"]  # `fkernel.kernel` is a function
    monkeypatch.setattr(planning, "rates", lambda dtype: RATES)


def gpt2(**changes) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 17, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, **changes})


def run(*args: str):
    return CliRunner().invoke(app, ["estimate", *args])


# ----------------------------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (Qwen2Config(**{**TINY, "num_hidden_layers": 2}, tie_word_embeddings=True), torch.float32),
        (gpt2(), torch.float64),
    ],
    ids=["Qwen2", "GPT-2"],
)
def test_a_skeleton_counts_what_the_model_counts(config, dtype, tmp_path):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    apply, params = func.make_functional(model)
    S, E, U = func.sequence_logprob(apply), *(func.pad([[1, 2]] * k, [[3] * (T - 2)] * k) for k in (3, 4))
    real = workload(S, params, E, U)

    config.save_pretrained(tmp_path)
    bones = skeleton_of(tmp_path, T, dtype)
    assert {name: leaf.shape for name, leaf in bones.params.items()} == {name: p.shape for name, p in params.items()}
    assert all(leaf.is_meta and leaf.dtype == dtype for leaf in bones.params.values())
    found = workload_of(bones, n_U=4, n_E=3)
    assert vars(found) == vars(real)
    for t in (1, T):
        assert found.gradients(t) == real.gradients(t)
        assert (found.peak(t), found.kept(t)) == (real.peak(t), real.kept(t))


def test_a_shape_is_a_tied_qwen2(tmp_path):
    Qwen2Config(**TINY, tie_word_embeddings=True).save_pretrained(tmp_path)
    counts = [vars(workload_of(skeleton_of(model, T), 3, 2)) for model in (TINY_SHAPE, tmp_path)]
    assert counts[0] == counts[1]
    untied = skeleton_of(f"{TINY_SHAPE},tie_word_embeddings=false", T).params
    assert fk.tree.size(untied) == counts[0]["size"] + TINY["vocab_size"] * TINY["hidden_size"]


@pytest.mark.parametrize("memory", [None, "2MB"])
def test_the_estimate_is_that_of_the_loaded_model(tmp_path, memory):
    config = Qwen2Config(**TINY, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    apply, params = func.make_functional(load_model(tmp_path))
    S, E, U = func.sequence_logprob(apply), *(func.pad([[1, 2]] * k, [[3] * (T - 2)] * k) for k in (2, 5))
    real = fk.estimate(S, params, E, U, fk.precond.identity(), memory=memory)
    found = estimate_model(tmp_path, n_U=5, n_E=2, tokens=T, memory=memory)
    assert found.options == real.options
    assert found.chosen == real.chosen
    assert found.reason == real.reason


def test_nothing_is_read_from_the_meta_device():
    bones = skeleton_of(TINY_SHAPE, T)
    assert not is_readable(bones.one)
    assert not is_readable(bones.params)


@pytest.mark.parametrize("length", [64, 1030], ids=["eager", "fused"])
def test_a_layer_too_large_to_be_built_is_counted_as_one_that_is_built(length):
    shape = TINY_SHAPE.replace("=32", "=256").replace("num_attention_heads=4", "num_attention_heads=16")
    built, counted = (
        _counted_with(limit, shape.replace("num_key_value_heads=2", "num_key_value_heads=8"), length)
        for limit in (1 << 28, 1000)
    )
    assert not isinstance(built, str)
    assert counted == built


def _counted_with(limit: int, shape: str, length: int) -> Any:
    with patch("fkernel.checkpoint.skeleton.LARGEST", limit):
        return workload_of(skeleton_of(shape, length), 2, 2, whole=False).walk


def test_seventy_billion_parameters_on_64_ranks_take_seconds():
    shape = "hidden_size=8192,intermediate_size=28672,num_hidden_layers=80,num_attention_heads=64"
    shape += ",num_key_value_heads=8,vocab_size=128256,tie_word_embeddings=0"
    start = time.process_time()
    result = run(shape, "--n-u", "512", "--n-e", "64", "--tokens", "2048", "--processes", "64", "--json")
    assert time.process_time() - start < 20
    record = json.loads(result.stdout)
    P, W = 70_553_706_496 + 80 * (8192 + 2 * 1024), 64  # Llama's, and the biases of Qwen2
    assert record["sent"]["rows"] == pytest.approx(576 * P * 4 * (W - 1) / W**2)
    layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672  # multiplications of a token in its matrices
    passes = 8 * 2048 * (80 * layer + 128256 * 8192) * (576 + 512)  # forward twice, both gradients
    assert passes / W < record["flops"] < 1.15 * passes / W  # attention itself, and the products, are little
    assert not record["fits"]


_MEASURED = """
import sys
import time
from benchmarks.memory import _status
from fkernel.checkpoint import skeleton_of, workload_of
load = workload_of(skeleton_of(sys.argv[1], 128), 32, 16)
print(load.size, int(1e6 * _status("VmHWM")))  # and not ru_maxrss, which has what started this process in it
"""


def test_the_shape_of_qwen2_5_has_half_a_billion_parameters():
    assert fk.tree.size(skeleton_of(SHAPE, 128).params) == 494_032_768


@pytest.mark.turns(6)
def test_parameters_take_no_room():
    shape = SHAPE.replace("=896", "=14336").replace("=24", "=1")  # one layer, 10 GB if it had weights
    root = Path(fk.__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", _MEASURED, shape], cwd=root, capture_output=True, text=True, check=True)
    parameters, resident = map(int, out.stdout.split())
    assert resident < 1.5e9 < 4 * parameters / 5


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_table_has_a_row_a_strategy_and_says_what_is_chosen():
    result = run(TINY_SHAPE, *SMALL, "--memory", "100MB")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == list(NAMES)
    chosen = next(row.split()[1] for row in rows if "yes, chosen" in row)
    assert f"Chosen: {chosen} (" in result.stdout
    assert "fastest feasible" in result.stdout
    assert "no: no directory was given" in result.stdout
    assert "3 × 2 sequences of 8 tokens" in result.stdout


def test_without_a_grant_the_default_is_chosen():
    result = run(TINY_SHAPE)
    assert result.exit_code == 0
    assert "32 × 16 sequences of 128 tokens" in result.stdout
    assert "no memory grant was given" in result.stdout


def test_json_holds_what_the_library_predicts():
    result = run(TINY_SHAPE, *SMALL, "--memory", "100MB", "--store", "--dtype", "float64", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    found = estimate_model(TINY_SHAPE, 3, 2, 8, memory="100MB", store=True, dtype=torch.float64)
    assert found.chosen is not None
    assert record["parameters"] == found.workload.size
    assert (record["itemsize"], record["budget"]) == (8, 100_000_000)
    assert [o["seconds"] for o in record["options"]] == [o.seconds for o in found.options]
    assert all(o["feasible"] for o in record["options"])
    assert record["chosen"]["strategy"] == found.chosen.strategy._asdict()
    assert record["reason"] == found.reason


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_grant_that_nothing_fits_exits_with_1_and_says_what_would_do(form):
    result = run(TINY_SHAPE, *SMALL, "--memory", "1KiB", *form)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "Give at least " in result.stderr
    assert json.loads(result.stdout)["chosen"] is None if form else "no: needs" in result.stdout


def test_what_would_do_does():
    result = run(TINY_SHAPE, *SMALL, "--memory", "1KiB")
    needed = int(result.stderr.split("Give at least ")[1].split(" bytes")[0])
    assert run(TINY_SHAPE, *SMALL, "--memory", str(needed)).exit_code == 0
    assert run(TINY_SHAPE, *SMALL, "--memory", str(needed - 1)).exit_code == 1


def changed(key: str, value: str) -> str:
    return ",".join(f"{name}={value if name == key else number}" for name, number in TINY.items())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], ["MODEL", "'nowhere'", "no such directory", "hidden_size="]),
        (["."], ["MODEL", "'.'", "config.json", "hidden_size="]),
        ([f"{TINY_SHAPE},hiden_size=3"], ["'hiden_size'", "'hidden_size'"]),
        ([f"{TINY_SHAPE},zzz=3"], ["'zzz'", "expected one of", "vocab_size", "num_key_value_heads"]),
        ([f"{TINY_SHAPE},vocab_size=3"], ["'vocab_size'", "twice"]),
        (["hidden_size=8,vocab_size=9"], ["lacks", "'intermediate_size'", "'num_hidden_layers'"]),
        ([changed("vocab_size", "many")], ["vocab_size is 'many'", "whole number"]),
        ([changed("vocab_size", "")], ["vocab_size is ''", "whole number"]),
        ([changed("num_hidden_layers", "0")], ["num_hidden_layers is '0'", "at least 1"]),
        ([changed("num_attention_heads", "5")], ["hidden_size=32", "num_attention_heads=5"]),
        ([changed("num_key_value_heads", "3")], ["num_attention_heads=4", "num_key_value_heads=3"]),
        ([f"{TINY_SHAPE},tie_word_embeddings=2"], ["tie_word_embeddings is '2'", "0 or 1"]),
        ([TINY_SHAPE, "--memory", "lots"], ["memory is 'lots'", "8GiB"]),
        ([TINY_SHAPE, "--n-u", "0"], ["--n-u is 0", "at least 1"]),
        ([TINY_SHAPE, "--n-e", "-1"], ["--n-e is -1", "at least 1"]),
        ([TINY_SHAPE, "--tokens", "1"], ["--tokens is 1", "at least 2"]),
        ([TINY_SHAPE, "--dtype", "bfloat16"], ["--dtype is 'bfloat16'", "float32"]),
    ],
    ids=lambda value: None if isinstance(value, list) and "--" not in str(value) else str(value)[-24:],
)
def test_a_mistake_is_told_in_one_line(args, words):
    result = run(*args)
    assert result.exit_code == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["config.json", "no configuration"]),
        ('{"model_type": "unheard_of"}', ["config.json", "unheard_of"]),
        ('{"model_type": "t5"}', ["no causal language model"]),
        ('{"model_type": "gpt2", "n_positions": 16, "n_embd": 9, "n_head": 2}', ["no causal language model"]),
        ('{"model_type": "gpt2", "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}', ["128", "holds 16"]),
    ],
    ids=["no JSON", "unknown type", "no decoder", "impossible", "short context"],
)
def test_a_directory_that_is_no_model_is_refused(content, words, tmp_path):
    (tmp_path / "config.json").write_text(content)
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_a_directory_never_runs_its_own_code(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "ran" not in result.output.split()


def test_the_library_names_its_own_arguments():
    with pytest.raises(fk.BatchError, match="n_U is 0"):
        estimate_model(TINY_SHAPE, n_U=0, n_E=1, tokens=8)
    with pytest.raises(fk.BatchError, match="tokens is 1"):
        skeleton_of(TINY_SHAPE, tokens=1)
