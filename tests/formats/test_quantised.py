"""Quantised AdamW's `optimizer.pt`: codes mean what their own package says, and step as their own class does."""

from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from tests.formats.family import copied, loaded, refused
from tests.formats.truth import Truth

RUNS = ("quantised_bnb_8bit", "quantised_ao_8bit", "quantised_ao_4bit", "quantised_ao_fp8")
CODED = {"quantised_bnb_8bit": "lm_head.weight"}
"""{run: the parameter whose moments are codes}; of torchao's the table of tokens."""
CLASS = {
    "quantised_bnb_8bit": "bitsandbytes.optim.AdamW",
    "quantised_ao_8bit": "torchao.optim.AdamW8bit",
    "quantised_ao_4bit": "torchao.optim.AdamW4bit",
    "quantised_ao_fp8": "torchao.optim.AdamWFp8",
}


def options(run: str) -> dict[str, Any]:
    """torchao does not say whose its decay is; Trainer's is AdamW's. The frozen matrix is found by its place."""
    return {"decoupled": True} if run == "quantised_ao_fp8" else {}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> tuple[str, Path, Truth]:
    if "_ao_" in request.param and find_spec("torchao") is None:
        pytest.skip("torchao is not installed: what it wrote is refused (below)")
    return request.param, *copied(request.param, tmp_path_factory.mktemp(request.param))


def test_codes_mean_what_their_package_says(run):
    name, path, truth = run
    found = loaded(path, **options(name))
    state: Any = found.optimizer
    assert set(state.names) == set(truth.theta)
    params = dict(found.model.named_parameters())
    for key, theta in truth.theta.items():
        assert torch.equal(params[key], theta), key
        assert torch.equal(state.exp_avg[key], truth.exp_avg[key]), key
        assert torch.equal(state.exp_avg_sq[key], truth.exp_avg_sq[key]), key
    assert {*state.step.values()} == {2} == {found.step}
    assert found.stored is not None
    coded = CODED.get(name, "model.embed_tokens.weight")
    assert found.stored.writers[coded] == CLASS[name]
    kept = found.stored.entries[coded]
    codes = [*(leaf for key, leaf in kept.items() if key in ("state1", "state2", "exp_avg", "exp_avg_sq"))]
    assert len(codes) == 2
    assert all(leaf.dtype == torch.uint8 or type(leaf).__module__.startswith("torchao.") for leaf in codes)


def test_the_next_step_is_the_executed_one(run):
    """The package's own kernels on the loaded codes, against what the training did next."""
    name, path, truth = run
    found = loaded(path, **options(name))
    assert found.stored is not None
    params = {key: leaf.detach() for key, leaf in found.model.named_parameters() if leaf.requires_grad}
    step = fk.precond.executed_step(params, {**truth.grads}, found.stored)
    for key, moved in step.delta.items():
        taken = (truth.after[key].double() - truth.theta[key].double()).float()
        assert torch.equal(moved, taken), key
    assert step.moved > 0.01


def test_the_exact_step_is_close(run):
    """AdamW in the codes' real numbers; the executed one rounds its moments again, which the step does not see."""
    name, path, truth = run
    found = loaded(path, **options(name))
    params = {key: leaf.detach() for key, leaf in found.model.named_parameters() if leaf.requires_grad}
    state: Any = found.optimizer
    step = fk.precond.adamw_step(params, {**truth.grads}, state)
    for key, moved in step.total.items():
        torch.testing.assert_close(moved, truth.after[key] - truth.theta[key], rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("name", RUNS)
def test_damaged_files_are_named(name, tmp_path):
    path, _ = copied(name, tmp_path)
    file = path / "optimizer.pt"
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        header = archive.getinfo("optimizer/data/1").header_offset
    lengths = (int.from_bytes(data[header + at : header + at + 2], "little") for at in (26, 28))
    data[header + 30 + sum(lengths)] ^= 1
    file.write_bytes(data)
    refused(lambda: loaded(path, **options(name)), "optimizer.pt is damaged: Bad CRC-32")
    file.write_bytes(data[:-200])
    refused(lambda: loaded(path, **options(name)), "optimizer.pt")


@pytest.mark.parametrize("name", RUNS[1:])
def test_torchaos_codes_are_refused_where_it_is_not_installed(name, tmp_path, monkeypatch):
    from fkernel.checkpoint import files

    monkeypatch.setattr(files, "find_spec", lambda _: None)
    monkeypatch.setattr("torch._weights_only_unpickler._marked_safe_globals_set", set())  # restored for other tests
    path, _ = copied(name, tmp_path)
    refused(lambda: loaded(path, **options(name)), r"optimizer.pt could not be read .*GLOBAL torchao\.")
    assert loaded(path, optimizer=False).optimizer is None


def test_codes_without_their_map_are_refused(tmp_path):
    path, _ = copied("quantised_bnb_8bit", tmp_path)
    file = path / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    entries = [entry.get("__bnb_optimizer_quant_state__", entry) for entry in state["state"].values()]
    coded = next(entry for entry in entries if entry["state1"].dtype == torch.uint8)
    kept = coded.pop("absmax2")
    torch.save(state, file)
    refused(lambda: loaded(path, **options("quantised_bnb_8bit")), "has 8-bit codes .* and no absmax2")
    coded["absmax2"] = kept[:-1]
    torch.save(state, file)
    refused(lambda: loaded(path, **options("quantised_bnb_8bit")), "4096 codes .* and 15 scales")
