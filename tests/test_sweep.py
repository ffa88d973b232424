"""A tenth of the sweep over transformers' causal language models, another each day; and the sweep sees what is wrong.

`FKERNEL_SWEEP_PART=3/10` chooses the part, so that what failed on another day can be run again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.sweep import __main__ as command
from benchmarks.sweep import oracle, table
from benchmarks.sweep.judge import BOUNDS, FAILURES, HELD, judge
from benchmarks.sweep.settings import KINDS
from benchmarks.sweep.workers import sweep
from fkernel import func, tree
from fkernel.errors import ModelError

TENTHS = 10


def committed() -> dict[str, Any]:
    return json.loads(command.RESULTS.read_text(encoding="utf-8"))


def part_of_today() -> str:
    day = datetime.now(UTC).timetuple().tm_yday
    return os.environ.get("FKERNEL_SWEEP_PART") or f"{day % TENTHS + 1}/{TENTHS}"


# -------------------------------------------------------------------------------------------------------- a tenth a day


@pytest.fixture(scope="module")
def rows_of_today(tmp_path_factory):
    part, saved = part_of_today(), tmp_path_factory.mktemp("sweep") / "rows.json"
    print(f"FKERNEL_SWEEP_PART={part}")
    arguments = [sys.executable, "-m", "benchmarks.sweep", "--part", part, "--json", str(saved)]
    done = subprocess.run(arguments, cwd=command.ROOT, capture_output=True, text=True, check=False)
    assert saved.exists(), done.stderr
    rows = json.loads(saved.read_text(encoding="utf-8"))
    assert done.returncode == any(row["verdict"] in FAILURES for row in rows), done.stderr
    return {row["kind"]: row for row in rows}


def test_no_number_of_today_s_tenth_is_wrong_and_no_error_is_raw(rows_of_today):
    failures = {kind: row["reason"] for kind, row in rows_of_today.items() if row["verdict"] in FAILURES}
    assert not failures, f"FKERNEL_SWEEP_PART={part_of_today()}"


def test_what_was_right_is_still_right(rows_of_today):
    before = {row["kind"]: row["verdict"] for row in committed()["rows"]}
    worse = {
        kind: f"{before[kind]} → {row['verdict']}: {row['reason']}"
        for kind, row in rows_of_today.items()
        if before.get(kind, "").startswith("right") and row["verdict"] not in ("right", before[kind])
    }
    assert not worse, f"FKERNEL_SWEEP_PART={part_of_today()}"


# ------------------------------------------------------------------------------------------------- what is committed


def test_the_committed_sweep_is_whole_and_has_nothing_wrong_or_raw():
    rows = committed()["rows"]
    assert len({row["kind"] for row in rows}) == len(rows)
    assert not [row["kind"] for row in rows if row["verdict"] in FAILURES]
    assert sum(row["verdict"].startswith("right") for row in rows) >= 170
    assert all(row["doubt"]["jvp"] < 0.01 for row in rows if row["verdict"] == "right")  # what says so can be trusted


def test_the_page_is_what_the_results_give():
    assert command.PAGE.read_text(encoding="utf-8") == table.page(committed())


def test_the_parts_are_the_whole():
    parts = [command.part_of(KINDS, f"{i + 1}/{TENTHS}") for i in range(TENTHS)]
    assert sorted(kind for part in parts for kind in part) == sorted(KINDS)


@pytest.mark.parametrize(("only", "part"), [(["lama"], None), (None, "0/10"), (None, "11/10"), (None, "tenth")])
def test_a_part_that_does_not_exist_is_an_error(only, part):
    with pytest.raises(ValueError, match=r"expected I/N|model types are"):
        command.chosen(only, part)


# ------------------------------------------------------------------------------------- what the sweep has to see


class Honest(GPT2LMHeadModel):
    """GPT-2, tiny."""

    def __init__(self) -> None:
        super().__init__(GPT2Config(vocab_size=24, n_positions=32, n_embd=8, n_layer=1, n_head=1))

    def forward(self, *given: Any, **inputs: Any) -> Any:
        logits = super().forward(*given, **inputs).logits
        return SimpleNamespace(logits=self.changed(cast(torch.Tensor, logits)))

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class Detached(Honest):
    """Its backward pass leaves out a path that its values have."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * (1 + logits.detach().square())


class NoGrad(Honest):
    """The same, as a module does it that saves memory."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            factor = 1 + logits.square()
        return logits * factor


class Twice(torch.autograd.Function):
    """x, whose backward pass says 2x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return 2 * grads[0]


class Overstates(Honest):
    """Its backward pass is wrong, and nothing that it detaches explains it."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, Twice.apply(logits))


class LooksAhead(Honest):
    """Every logit depends on the whole row, padding included."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * logits.mean(1, keepdim=True)


