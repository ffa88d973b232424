"""TRL's completions: what a real run dumped is what it was recorded as; what is not whole or not certain is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fkernel.errors import RolloutError
from fkernel.record import read
from fkernel.rollout import GeneratedBatch
from tests.checkpoint.writers import TOKENIZER
from tests.record import dumped
from tests.record.dumped import CHAT
from tests.record.test_trl import STEPS, digits
from tests.study.trl_run import LONGEST, SEEN

READING: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": LONGEST}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dumped.Trained:
    return dumped.trl(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A run's output that may be damaged."""
    shutil.copytree(run.output, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "*.pt"))
    return tmp_path / "run"


def sequences(batch: GeneratedBatch) -> Counter[Any]:
    return Counter((r.prompt_ids, r.response_ids, round(r.advantage or 0.0, 5), r.finish) for r in batch)


def test_trls_completions_are_the_recorded_batches(run):
    for step in range(1, STEPS + 1):
        batch = read(run.output, step, **READING)
        recorded = run.recording.step(step - 1).batch
        assert sequences(batch) == sequences(recorded)
        assert len({*batch.groups.tolist()}) == 4
        for record in batch:
            assert record.prompt in SEEN
            assert record.metadata["columns"]["digits"] == digits([record.response])[0]
            assert record.metadata["step"] == step
    assert len(read(run.output / "completions" / "completions_00002.parquet", **READING)) == 16


def test_rewards_are_added_up_where_their_weights_are_given(run):
    batch = read(run.output, 1, **READING, reward_weights={"digits": 1.0, "brevity": 1.0})
    recorded = {(r.prompt_ids, r.response_ids): r for r in run.recording.step(0).batch}
    for record in batch:
        other = recorded[record.prompt_ids, record.response_ids]
        assert record.reward == pytest.approx(other.reward)
        assert record.rewards == pytest.approx(other.rewards)


