"""A study of long sequences, walked layer by layer and kept nowhere: the numbers that whole passes find."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.engine import layerwise
from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import computed
from fkernel.engine.planning import Strategy
from fkernel.engine.planning.estimates import Walking
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.store import Store
from fkernel.engine.streaming import self_kernel
from fkernel.engine.walked import ALONE, WalkedGradients
from fkernel.func import Sequences, contract, make_functional, pad, sequence_logprob
from fkernel.func.handles.products import ProductSpec, RowSpec
from fkernel.func.layers import cutting
from fkernel.rollout import GeneratedBatch, Sampling, save_batch
from fkernel.rollout.record import Provenance, SequenceRecord
from fkernel.study import (
    FisherKernelPlan,
    FisherKernelResults,
    FisherKernelRunner,
    forecast,
    influence_of,
    load_workspace,
    serialize_workspace,
)
from tests.rollout.conftest import byte_tokenizer, policy
from tests.study.test_workspace import asking, in_a_fork

T, N = 1100, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a context of 2048 tokens and an optimizer with a past."""
    where = tmp_path_factory.mktemp("long")
    with torch.random.fork_rng():
        model = policy(context=2048)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5)
        for leaf in model.parameters():
            leaf.grad = 0.01 * torch.randn_like(leaf)
        optimizer.step()
    model.save_pretrained(where / "model")
    byte_tokenizer().save_pretrained(where / "model")
    torch.save(optimizer.state_dict(), where / "optimizer.pt")
    return where


