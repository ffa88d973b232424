"""Probes of a training while it runs: they are the columns of an account of the same step, and change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fkernel.errors import ModelError, OptimizerStateError, RolloutError
from fkernel.record import Recorder, Recording
from fkernel.study import AccountResults, account_recording
from tests.checkpoint.writers import TOKENIZER
from tests.record.loops import MAX_NORM, adamw, backward, gpt2, statistics
from tests.record.test_trl import trainer
from tests.study.trl_run import policy

PROBES = [
    {"name": "right", "prompt": "3+5=", "response": "8"},
    {"name": "eights", "prompt": "19+28=", "response": "88"},
]
STEPS, EVERY = 4, 3
WHAT = ("S", "realised", "own", "momentum", "decay", "remainder")


def told(values: dict[str, float], name: str) -> dict[str, float]:
    return {what: values[f"fkernel/{name}/{what}"] for what in WHAT}


def ledger(recording: Path | Recording, place: Path, step: int, **options: Any) -> AccountResults:
    """The account of one step, as `fkernel account` makes it."""
    return account_recording(
        recording, PROBES, place / f"step-{step}", steps=range(step, step + 1), p_values=False, **options
    )


def check_agrees(values: dict[str, float], account: AccountResults, bound: float) -> None:
    """Every column of the step's account is what was told, up to `bound` of the step's parts."""
    for name in ("right", "eights"):
        own = {what: float(column[account.row(name)]) for what, column in account.ledger.items()}
        mine, scale = told(values, name), sum(abs(own[what]) for what in ("sequences", "before", "decay"))
        left = own["arithmetic"] + own["unexplained"] + own["remainder"]
        wanted = [own["realised"], own["sequences"], own["before"], own["decay"], left]
        assert scale > 0
        for value, there in zip([*mine.values()][1:], wanted, strict=True):
            assert abs(value - there) < bound * scale, (name, mine, own)


# ------------------------------------------------------------------------------------------------- a loop of one's own


class Loop:
    """A float64 training with clipping and decay, told about at every third step, and one that is not."""

    def __init__(self, place: Path) -> None:
        self.recording, self.logs, self.last = place / "recording", list[dict[str, float]](), list[dict[str, Any]]()
        more = {"tokenizer": TOKENIZER, "probes": PROBES, "every": EVERY, "log": self.logs.append}
        self.model = self._trained(self.recording, **more)
        self.plain = self._trained(place / "plain")

    def _trained(self, place: Path, **options: Any) -> Any:
        model = policy().double()
        optimizer, ids, response, attention = adamw(model, 1e-3), *batch()
        with Recorder(place, model, optimizer, snapshots="every", **options) as recorder:
            for _ in range(STEPS):
                with recorder.step():
                    log_p, _ = statistics(model, ids, attention)
                    log_p = recorder.tap(log_p, input_ids=ids, attention_mask=attention, response_mask=response)
                    weights = torch.linspace(-1, 1, len(ids))[:, None] * response[:, 1:]
                    (-(weights * log_p).sum()).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                    optimizer.step()
                optimizer.zero_grad()
                self.last.append(recorder.last)
        return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, response mask and attention mask of sums with right and wrong answers, padded on the right."""
    rows = [TOKENIZER.encode(text) for text in ("1+2=3", "14+5=19", "3+4=88", "9+9=8")]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    begins = torch.tensor([row.index(TOKENIZER.encode("=")[0]) for row in rows])[:, None]
    attention = torch.arange(width) < torch.tensor([*map(len, rows)])[:, None]
    return ids, ((torch.arange(width) > begins) & attention).long(), attention.long()


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    return Loop(tmp_path_factory.mktemp("live"))


def test_every_third_step_is_told(loop):
    assert len(loop.logs) == 2
    assert set(loop.logs[0]) == {f"fkernel/{probe['name']}/{what}" for probe in PROBES for what in WHAT}


@pytest.mark.parametrize("i", [0, 1])
def test_the_parts_are_those_of_the_steps_account(loop, tmp_path, i):
    account = ledger(loop.recording, tmp_path, EVERY * i, dtype="float64", model=policy().double())
    check_agrees(loop.logs[i], account, 1e-6)  # an account is kept in float32
    assert abs(told(loop.logs[1], "right")["momentum"]) > 1e-6


def test_what_happened_is_the_sum_of_the_parts_and_the_remainder(loop):
    for values in loop.logs:
        own = told(values, "eights")
        assert abs(own["realised"] - sum([*own.values()][2:])) < 1e-14
        assert abs(own["remainder"]) < 0.005 * abs(own["realised"])  # at the step's beginning it would be 0.03


def test_what_is_told_stands_in_the_steps_facts(loop):
    kept = json.loads((loop.recording / "steps" / f"{EVERY:06d}" / "step.json").read_text())["facts"]["probes"]
    assert kept["eights"] == told(loop.logs[1], "eights")
    assert loop.last[EVERY]["facts"]["probes"] == kept
    assert "probes" not in loop.last[1]["facts"]


def test_the_training_is_the_same_to_the_last_bit(loop):
    for a, b in zip(loop.model.parameters(), loop.plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_in_half_precision_are_told_about_in_float32(tmp_path):
    torch.manual_seed(0)
    model, logs = gpt2().bfloat16(), []
    optimizer = adamw(model, 1e-3)
    more = {"tokenizer": TOKENIZER, "probes": PROBES, "log": logs.append}
    with Recorder(tmp_path / "recording", model, optimizer, **more) as recorder, recorder.step():
        backward(recorder, model)
        optimizer.step()
    values = told(logs[0], "right")
    parts = values["own"] + values["momentum"] + values["decay"]
    assert abs(values["remainder"]) < abs(parts)  # rounding of weights, and no more
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ModelError, "every is 0; expected a number of steps"),
        ({"tokenizer": None}, ModelError, "there is no tokenizer"),
        ({"probes": [PROBES[0], PROBES[0]]}, RolloutError, "Two probes have the name 'right'"),
        ({"probes": "nowhere.jsonl"}, RolloutError, "cannot be read"),
    ],
)
def test_what_cannot_be_told_is_said_before_anything_is_trained(tmp_path, options, error, message):
    model = gpt2()
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "probes": PROBES, **options}
    with pytest.raises(error, match=message):
        Recorder(tmp_path / "recording", model, adamw(model), **given)


def test_an_optimizer_that_is_not_modelled_is_refused_when_it_is_bound(tmp_path):
    model = gpt2()
    with pytest.raises(OptimizerStateError, match="it is Rprop's"):
        Recorder(
            tmp_path / "recording", model, torch.optim.Rprop(model.parameters()), tokenizer=TOKENIZER, probes=PROBES
        )


# ------------------------------------------------------------------------------------------------------------------ TRL


@pytest.mark.turns(6)
def test_a_grpo_run_logs_them_beside_its_reward(tmp_path):
    made = trainer(tmp_path, True, max_steps=STEPS, save_steps=STEPS, learning_rate=1e-3, max_grad_norm=1.0)
    Recorder(tmp_path / "recording", snapshots="every", probes=PROBES, every=EVERY).attach(made)
    made.train()
    history = [row for row in made.state.log_history if "fkernel/right/S" in row]
    assert [row["step"] for row in history] == [1, 1 + EVERY]
    rewards = [row["step"] for row in made.state.log_history if "reward" in row]
    assert rewards == [*range(1, STEPS + 1)]  # none of the trainer's own means was taken early
    for row in history:
        account = ledger(tmp_path / "recording", tmp_path, row["step"] - 1)
        check_agrees(row, account, 2e-3)