class Raises(Honest):
    """It refuses a batch in words of its own."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        if len(logits) > 1:
            raise TypeError("one at a time\nplease")
        return logits


class Misused(Honest):
    """It cannot be run at all."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("no kernels here")


def test_an_honest_model_is_right():
    row = judge(Honest)
    assert row["verdict"] == "right", row["reason"]
    assert row["causal"]
    assert row["dtype"] == "float64"
    assert list(row["quantities"]) == list(BOUNDS)
    assert all(quantity["error"] < 1e-6 for quantity in row["quantities"].values())


@pytest.mark.parametrize(("make", "quantity"), [(Overstates, "jvp"), (LooksAhead, "gradients"), (Raises, "values")])
def test_a_model_that_misleads_is_never_right(make, quantity):
    row = judge(make)
    assert row["verdict"] != "right"
    assert row["quantities"][quantity]["verdict"] != "right"
    assert quantity in row["reason"]
    assert ("not causal" in row["reason"]) == (make is LooksAhead)
    assert (row["backward_off"] > 0.01) == (make is Overstates)


@pytest.mark.parametrize("make", [Detached, NoGrad])
def test_what_is_held_constant_in_backward_is_said_and_seen_through(make):
    row = judge(make)
    assert row["verdict"] == HELD, row["reason"]
    assert row["backward_off"] > 0.01  # what J is is not what happens
    assert row["quantities"]["jvp"]["error"] < 1e-6
    assert row["quantities"]["jvp"]["held"]["backward"] < 1e-6
    assert row["quantities"]["curvature"]["error"] < 1e-3
    assert any("backward" in warning for warning in row["warnings"])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("through_detach", lambda S: S),  # what is held constant is not seen through
        ("true_derivative", lambda S, *given: S),  # nobody is told
    ],
)
def test_what_is_held_constant_and_not_said_is_wrong(monkeypatch, name, changed):
    monkeypatch.setattr(func, name, changed)
    row = judge(Detached)
    assert row["verdict"] == row["quantities"]["jvp"]["verdict"] == "wrong"


def _off_by_a_percent(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tree.map(lambda leaf: 1.01 * leaf, rows)


def _raw(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise RuntimeError("one line\nand another")


def _refused(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise ModelError("not this one")


@pytest.mark.parametrize(
    ("mistake", "verdict", "words"),
    [
        (_off_by_a_percent, "wrong", "gradients: off by more than 1e-04: 1.0e-02"),
        (_raw, "raw", "gradients: RuntimeError: one line"),
        (_refused, "refused", "gradients: ModelError: not this one"),
    ],
)
def test_a_mistake_of_fkernel_is_seen(monkeypatch, mistake, verdict, words):
    rows_of = func.per_sequence_grad
    monkeypatch.setattr(func, "per_sequence_grad", lambda f: lambda *given: mistake(rows_of(f)(*given)))
    row = judge(Honest)
    assert row["verdict"] == row["quantities"]["gradients"]["verdict"] == verdict
    assert row["reason"] == words
    assert row["quantities"]["values"]["verdict"] == "right"


def test_a_refusal_of_forward_mode_alone_is_said(monkeypatch):
    monkeypatch.setattr(func, "curvature", lambda f: lambda *given: _refused({}))
    row = judge(Honest)
    assert row["quantities"]["curvature"] == {"verdict": "refused", "reason": "ModelError: not this one"}
    assert row["verdict"] == "right, without forward mode"


def test_a_model_that_does_not_run_is_not_built():
    row = judge(Misused)
    assert (row["verdict"], row["reason"]) == ("not built", "ValueError: no kernels here")


@pytest.mark.turns(6)
def test_a_crash_and_a_hang_cost_one_row_each():
    def build(kind: str) -> nn.Module:
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return Honest()

    rows = {row["kind"]: row for row in sweep(["crash", "hang"], limit=2.0, build=build)}
    assert {row["verdict"] for row in rows.values()} == {"not built"}
    assert rows["crash"]["reason"] == "the process ended by SIGKILL"
    assert rows["hang"]["reason"] == "no answer within 2 s"


def test_the_differences_know_their_doubt():
    model = Honest().double().eval()
    S, J = oracle.gradients(model)
    direction = {name: torch.ones_like(leaf[0]) for name, leaf in J.items()}
    slope, bend = oracle.along(model, direction)
    assert oracle.relative(slope.value, oracle.times(J, direction)) <= max(1e-9, slope.doubt)
    assert max(slope.doubt, bend.doubt) < 1e-6
    assert torch.equal(oracle.values(model), S)