def batch(prefix: str, n: int, seed: int, fingerprint: str | None) -> GeneratedBatch:
    """Sequences of some 1100 tokens, of which 40 are the prompt's; the shortest of U stands first."""
    generator, records = torch.Generator().manual_seed(seed), []
    for k in range(n):
        ids = torch.randint(3, 259, (T + 7 * k,), generator=generator).tolist()
        response = tuple(ids[40:])
        each = (-1.0,) * len(response)
        where = Provenance(f"{prefix}{k // 2}", "train", "random", k // 2, k % 2)
        record = SequenceRecord(
            f"{prefix}-00{k}-00", tuple(ids[:40]), response, "p", "r", each, each, (1.0,) * len(each), "eos", where
        )
        records.append(replace(record, reward=float(k), advantage=float(2 * k - 1), weight=0.5 / n))
    return GeneratedBatch(tuple(records), fingerprint, Sampling(temperature=1.0))


def plan(place: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """U of three long sequences, a request of two others, and one of U itself."""
    fingerprint = checkpoint.load(place, dtype=torch.float64).provenance.fingerprint
    return {
        "checkpoint": {"path": str(place)},
        "update": {"kind": "payload", "batch": batch("U", N, 1, fingerprint)},
        "requests": [
            {"kind": "payload", "name": "held_out", "batch": batch("E", 2, 2, fingerprint)},
            {"kind": "update", "name": "self"},
        ],
        "self_kernel": True,
        "capture": {"kernel": True},
        "analyses": {
            "health": True,
            "ledger": True,
            "parts": True,
            "uncertainty": {"draws": 50},
            "counterfactuals": [{"name": "without", "drop": ["U-001-*"]}],
        },
        "storage": {"pictures": False},
        "numerics": {"dtype": "float64"},
        "out": str(out),
        **changes,
    }


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Have walks take the attention that whole passes take, whose softmax is float32 even here: to the last digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "FUSED", 10**6)
        yield


@contextmanager
def short() -> Iterator[None]:
    """Have long sequences taken for short ones."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("planning.estimates", "planning.workloads", "gradients"):
            patch.setattr(sys.modules[f"fkernel.engine.{module}"], "LONG", 10**6)
        yield


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> FisherKernelResults:
    """What whole passes find, whose gradients are kept."""
    with short():
        return FisherKernelRunner(plan(place, tmp_path_factory.mktemp("whole") / "out")).run()


def agree(found: FisherKernelResults, expected: FisherKernelResults) -> None:
    """All numbers of two studies are the same, but for rounding."""
    for name, request in expected.requests.items():
        own = found[name]
        for what in ("kernel", "contributions", "momentum", "decay", "squared_norms", "diagonal", "batch"):
            close(own.kept(what), request.kept(what), what)
        close(own.update_diagonal, request.update_diagonal, "update_diagonal")
        for analysis in ("parts", "counterfactuals.without", "uncertainty"):
            for what, values in request.analyses[analysis].arrays.items():
                close(own.analyses[analysis].arrays[what], values, f"{analysis} {what}", 1e-4)
        for what, values in request.analyses["ledger"].arrays.items():
            # S is some 6000 nats, of attention whose softmax is float32: so much of a change is rounding.
            np.testing.assert_allclose(own.analyses["ledger"].arrays[what], values, atol=1e-5, err_msg=what)
    ours, theirs = found.self_kernel, expected.self_kernel
    assert ours is not None
    assert theirs is not None
    close(ours.kernel, theirs.kernel, "K_UU")
    close(ours.squared_norms, theirs.squared_norms, "norms of U")
    assert found.analyses["health"].facts["dominated"] == expected.analyses["health"].facts["dominated"]


def close(found: Any, expected: Any, what: str, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=rtol * 0.1 * np.abs(expected).max(), rtol=rtol, err_msg=what)


def on_disk(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


@pytest.mark.turns(6)
@pytest.mark.parametrize("numerics", [{"memory": "150MB"}, {}], ids=["granted", "not"])
def test_walked_it_is_what_whole_passes_find(place, tmp_path, whole, numerics):
    numerics = {"dtype": "float64", **numerics}
    agree(FisherKernelRunner(plan(place, tmp_path / "out", numerics=numerics)).run(), whole)


@pytest.mark.turns(6)
def test_of_long_sequences_no_gradient_is_kept(place, tmp_path):
    runner = FisherKernelRunner(plan(place, tmp_path / "out", analyses={}, self_kernel=False, requests=[]))
    runner.run()
    vector = 8 * sum(leaf.numel() for leaf in runner.policy.params.values())
    workspace = tmp_path / "out" / "workspace"
    assert not (workspace / "gradients").exists()
    assert on_disk(workspace) - on_disk(workspace / "kept") - on_disk(workspace / "batch") < 2.2 * vector

    foretold = forecast(FisherKernelPlan.model_validate(plan(place, tmp_path / "out")))
    assert foretold.disk == 0
    names = ["sum over U", "U with itself", "request held_out", "request self"]
    assert [phase.name for phase in foretold.phases] == names


@pytest.mark.turns(6)
def test_walked_gradients_are_those_that_are_computed_whole():
    """Any length will do, and sequences of weight 0 count for nothing."""
    S, params, batch = tiny()
    side = SortedBatch("U", batch, S)
    walked = WalkedGradients(side, params, Walking())
    with short():
        whole = computed(side, ((1.0, params),), [slice(0, 1), slice(1, 4)])
    w = torch.tensor([0.5, 0.0, -2.0, 1.0])
    for name, found in walked.weighted_sum(w).items():
        close(found, whole.weighted_sum(w)[name], name)
        close(walked.squared_sum(w)[name], whole.squared_sum(w)[name], name)
    D = {name: leaf.abs() + 1 for name, leaf in params.items()}
    close(walked.along(params), whole.along(params), "along")
    close(walked.squared_norms(D).plain, whole.squared_norms(D).plain, "norms")
    K, norms = walked.with_itself(D)
    close(K, self_kernel(whole, D)[0], "K")
    close(norms, walked.squared_norms(D).plain, "norms")
    for strategy in (Strategy("layers", "U", 20, 20, 0), Strategy("layers", "E", None, None, 40, 2)):
        close(walked.with_itself(D, strategy)[0], K, "K")
    close(contract(walked.one(2), walked.one(1), diagonal=D)[0, 0], K[2, 1], "one")


def test_rows_walk_alone_at_all_nodes_of_a_path():
    """Squares of a sum over nodes are no sum of squares."""
    S, params, batch = tiny()
    step = {name: 0.1 * leaf.sign() for name, leaf in params.items()}
    problem = Problem(
        params, SortedBatch("E", batch, S), None, ProductSpec(x=RowSpec({"v": params}, {"n": None})), "gauss2", step
    )
    found, expected = torch.empty(2, 2, 4, dtype=torch.float64)
    for strategy, values in ((ALONE, found), (Strategy("sequences", "E", None, None, 40), expected)):
        for block in blocks(problem, strategy):
            values[:, block.at] = torch.stack([block.rows("v"), block.rows("n")])
    close(found, expected, "rows")


def tiny() -> tuple[Any, dict[str, torch.Tensor], Sequences]:
    """S of a tiny model in float64, and four sequences whose lengths do not fall."""
    apply, params = make_functional(policy(context=64).double())
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 259, (t,), generator=generator).tolist() for t in (9, 20, 14, 30)]
    return sequence_logprob(apply), params, pad([each[:3] for each in ids], [each[3:] for each in ids])


def test_a_short_workspace_makes_the_same_step_and_reads_no_gradient(run, tmp_path, monkeypatch):
    """A finished workspace is opened by one vector, by itself or by its plan."""
    spec = asking(run, tmp_path / "out")
    first = FisherKernelRunner(spec)
    first.run()

    def read(*given: Any) -> Any:
        raise AssertionError("a gradient was read")

    monkeypatch.setattr(Store, "read", read)
    again, other = FisherKernelRunner(spec), FisherKernelRunner(spec)
    again.prepare_update_workspace().close()
    with load_workspace(tmp_path / "out" / "workspace") as workspace:
        other.adopt(workspace)
    assert first._step is not None
    for runner in (again, other):
        assert runner._step is not None
        for name, leaf in first._step.total.items():
            assert torch.equal(runner._step.total[name], leaf)


@pytest.mark.turns(6)
def test_a_finished_workspace_walks_nothing_again(place, tmp_path, monkeypatch):
    """A rerun answers from what is kept; a new request needs E's gradients and U's, and Δθ is read, not walked for."""
    spec = plan(place, tmp_path / "out", analyses={}, self_kernel=False)
    first = FisherKernelRunner(spec).run()
    for module in (layerwise, sys.modules["fkernel.engine.by_layer"], sys.modules["fkernel.engine.gradients"]):
        monkeypatch.setattr(module, "Walk", None)
    runner = FisherKernelRunner(spec)
    again = runner.run()
    assert runner.workspace is not None
    assert runner.workspace.gradients.computed == 0
    for name, result in first.requests.items():
        np.testing.assert_array_equal(again[name].contributions, result.contributions)


@pytest.mark.turns(6)
def test_stopped_in_the_middle_it_goes_on_to_the_same_numbers(place, tmp_path):
    """Killed while U walks, and after its sum is sealed."""
    small = {"analyses": {}, "self_kernel": False, "requests": plan(place, tmp_path)["requests"][:1]}
    began = time.perf_counter()
    expected = FisherKernelRunner(plan(place, tmp_path / "whole", **small)).run()
    took = time.perf_counter() - began
    for k, share in enumerate((0.2, 0.4, 0.6, 0.8)):
        spec = plan(place, tmp_path / f"killed-{k}", **small)
        child = in_a_fork(lambda spec=spec: FisherKernelRunner(spec).run())
        time.sleep(share * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = FisherKernelRunner(spec).run()
        np.testing.assert_array_equal(found["held_out"].contributions, expected["held_out"].contributions)


@pytest.mark.turns(6)
def test_without_a_model_it_says_which_command_works_and_with_the_plan_that_works(place, tmp_path, whole):
    from typer.testing import CliRunner

    from fkernel.cli import app

    saved = {"kind": "from_file", "path": str(tmp_path / "U")}
    save_batch(plan(place, tmp_path)["update"]["batch"], tmp_path / "U")
    spec = plan(place, tmp_path / "out", update=saved, analyses={}, self_kernel=False, requests=[])
    results = FisherKernelRunner(spec).run()
    results.save_results(tmp_path / "out")
    where = tmp_path / "out" / "workspace"
    with load_workspace(where) as workspace:
        for question in (workspace.self_kernel, lambda: influence_of(workspace), lambda: workspace.norms):
            with pytest.raises(fk.StoreError, match="keeps no gradients"):
                question()
    command = ["query", str(where), "U-000-00", "U-002-00", "--json"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "keeps no gradients" in refused.output
    answered = CliRunner().invoke(app, [*command, "--plan", str(tmp_path / "out" / "plan.json")])
    assert answered.exit_code == 0, answered.output
    assert whole.self_kernel is not None
    close(json.loads(answered.output)["kernel"], whole.self_kernel.kernel[0, 2], "K")


@pytest.mark.turns(6)
def test_in_memory_it_answers_and_can_be_written(place, tmp_path, whole):
    with FisherKernelRunner(plan(place, tmp_path, storage={"persist": False})).prepare_update_workspace() as workspace:
        serialize_workspace(workspace, tmp_path / "written")
        alone = workspace.norms  # before U meets itself
        close(alone.weighted, np.diagonal(whole.self_kernel.kernel), "norms")
        close(workspace.self_kernel(), whole.self_kernel.kernel, "K_UU")
        nats = influence_of(workspace)
    close([*nats.values()], whole.self_kernel.kernel @ workspace.weights.numpy(), "influence")
    with load_workspace(tmp_path / "written") as again:
        assert again.gradients.walked
        assert again.ascent().keys() == workspace.ascent().keys()


@pytest.mark.turns(6)
def test_influence_alone_walks_neither_side_whole(place, tmp_path, whole):
    """Without K, U's sum is one walk, and E's rows are walked by themselves, halfway along the step."""
    capture = {"top_k": 0, "kernel": False, "realised": False}
    spec = plan(place, tmp_path / "out", capture=capture, analyses={}, self_kernel=False)
    found = FisherKernelRunner(spec).run()
    for name in ("held_out", "self"):
        close(found[name].kept("batch"), whole[name].kept("batch"), name)
        close(found[name].kept("momentum"), whole[name].kept("momentum"), name)


@pytest.mark.turns(6)
def test_a_damaged_ascent_is_not_served(place, tmp_path):
    spec = plan(place, tmp_path / "out", analyses={}, self_kernel=False, requests=[])
    FisherKernelRunner(spec).run()
    path = tmp_path / "out" / "workspace" / "ascent.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(fk.StoreError, match="is not what was written"):
        FisherKernelRunner(spec).run()


@pytest.mark.turns(6)
def test_adopted_it_makes_the_same_step(place, tmp_path):
    """Δθ of a workspace that was opened by itself is made of the ascent that it keeps."""
    spec = plan(place, tmp_path / "out", analyses={}, self_kernel=False)
    first = FisherKernelRunner(spec).run()
    runner = FisherKernelRunner(spec)
    with load_workspace(tmp_path / "out" / "workspace") as workspace:
        runner.adopt(workspace)
        found = runner.evaluate_batch(runner.plan.requests[0])
    np.testing.assert_array_equal(found.contributions, first["held_out"].contributions)
