"""A workspace is complete, or the next run goes on with it, or it is refused; whatever stops the program."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.func.handles.forms import tensors
from fkernel.io import checksummed_json
from fkernel.study import FisherKernelRunner, load_workspace
from fkernel.study.directory import WorkspaceDirectory
from tests.study.conftest import Run
from tests.study.test_runner import executed, same


def asking(run: Run, place: Path, **changes: Any) -> dict[str, Any]:
    """A plan with one request that is cheap, and a workspace of microbatches of two sequences."""
    quick = {
        "requests": [{"kind": "evaluation", "name": "held_out", "batch_size_prompts": 2}],
        "capture": {"kernel": True},
        "numerics": {"microbatch": 2},
    }
    return run.plan(place, **{**quick, **changes})


def in_a_fork(act: Any) -> int:
    """Start a process that acts; it ends with 0 where that goes well."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        act()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.turns(6)
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_goes_on_to_the_same_bits(run, tmp_path):
    """U is drawn, so that sampling is among what is interrupted; `make torture` stops a run at every operation."""
    draw = {
        "kind": "update",
        "batch_size_prompts": 3,
        "completions_per_prompt": 3,
        "reward": "tests.study.conftest.brevity",
    }
    expected = executed(asking(run, tmp_path / "whole", update=draw))

    def work(out: Path) -> None:
        executed(asking(run, out, update=draw))

    began = time.perf_counter()
    os.waitpid(in_a_fork(lambda: work(tmp_path / "timed")), 0)
    whole = time.perf_counter() - began
    moments, kills, finished = random.Random(0), 0, 0
    out = tmp_path / "killed-0"
    while kills < 8:
        child = in_a_fork(partial(work, out))
        time.sleep(moments.uniform(0.05, 1.0) * whole)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0  # it was complete before it could be killed
            same(executed(asking(run, out, update=draw)), expected)
            finished += 1
            out = tmp_path / f"killed-{finished}"
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        _complete_or_said_to_be_absent(out)
    same(executed(asking(run, out, update=draw)), expected)