@pytest.mark.turns(6)
def test_chats_are_tokenized_as_the_trainer_does(tmp_path, monkeypatch):
    """Prompts that are messages; and completions that are one message of the assistant."""
    monkeypatch.setattr(dumped.trainer.__globals__["TOKENIZER"], "chat_template", CHAT)
    messages = [[{"role": "user", "content": prompt[:-1]}] for prompt in SEEN]
    monkeypatch.setitem(dumped.trainer.__globals__, "SEEN", messages)

    def odd(completions: Any, **_: Any) -> list[float]:
        return [float(sum(map(message["content"].count, "13579"))) for (message,) in completions]

    def none(completions: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    monkeypatch.setitem(dumped.trainer.__globals__, "digits", odd)
    monkeypatch.setitem(dumped.trainer.__globals__, "brevity", none)
    made = dumped.trl(tmp_path, max_steps=1)
    assert sequences(read(made.output, 1, **READING)) == sequences(made.recording.step(0).batch)


def test_tokens_that_a_reward_function_logged_are_read(tmp_path, monkeypatch):
    """With them a run may draw padding too, which texts lose."""

    def rewards(completions: list[str], completion_ids: Any, log_extra: Any, **_: Any) -> list[float]:
        log_extra("completion_ids", completion_ids)
        return [float(len(text)) for text in completions]

    monkeypatch.setitem(dumped.trainer.__globals__, "digits", rewards)
    made = dumped.trl(tmp_path, max_steps=1, generation_kwargs={"suppress_tokens": None})
    batch = read(made.output, 1, tokenizer=TOKENIZER)
    assert sequences(batch) == sequences(made.recording.step(0).batch)
    assert any(TOKENIZER.pad_token_id in record.response_ids for record in batch)


def edit(file: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    import pandas as pd

    rows = pd.read_parquet(file).to_dict("records")
    change(rows)
    pd.DataFrame(rows).to_parquet(file)


def first(**values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda rows: rows[0].update(values)


def state_of(output: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    for file in output.glob("checkpoint-*/trainer_state.json"):
        content = json.loads(file.read_text())
        change(content["log_history"])
        file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (first(advantage=float("nan")), r"completions_00002.parquet, row 0: its advantage is None"),
        (first(advantage=float("inf")), r"row 0: its advantage is inf"),
        (first(step=3), "rows of step 3: it is another step's"),
        (first(completion="1x1"), r"row 0: the tokens of its response decode to .* log_extra"),
        (first(completion="1234567"), r"row 0: its response is 7 tokens, and a response had at most 6"),
        (first(completion="1"), r"its responses are read as .* the run logged"),
        (first(completion=None), r"row 0 has no 'completion'"),
        (lambda rows: rows.pop(), "its prompts and responses are read as|its responses are read as"),
    ],
)
def test_what_is_wrong_with_a_file_of_trls_is_said(copied, change, said):
    edit(copied / "completions" / "completions_00002.parquet", change)
    with pytest.raises(RolloutError, match=said):
        read(copied, 2, **READING)


def test_a_file_of_trls_that_is_not_whole(copied):
    file = copied / "completions" / "completions_00002.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RolloutError, match=r"completions_00002.parquet is no whole Parquet file"):
        read(copied, 2, **READING)
    file.unlink()
    with pytest.raises(RolloutError, match="holds no step 2; it holds 1, 3"):
        read(copied, 2, **READING)


def test_an_evaluation_at_the_step_is_refused(copied):
    state_of(copied, lambda log: log.append({"step": 2, "eval_completions/mean_length": 3.0}))
    with pytest.raises(RolloutError, match="was evaluated at step 2, and TRL wrote the file again"):
        read(copied, 2, **READING)
    assert len(read(copied, 1, **READING)) == 16


def test_a_batch_in_several_parts_is_refused(copied):
    state_of(copied, lambda log: [entry.update(num_tokens=999.0) for entry in log if entry["step"] == 2])
    with pytest.raises(RolloutError, match=r"the run counted .* in step 2"):
        read(copied, 2, **READING)


def test_another_length_than_the_runs_is_told_by_the_log(copied):
    with pytest.raises(RolloutError, match="max_completion_length"):
        read(copied, 2, tokenizer=TOKENIZER, max_new_tokens=LONGEST + 1)


def test_what_texts_need_is_asked_for(run, monkeypatch):
    with pytest.raises(RolloutError, match=r"tokenizer=…"):
        read(run.output, 1)
    with pytest.raises(RolloutError, match=r"give max_new_tokens"):
        read(run.output, 1, tokenizer=TOKENIZER)
    with pytest.raises(RolloutError, match=r"no column 'wit' for reward_weights"):
        read(run.output, 1, **READING, reward_weights={"wit": 1.0})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RolloutError, match="pip install pyarrow"):
        read(run.output, 1, **READING)


class Merging:
    """A tokenizer that writes two digits as one token, as real ones write words."""

    eos_token_id, pad_token_id = 1, 0

    def __len__(self) -> int:
        return 1000

    def encode(self, text: str, **_: Any) -> list[int]:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return [10 + int(pair) for pair in pairs]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(str(i - 10) for i in ids if i >= 10)


def test_a_boundary_inside_a_token_is_refused(tmp_path):
    import pandas as pd

    place = tmp_path / "completions_00001.parquet"
    rows = [{"step": 1, "prompt": prompt, "completion": "34", "advantage": 0.5} for prompt in ("12", "125")]
    pd.DataFrame(rows[:1]).to_parquet(place)
    assert read(place, tokenizer=Merging(), max_new_tokens=2).records[0].response_ids == (44, 1)
    pd.DataFrame(rows).to_parquet(place)
    with pytest.raises(RolloutError, match=r"row 1: .* the boundary between them falls inside a token"):
        read(place, tokenizer=Merging(), max_new_tokens=2)
