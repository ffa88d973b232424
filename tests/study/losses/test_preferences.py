"""Steps on preferences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.rollout import GeneratedBatch, load_batch
from fkernel.study import (
    FisherKernelRunner,
)
from tests.study.losses.common import (
    QUIET,
    STRENGTH,
    Second,
    at_start,
    error,
    executed,
    preference,
    preferred,
    token_logp,
)


@pytest.fixture(scope="package")
def preferences(second: Second, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    after = second.step("dpo", preferred(second, STRENGTH))
    update = {"kind": "from_file", "path": str(second.pairs)}
    plan = second.plan(tmp_path_factory.mktemp("dpo") / "out", after, preference(second), update=update)
    return plan, executed(plan)


def test_a_step_on_preferences_is_predicted(preferences):
    plan, results = preferences
    start = executed({**at_start(plan), "storage": QUIET["storage"]})
    for name in ("held_out", "self"):
        first = error(start[name])
        assert first < 0.03
        assert error(results[name]) < min(0.005, first)


def test_what_a_step_does_to_both_responses_is_readable(second, preferences):
    _, results = preferences
    found, pairs = results["self"], results.step["loss"]["pairs"]
    batch = load_batch(second.pairs)
    U, mask = batch.sequences, batch.sequences.response_mask[:, 1:]
    with torch.no_grad():
        now, base = ((token_logp(checkpoint.load(x).model, U) * mask).sum(1) for x in (second.one, second.first.before))
    place = {name: row for row, name in enumerate(batch.ids)}
    weights = torch.zeros(len(batch))
    for pair in pairs:
        c, r = place[pair["chosen"]], place[pair["rejected"]]
        assert batch.rewards[c] > batch.rewards[r]
        margin = float(STRENGTH * ((now - base)[c] - (now - base)[r]))
        assert pair["margin"] == pytest.approx(margin, abs=1e-4)
        weights[c] = STRENGTH / len(pairs) / (1 + np.exp(margin))
        weights[r] = -weights[c]
    assert len(pairs) == 4
    expected = found.kernel * (results.step["clip"] * weights).numpy()
    np.testing.assert_allclose(found.contributions, expected, rtol=1e-4, atol=1e-8)
    for pair in pairs:  # a step on DPO's loss raises the margin; each response may go either way
        c, r = found.row(pair["chosen"]), found.row(pair["rejected"])
        assert found.batch[c] > found.batch[r]
        assert {found.update[found.column(pair["chosen"])].advantage} == {1.0}


def test_pairs_may_be_named_and_shared(second, preferences, tmp_path):
    plan, results = preferences
    pairs = [[pair["chosen"], pair["rejected"]] for pair in results.step["loss"]["pairs"]]
    named = {**preference(second), "pairs": pairs}
    again = executed({**plan, "step": {**plan["step"], "loss": named}, "out": str(tmp_path / "a")} | QUIET)
    np.testing.assert_allclose(again["held_out"].batch, results["held_out"].batch, rtol=1e-4, atol=1e-9)
    twice = {**named, "pairs": [*pairs, pairs[0]]}
    found = executed({**plan, "step": {**plan["step"], "loss": twice}, "out": str(tmp_path / "b")} | QUIET)
    weight = {info.id: info.weight for info in found.update}
    once = {info.id: info.weight for info in results.update}
    assert weight[pairs[0][0]] == pytest.approx(2 * 4 / 5 * once[pairs[0][0]], rel=1e-4)
    assert weight[pairs[1][0]] == pytest.approx(4 / 5 * once[pairs[1][0]], rel=1e-4)


def test_pairs_may_be_written_in_a_plan(second, tmp_path):
    samples = [{"prompt": "3+4=", "response": text, "reward": reward} for text, reward in (("7", 1.0), ("8", 0.0))]
    update = {"kind": "payload", "samples": samples}
    found = executed(second.plan(tmp_path, None, preference(second), update=update, **QUIET))
    (pair,) = found.step["loss"]["pairs"]
    assert [info.response for info in found.update if info.id == pair["chosen"]] == ["7"]


def test_pairs_may_be_drawn(second, tmp_path):
    draw = {"kind": "update", "batch_size_prompts": 3, "completions_per_prompt": 2, "weights": None}
    update = {**draw, "reward": "tests.study.losses.common.by_bytes", "advantage": None}
    plan = second.plan(tmp_path, None, preference(second), update=update)
    found = executed(plan)
    assert len(found.step["loss"]["pairs"]) == 3
    again = FisherKernelRunner(plan)
    np.testing.assert_array_equal(again.run()["self"].contributions, found["self"].contributions)
    assert again.workspace is not None
    assert again.workspace.gradients.computed == 0


def test_the_record_of_preferences_reproduces_them(preferences):
    """What is read back has weights that the loss has set; it is the same U."""
    plan, results = preferences
    batch = load_batch(plan["update"]["path"])
    runner = FisherKernelRunner({**plan, "update": {"kind": "payload", "batch": batch}})
    record = runner.plan.record()
    assert record["update"]["path"].endswith("workspace/batch")
    for spec in ({**plan, "update": {"kind": "payload", "batch": batch}}, record):
        again = FisherKernelRunner(spec)
        np.testing.assert_array_equal(again.run()["held_out"].contributions, results["held_out"].contributions)
        assert again.workspace is not None
        assert again.workspace.gradients.computed == 0


def unrewarded(batch: GeneratedBatch) -> GeneratedBatch:
    return replace(batch, records=tuple(replace(record, reward=None) for record in batch))


@pytest.mark.parametrize(
    ("change", "pairs", "message"),
    [
        (lambda b: b.clone_with_subset(b.ids[:3]), None, "one has 1: 'U-001-00'"),
        (lambda b: b.with_values("reward", torch.ones(8)), None, "U-000-00 and U-000-01 have the same reward, 1"),
        (
            unrewarded,
            None,
            "8 of 8 sequences have no reward",
        ),
        (lambda b: b, [["U-000-00", "U-000-01"]], "is in no pair"),
        (lambda b: b, [["U-000-00", "U-001-01"]], "answer different prompts"),
        (lambda b: b, [["U-000-00", "U-9"]], "There is no sequence 'U-9'"),
    ],
)
def test_pairs_that_cannot_be_told_are_said(second, tmp_path, change, pairs, message):
    batch = change(load_batch(second.pairs))
    loss = {**preference(second), "pairs": pairs}
    with pytest.raises(fk.RolloutError, match=message):
        executed(second.plan(tmp_path, None, loss, update={"kind": "payload", "batch": batch}, **QUIET))