def _complete_or_said_to_be_absent(out: Path) -> None:
    said = ""
    try:
        with load_workspace(out / "workspace") as workspace:
            assert workspace.self_kernel().isfinite().all()
    except fk.StoreError as error:
        said = str(error)
    assert not said or "no workspace" in said or "not complete" in said


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_run_that_was_cut_off_computes_only_what_is_missing(run, tmp_path, monkeypatch, after):
    from fkernel.engine.store import Store

    expected = executed(asking(run, tmp_path / "whole"))
    plan, write, written = asking(run, tmp_path / "out"), Store.write, []

    def stopping(self, i, handles):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(i)
        write(self, i, handles)

    monkeypatch.setattr(Store, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        executed(plan)
    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(fk.StoreError, match="not complete; run its plan again"):
        load_workspace(tmp_path / "out" / "workspace")
    runner = FisherKernelRunner(plan)
    same(runner.run(), expected)
    assert runner.workspace is not None
    assert 0 < runner.workspace.gradients.computed < 9


@pytest.fixture(scope="module")
def kept(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("kept")
    executed(asking(run, place / "out"))
    return place / "out" / "workspace"


def test_what_differs_is_named(run, kept, tmp_path):
    at = {"workspace": str(kept), "pictures": False}
    changes = {
        "preconditioner": (
            {"form": "post-step", "calibrated": False},
            "preconditioner.calibrated: stored true, asked for false",
        ),
        "parameters": (["*norm*"], "parameters.patterns: stored null"),
        "step": ({"max_norm": 2.0}, "step.max_norm: stored 0.05, asked for 2.0"),
        "numerics": ({"temperature": 0.7, "microbatch": 2}, "temperature: stored 1.0, asked for 0.7"),
        "update": (
            {"kind": "update", "batch_size_prompts": 3, "completions_per_prompt": 3, "reward": None},
            "update.batch: stored",
        ),
    }
    for key, (value, message) in changes.items():
        with pytest.raises(fk.StoreError, match="is of something else") as caught:
            executed(asking(run, tmp_path / key, **{key: value, "storage": at}))
        assert message in str(caught.value), caught.value


def test_another_checkpoint_or_another_optimizer_state_is_refused(run, kept, tmp_path):
    loaded = checkpoint.load(run.before)
    with torch.no_grad():
        loaded.model.lm_head.weight[5, 5] += 1e-6
    loaded.model.save_pretrained(tmp_path / "other" / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "other" / "model")
    state = torch.load(run.before / "optimizer.pt", weights_only=True)
    torch.save(state, tmp_path / "other" / "optimizer.pt")
    at = {"workspace": str(kept), "pictures": False}
    written = {"kind": "payload", "batch": run.batch}
    with pytest.raises((fk.PlanError, fk.StoreError), match="checkpoint"):
        executed(asking(run, tmp_path / "a", checkpoint={"path": str(tmp_path / "other")}, storage=at, update=written))
    (tmp_path / "third").mkdir()
    os.symlink(run.before / "model", tmp_path / "third" / "model")
    state["param_groups"][0]["lr"] *= 2
    torch.save(state, tmp_path / "third" / "optimizer.pt")
    with pytest.raises(fk.StoreError, match="optimizer: stored"):
        executed(asking(run, tmp_path / "b", checkpoint={"path": str(tmp_path / "third")}, storage=at))


def copied(kept: Path, place: Path) -> Path:
    import shutil

    shutil.copytree(kept, place)
    return place


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("asked.json", "cannot be read"),
        ("complete.json", "cannot be read"),
        ("response.safetensors", "is not what was written"),
        ("batch/tokens.safetensors", "is damaged"),
        ("batch/records.jsonl", "is damaged"),
        ("gradients/shard-00001.safetensors", "not served"),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_never_served(kept, tmp_path, file, message, damage):
    place = copied(kept, tmp_path / "copy")
    path = place / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x41
        path.write_bytes(content)
    with pytest.raises((fk.StoreError, fk.RolloutError)) as caught, load_workspace(place) as workspace:
        workspace.self_kernel()
    if damage == "truncated" or file.endswith("safetensors"):
        assert message in str(caught.value) or "is missing" in str(caught.value) or damage == "missing"


def test_another_batch_of_the_same_ids_is_not_served(run, kept, tmp_path):
    """Undamaged, of the same policy, tokens and ids; its advantages are others."""
    import shutil

    from fkernel.rollout import save_batch

    place = copied(kept, tmp_path / "copy")
    shutil.rmtree(place / "batch")
    save_batch(run.batch.with_values("advantage", 2 * run.batch.advantages), place / "batch")
    with pytest.raises(fk.StoreError, match="is not the batch that this workspace was made of"):
        load_workspace(place)
    at = {"workspace": str(place), "pictures": False}
    with pytest.raises(fk.StoreError, match="is not the batch that this workspace was made of"):
        executed(asking(run, tmp_path / "out", storage=at))


def test_a_schema_that_is_newer_is_refused(kept, tmp_path):
    place = copied(kept, tmp_path / "copy")
    spec = json.loads((place / "asked.json").read_text())
    del spec["seal"]
    (place / "asked.json").write_bytes(checksummed_json({**spec, "schema": 99}))
    with pytest.raises(fk.StoreError, match="schema 99"):
        load_workspace(place)


def test_two_processes_read_a_workspace_together(kept, tmp_path):
    place = copied(kept, tmp_path / "copy")
    with load_workspace(place):
        child = in_a_fork(lambda: load_workspace(place))
        assert os.waitpid(child, 0)[1] == 0
        load_workspace(place).close()
    load_workspace(place).close()


def test_a_directory_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    at = {"workspace": str(tmp_path / "mine"), "pictures": False}
    with pytest.raises(fk.StoreError, match=r"is no workspace.*'thesis.tex'"):
        executed(asking(run, tmp_path / "out", storage=at))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(fk.StoreError, match="There is no workspace at"):
        load_workspace(tmp_path / "nowhere")


def test_a_disk_that_is_full_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    import errno

    plan = asking(run, tmp_path / "out")
    real = WorkspaceDirectory.seal

    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WorkspaceDirectory, "seal", full)
    with pytest.raises(OSError, match="No space left"):
        executed(plan)
    monkeypatch.setattr(WorkspaceDirectory, "seal", real)
    with pytest.raises(fk.StoreError, match="not complete"):
        load_workspace(tmp_path / "out" / "workspace")
    runner = FisherKernelRunner(plan)
    runner.run()
    assert runner.workspace is not None
    assert runner.workspace.gradients.computed == 0


@pytest.mark.turns(6)
def test_requests_stream(run, tmp_path):
    """Rows of K that are held at once do not grow with E, unless they are asked for."""
    from fkernel.engine.planning import kept as limits
    from fkernel.study import evaluation as module

    most = []
    real = module.walked

    def watched(*arguments):
        for rows in real(*arguments):
            most.append(len(rows.at))
            yield rows

    for n in (8, 32):
        most.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "walked", watched)
            patch.setattr(limits, "HELD", 1)
            request = {"kind": "evaluation", "batch_size_prompts": n}
            found = executed(asking(run, tmp_path / str(n), requests=[request], capture={"realised": False}))
        assert found["evaluation"].kernel is None
        assert sum(most) == n
        assert max(most) <= 4


def test_resolution_of_u_is_stable(kept):
    with load_workspace(kept) as workspace:
        assert [workspace.index[name] for name in workspace.batch.ids] == [*range(9)]
        assert np.isfinite(workspace.weights.numpy()).all()
        with pytest.raises(fk.RolloutError, match="near"):
            workspace.row("U-000-09")


def test_rows_let_go_of_their_gradients(run, tmp_path):
    """Whoever keeps some rows of K does not keep the gradients that they were made of."""
    import weakref

    from fkernel.engine import gradients as module
    from fkernel.func.handles.products import ProductSpec
    from fkernel.study.rows import MemoryBudget, walked
    from fkernel.study.workspace import tokens_of

    runner = FisherKernelRunner(run.plan(tmp_path / "out", numerics={"microbatch": 2}))
    with runner.prepare_update_workspace() as workspace, pytest.MonkeyPatch.context() as patch:
        from fkernel.engine.planning import kept as limits

        patch.setattr(limits, "HELD", 1)
        E = tokens_of(run.batch, runner.policy.params)
        kept, alive, made = [], [], module.handle_pieces

        def watched(*given):
            found = [*made(*given)]
            alive.append([weakref.ref(leaf) for one in found for handle in one.values() for leaf in tensors(handle)])
            return found

        patch.setattr(module, "handle_pieces", watched)
        for rows in walked(E, workspace, runner.policy, MemoryBudget(2, None), ProductSpec({"": workspace.P.d})):
            kept.append(rows)
            assert all(reference() is None for each in alive for reference in each)
        assert len(kept) == len(alive) > 2
        assert all(rows.kernel().isfinite().all() for rows in kept)
