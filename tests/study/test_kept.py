"""An answer that has ended is not computed again; one that anything else was asked of is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkernel.rollout import SampleGenerator, load_batch, save_batch
from fkernel.study import FisherKernelResults, FisherKernelRunner
from tests.study.conftest import Run
from tests.study.test_runner import same
from tests.study.test_sources import REWARD, edit, folder  # noqa: F401 - a fixture
from tests.study.test_workspace import asking
from tests.torture.leftovers import dead_beside

HELD = {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 2}
PROBE = {"kind": "custom_sequence", "name": "probe", "prompt": "3+4=", "response": "7"}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is computed: requests, "U" for U with itself, "analyses" of U, "draw" of any batch."""
    found = list[str]()

    def counted(owner: Any, method: str, name: Any) -> None:
        real = getattr(owner, method)

        def counting(self: Any, *given: Any, **more: Any) -> Any:
            found.append(name(*given))
            return real(self, *given, **more)

        monkeypatch.setattr(owner, method, counting)

    counted(FisherKernelRunner, "evaluate_batch", lambda request, *_: request.name)
    counted(FisherKernelRunner, "compute_self_kernel", lambda *_: "U")
    counted(FisherKernelRunner, "analyse_update", lambda *_: "analyses")
    counted(SampleGenerator, "_sampled", lambda *_: "draw")
    return found


def executed(plan: dict[str, Any]) -> FisherKernelResults:
    return FisherKernelRunner(plan).run()


def full(run: Run, out: Path, **changes: Any) -> dict[str, Any]:
    analyses = {"ledger": True, "health": True}
    return asking(run, out, **{"requests": [HELD, PROBE], "analyses": analyses, **changes})


@pytest.mark.turns(6)
def test_the_same_plan_computes_nothing_again(run, tmp_path, computed):
    plan = full(run, tmp_path / "out")
    first = executed(plan)
    assert sorted(computed) == ["U", "analyses", "draw", "held_out", "probe"]
    assert first.environment["kept"] == {}
    first.save_results(tmp_path / "one")
    computed.clear()
    runner = FisherKernelRunner(plan)
    again = runner.run()
    assert computed == []
    assert {*again.environment["kept"]} == {"held_out", "probe", "update_batch"}
    same(again, first)
    again.save_results(tmp_path / "two")
    for name in ("results.json", "kernel.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    certificates = {one["name"] for one in first.environment["certificates"]}
    assert {one["name"] for one in again.environment["certificates"]} == certificates
    runner.save_batches(tmp_path)
    saved = load_batch(tmp_path / "batches" / "held_out")
    assert [one.content_hash for one in saved] == [one.content_hash for one in first["held_out"].evaluation]


@pytest.mark.turns(6)
def test_one_more_request_is_the_only_one_that_is_computed(run, tmp_path, computed):
    plan = full(run, tmp_path / "out")
    first = executed(plan)
    computed.clear()
    more = {"kind": "update", "name": "self"}
    found = executed({**plan, "requests": [more, *plan["requests"]]})
    assert computed == ["self"]
    np.testing.assert_array_equal(found["held_out"].kept("kernel"), first["held_out"].kept("kernel"))


@pytest.mark.turns(6)
def test_a_run_that_was_killed_goes_on_behind_what_had_ended(run, tmp_path, computed, monkeypatch):
    plan, real = full(run, tmp_path / "out"), FisherKernelRunner.evaluate_batch

    def killed(self, request, *given, **more):
        if request.name == "probe":
            raise KeyboardInterrupt
        return real(self, request, *given, **more)

    monkeypatch.setattr(FisherKernelRunner, "evaluate_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        executed(plan)
    monkeypatch.setattr(FisherKernelRunner, "evaluate_batch", real)
    computed.clear()
    same(executed(plan), executed({**plan, "out": str(tmp_path / "whole")}))
    assert computed[:1] == ["probe"]
    assert computed.count("probe") == 2


@pytest.mark.turns(6)
def test_whatever_decides_an_answer_is_in_its_key(run, tmp_path, computed, folder):  # noqa: F811
    edit(folder, "of_E", REWARD.format(7))
    rewarded = {**HELD, "reward": "of_E.reward"}
    prompts = tmp_path / "test.jsonl"
    shutil.copy(run.test, prompts)
    sources = [{"jsonl": str(run.train), "split": "train"}, {"jsonl": str(prompts), "split": "test"}]
    plan = full(run, tmp_path / "out", requests=[rewarded], prompts=sources, self_kernel=False, analyses={})
    executed(plan)
    small = {"kernel": False, "curvature": False}
    changes: list[dict[str, Any]] = [
        {"numerics": {"microbatch": 2, "seed": 1}},
        {"capture": small},
        {"requests": [{**rewarded, "advantages": "rloo"}]},
        {"requests": [{**rewarded, "completions_per_prompt": 2}]},
        {"analyses": {"ledger": True}},
        {"sampling": {"temperature": 1.0, "max_new_tokens": 5}},
        {"step": {"max_norm": 0.05}},
        {"step": {**plan["step"], "path": "start"}},
    ]
    for change in changes:
        computed.clear()
        executed({**plan, **change})
        assert computed == ["held_out", "draw"], change
    computed.clear()
    executed({**plan, "numerics": {"microbatch": 3}})
    executed(plan)
    assert computed == []
    edit(folder, "of_E", REWARD.format(3))
    executed(plan)
    assert computed == ["held_out", "draw"]
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join(lines[::-1]))
    executed(plan)
    assert computed == ["held_out", "draw"] * 2


@pytest.mark.turns(6)
def test_a_batch_that_is_given_is_told_by_its_content(run, tmp_path, computed):
    place = tmp_path / "given"
    save_batch(run.batch.clone_with_subset(["U-000-00"]), place)
    plan = full(run, tmp_path / "out", requests=[{"kind": "from_file", "name": "given", "path": str(place)}])
    first = executed(plan)["given"]
    shutil.rmtree(place)
    other = run.batch.clone_with_subset(["U-001-01"])
    save_batch(type(other)((_named(other.records[0], "U-000-00"),), other.checkpoint, other.sampling), place)
    computed.clear()
    second = executed(plan)["given"]
    assert computed == ["given"]
    assert second.evaluation[0].id == first.evaluation[0].id
    assert not np.allclose(second.kept("kernel"), first.kept("kernel"))


def _named(record: Any, name: str) -> Any:
    return type(record)(**{**vars(record), "sequence_id": name})


@pytest.mark.turns(6)
@pytest.mark.parametrize("file", ["kernel.npz", "results.json", "kept.json", "batch/tokens.safetensors"])
def test_what_is_damaged_is_computed_again(run, tmp_path, computed, file):
    plan = full(run, tmp_path / "out", requests=[HELD], self_kernel=False, analyses={})
    first = executed(plan)
    (damaged,) = (tmp_path / "out" / "workspace" / "kept").glob(f"*/{file}")
    content = bytearray(damaged.read_bytes())
    if file == "results.json":  # what is still JSON, and of the same ids
        content = content.replace(b'"kind": "evaluation"', b'"kind": "evaluatiom"')
    else:
        content[len(content) // 2] ^= 0x41
    damaged.write_bytes(content)
    computed.clear()
    same(executed(plan), first)
    assert computed == ["held_out", "draw"]
    computed.clear()
    executed(plan)
    assert computed == []


@pytest.mark.turns(6)
def test_an_answer_beside_which_another_batch_lies_is_computed_again(run, tmp_path, computed):
    plan = full(run, tmp_path / "out", requests=[HELD], self_kernel=False, analyses={})
    first = executed(plan)
    (batch,) = (tmp_path / "out" / "workspace" / "kept").glob("*/batch")
    shutil.rmtree(batch)
    save_batch(run.batch.clone_with_subset(["U-000-00"]), batch)  # whole, but not the one that was evaluated
    computed.clear()
    same(executed(plan), first)
    assert computed == ["held_out", "draw"]


@pytest.mark.turns(6)
def test_an_analysis_that_failed_is_tried_again(run, tmp_path, computed, monkeypatch):
    from fkernel.errors import NonFiniteError
    from fkernel.study.analyses import sweep

    def failing(*given, **more):
        raise NonFiniteError("Not a number today.")

    plan = full(run, tmp_path / "out", requests=[HELD], self_kernel=False, analyses={"sweep": True})
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "step_sweep", failing)
        with pytest.warns(UserWarning, match="it failed: Not a number today"):
            first = executed(plan)
    assert "left_out" in first["held_out"].analysis("sweep").facts
    assert "left_out" not in executed(plan)["held_out"].analysis("sweep").facts
    assert computed.count("held_out") == 2


@pytest.mark.turns(6)
def test_what_a_killed_run_left_half_written_is_removed(run, tmp_path):
    plan = full(run, tmp_path / "out", requests=[PROBE], self_kernel=False, analyses={})
    executed(plan)
    kept = tmp_path / "out" / "workspace" / "kept"
    dead_beside(kept / "x").mkdir()
    executed({**plan, "requests": [HELD]})
    assert not list(kept.glob("*.tmp"))
    assert len(list(kept.iterdir())) == 2


@pytest.mark.turns(6)
def test_a_run_that_was_stopped_after_some_answers_has_the_bits_of_one_that_was_not(run, tmp_path):
    """Norms of U come with U's kernel, or with the first request that needs them: whichever a run computed itself."""
    plan = full(run, tmp_path / "out", requests=[HELD, PROBE], analyses={})
    executed(plan).save_results(tmp_path / "undisturbed")
    for answer in (tmp_path / "out" / "workspace" / "kept").iterdir():
        if (answer / "batch").exists():
            shutil.rmtree(answer)
    executed(plan).save_results(tmp_path / "stopped")
    for name in ("kernel.npz", "results.json"):
        assert (tmp_path / "undisturbed" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.turns(6)
def test_nothing_is_kept_where_gradients_are_not(run, tmp_path, computed):
    plan = full(run, tmp_path / "out", requests=[PROBE], storage={"persist": False, "pictures": False})
    executed(plan)
    computed.clear()
    executed(plan)
    assert sorted(computed) == ["U", "analyses", "probe"]
    assert not (tmp_path / "out").exists()


def called(generator: SampleGenerator) -> Any:
    CALLS.append(1)
    return generator.build_custom_sequence("3+4=", str(len(CALLS)))


CALLS = list[int]()


@pytest.mark.turns(6)
def test_a_callback_is_called_again_and_its_batch_is_in_the_key(run, tmp_path, computed):
    request = {"kind": "payload", "name": "made", "callback": "tests.study.test_kept.called"}
    plan = full(run, tmp_path / "out", requests=[request], self_kernel=False, analyses={})
    one, two = (executed(plan)["made"].evaluation[0].response for _ in range(2))
    assert (one, two) == ("1", "2")
    assert computed == ["made", "made"]


# ------------------------------------------------------------------------------------------------------ batches on disk


@pytest.mark.turns(6)
def test_a_saved_batch_is_the_one_of_the_results(run, tmp_path):
    """Other draws have the same ids."""
    plan = full(run, tmp_path / "out", requests=[HELD], self_kernel=False, analyses={})
    for seed in (0, 1):
        runner = FisherKernelRunner({**plan, "numerics": {"microbatch": 2, "seed": seed}})
        results = runner.run()
        runner.save_batches(tmp_path / "out")
        saved = load_batch(tmp_path / "out" / "batches" / "held_out")
        assert [one.content_hash for one in saved] == [one.content_hash for one in results["held_out"].evaluation]
    assert {place.name for place in (tmp_path / "out" / "batches").iterdir()} == {"held_out"}


def test_what_is_no_batch_is_not_replaced(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    from fkernel.errors import RolloutError

    with pytest.raises(RolloutError, match="something at"):
        save_batch(run.batch, tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.turns(6)
def test_results_refuse_arrays_of_another_run(run, tmp_path):
    """The same ids, and other numbers: nothing but their content tells."""
    plan = full(run, tmp_path / "out", requests=[HELD], self_kernel=False, analyses={})
    for seed in (0, 1):
        executed({**plan, "numerics": {"microbatch": 2, "seed": seed}}).save_results(tmp_path / str(seed))
    shutil.copy(tmp_path / "0" / "kernel.npz", tmp_path / "1" / "kernel.npz")
    ids = [json.loads((tmp_path / name / "results.json").read_text())["update"][0]["id"] for name in "01"]
    assert ids[0] == ids[1]
    from fkernel.errors import ResultsError

    with pytest.raises(ResultsError, match=r"kernel\.npz is not the file that was written with"):
        FisherKernelResults.load(tmp_path / "1")
