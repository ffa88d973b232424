"""Batches that trainers dumped: what was written is what is read, and what is not whole is refused by file and line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fkernel.errors import CheckpointError, RolloutError
from fkernel.record import read
from fkernel.record.dumps import SOURCES
from tests.checkpoint.writers import TOKENIZER
from tests.record import dumped
from tests.record.dumped import TOKENS, Row, some_rows
from tests.study.trl_run import LONGEST

READING: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": LONGEST}


def expected(name: str, row: Row) -> dict[str, Any]:
    """What a record of a file must hold, by the file's trainer."""
    per_token: dict[str, Any] = {}
    if name != "open_instruct":
        heard = {A for A, kept in zip(row.advantages, row.mask, strict=True) if kept}
        if 0 in row.mask:
            per_token["loss_mask"] = row.mask
        if len(heard) > 1:
            per_token["advantages"] = row.advantages
        per_token["old_logprobs"] = row.trainer
    if name == "slime":
        per_token["reference_logprobs"] = row.reference
    return per_token


@pytest.mark.parametrize("name", TOKENS)
def test_what_was_written_is_read(tmp_path, name):
    rows = some_rows(6)
    path = TOKENS[name](tmp_path, 7, rows)
    batch = read(path, 7)
    order = [*rows[::2], *rows[1::2]] if name == "prime_rl" else rows
    assert len(batch) == len(rows)
    for record, row in zip(batch, order, strict=True):
        assert record.prompt_ids == tuple(row.prompt)
        assert record.response_ids == tuple(row.response)
        assert record.logqs == pytest.approx(row.sampler)
        told = record.metadata.get("per_token", {})
        wanted = expected(name, row)
        assert told.keys() == wanted.keys()
        for key, values in wanted.items():
            assert told[key] == pytest.approx(values)
        if "advantages" not in told:
            heard = [A for A, kept in zip(row.advantages, row.mask, strict=True) if kept]
            assert record.advantage == pytest.approx(row.advantages[0] if name == "open_instruct" else heard[0])
    assert batch.groups.unique().numel() == 3
    if name != "prime_rl":
        assert batch.rewards.tolist() == [row.reward for row in order]


@pytest.mark.parametrize("name", SOURCES)
def test_a_step_that_is_not_there(tmp_path, name):
    with pytest.raises(RolloutError, match="There is nothing at"):
        read(tmp_path / "no", trainer=name)
    with pytest.raises(RolloutError, match=r"holds no file of a dump that is known\. Expected"):
        read(tmp_path, trainer=name)
    with pytest.raises(RolloutError, match="step is -1"):
        read(tmp_path, -1, trainer=name)


def test_whose_files_are_meant(tmp_path):
    dumped.verl(tmp_path, 3, some_rows())
    dumped.nemo_rl(tmp_path, 3, some_rows())
    dumped.nemo_rl(tmp_path, 4, some_rows())
    with pytest.raises(RolloutError, match=r"nemo_rl and verl; say whose are meant"):
        read(tmp_path, 3)
    with pytest.raises(RolloutError, match=r"holds the steps 3, 4; say which"):
        read(tmp_path, trainer="nemo_rl")
    with pytest.raises(RolloutError, match=r"no reader for dumps of 'openrlhf'"):
        read(tmp_path, 3, trainer="openrlhf")
    assert len(read(tmp_path, 3, trainer="nemo_rl")) == 4


Change = Callable[[list[dict[str, Any]]], Any]


def file_of(name: str, place: Path) -> Path:
    """The file that a line is changed in."""
    return {
        "nemo_rl": place / "train_data_step7.jsonl",
        "prime_rl": place / "token_exports" / "step_7" / "rank_0.jsonl",
        "open_instruct": place / "mine_rollouts_000000.jsonl",
        "verl": place / "7.jsonl",
    }[name]


def put(line: int, **values: Any) -> Change:
    return lambda rows: rows[line].update(values)


def entry(line: int, field: str, i: int, value: Any) -> Change:
    """Change one number of a list; NeMo-RL's are in a list of one."""

    def change(rows: list[dict[str, Any]]) -> None:
        values = rows[line][field]
        (values[0] if isinstance(values[0], list) else values)[i] = value

    return change


def shorter(line: int, field: str) -> Change:
    def change(rows: list[dict[str, Any]]) -> None:
        values = rows[line][field]
        (values[0] if isinstance(values[0], list) else values).pop()

    return change


LINES: list[tuple[str, Change, str]] = [
    ("nemo_rl", entry(1, "advantages", 3, float("nan")), r"step7.jsonl, line 2 holds NaN"),
    ("nemo_rl", entry(1, "prev_logprobs", 3, float("-inf")), r"line 2 holds -Infinity"),
    ("nemo_rl", shorter(1, "advantages"), r"line 2: advantages has \d+ numbers and token_ids \d+"),
    ("nemo_rl", entry(1, "token_ids", 1, -100), r"line 2: token_ids\[1\] is -100"),
    ("nemo_rl", entry(1, "token_ids", 1, 99), r"line 2 has the token 99, and the vocabulary has 15"),
    ("nemo_rl", entry(1, "token_loss_mask", 0, 1), r"line 2: its first token is in the loss.*shifted"),
    ("nemo_rl", entry(1, "token_loss_mask", 3, 2), r"line 2: token_loss_mask\[3\] is 2"),
    ("nemo_rl", put(1, input_lengths=[99]), r"line 2: input_lengths is 99"),
    ("nemo_rl", put(1, idx=0), r"has idx 0 more than once"),
    ("nemo_rl", put(1, idx=9), r"has no row with idx 1"),
    ("nemo_rl", put(1, sample_loss_mask=[0.5]), r"line 2: sample_loss_mask is 0.5"),
    ("nemo_rl", put(1, rewards=1.0), r"line 2: rewards is 1.0; expected a list of one"),
    ("nemo_rl", lambda rows: [row.pop("token_ids") for row in rows], "has no token_ids: NeMo-RL before 0.6"),
    ("nemo_rl", lambda rows: [row.update(sample_loss_mask=[0.0]) for row in rows], "is 0 in every row"),
    ("prime_rl", entry(0, "advantages", 3, None), r"rank_0.jsonl, line 1: advantages\[3\] is None"),
    ("prime_rl", shorter(0, "trainer_logprobs"), r"line 1: trainer_logprobs has \d+ numbers"),
    ("prime_rl", put(1, export_sequence_idx=0), r"export_sequence_idx 0 more than once"),
    ("prime_rl", put(0, rank=1), r"line 1 has rank 1, and the file is of rank 0"),
    ("prime_rl", put(0, step=8), r"line 1 has step 8"),
    ("prime_rl", put(0, schema_version=2), r"line 1 has schema_version 2"),
    ("prime_rl", entry(0, "token_ids", 0, 15), r"line 1 has the token 15"),
    ("prime_rl", lambda rows: rows[0].update(ce_weights=[1.0] * len(rows[0]["token_ids"])), "component .* ce_weights"),
    ("prime_rl", lambda rows: rows[0].update(loss_mask=[False] * len(rows[0]["token_ids"])), "0 throughout"),
    ("open_instruct", put(1, advantage=float("inf")), r"000000.jsonl, line 2 holds Infinity"),
    ("open_instruct", shorter(1, "logprobs"), r"line 2: logprobs has \d+ numbers and response_tokens"),
    ("open_instruct", put(1, sample_idx=0), r"step 7 of .* has sample_idx 0 more than once; a run that was resumed"),
    ("open_instruct", put(1, response_tokens=[], logprobs=[]), r"line 2 has a response of no token"),
    ("open_instruct", put(1, response_tokens=[3, 77], logprobs=[0.0, 0.0]), "line 2 has the token 77"),
    ("open_instruct", put(1, request_info={"num_calls": 2}), r"line 2: its response holds tokens of a tool"),
    ("open_instruct", put(1, reward=None), r"line 2: reward is None"),
    ("verl", put(1, score=None), r"7.jsonl, line 2: score is None"),
    ("verl", put(1, step=8), r"line 2 is of step 8, and the file of 7"),
    ("verl", put(1, input="9+9"), r"line 2: none of the \d+ prompts reads '9\+9'"),
    ("verl", put(1, uid="0_0_0"), r"has the uid 0_0_0 more than once"),
    ("verl", put(1, output=None), r"line 2: input and output are no texts"),
    ("verl", put(1, output="1" * 9), r"line 2: its response is 9 tokens"),
]


def dump_of(name: str, place: Path) -> tuple[Path, dict[str, Any]]:
    rows = some_rows(6)
    if name != "verl":
        return TOKENS[name](place, 7, rows), {"tokenizer": TOKENIZER}
    spoken = [row._replace(response=[i for i in row.response if i > 1]) for row in rows]
    return dumped.verl(place, 7, spoken), {**READING, "prompts": [row.prompt for row in rows]}


@pytest.mark.parametrize(("name", "change", "said"), LINES)
def test_what_is_wrong_with_a_line_is_said(tmp_path, name, change, said):
    path, options = dump_of(name, tmp_path)
    file = file_of(name, tmp_path)
    before = [json.loads(line) for line in file.read_text().splitlines()]
    rows = copy.deepcopy(before)
    change(rows)
    dumped.write_lines(file, rows)
    with pytest.raises(RolloutError, match=said):
        read(path, 7, **options)
    dumped.write_lines(file, before)
    assert len(read(path, 7, **options)) == 6


@pytest.mark.parametrize("name", ["nemo_rl", "prime_rl", "open_instruct", "verl"])
def test_a_last_line_that_is_cut_off(tmp_path, name):
    path, options = dump_of(name, tmp_path)
    file = file_of(name, tmp_path)
    file.write_text(file.read_text()[:-9])
    number = len(file.read_text().splitlines())
    with pytest.raises(RolloutError, match=rf"{file.name}, line {number} is cut off"):
        read(path, 7, **options)
    file.write_text("{}\n[1, 2]\n")
    with pytest.raises(RolloutError, match=r"has no '|is a list; expected a JSON object"):
        read(path, 7, **options)
    file.write_text("")
    with pytest.raises(RolloutError, match=r"is empty|holds no"):
        read(path, 7, **options)


def test_ranks_of_prime_rl_come_together(tmp_path):
    rows = some_rows(6)
    path = dumped.prime_rl(tmp_path, 7, rows, ranks=3)
    dumped.prime_rl(tmp_path, 8, rows, ranks=3)
    folder = tmp_path / "token_exports" / "step_7"
    assert len(read(folder)) == len(read(path / "token_exports", 7)) == 6
    for rank in (1, 2):
        away = folder / f"rank_{rank}.jsonl"
        content = away.read_text()
        away.unlink()
        with pytest.raises(RolloutError, match=rf"no rank_{rank}.jsonl, and there are rank files \[0, 1, 2\]"):
            read(path, 7)
        assert len(read(path, 7, ranks=2)) == 4
        away.write_text(content)
    with pytest.raises(RolloutError, match=r"has 3 rank files, .* expected 4"):
        read(path, 7, ranks=4)
    shutil.copy(folder / "rank_0.jsonl", folder / "rank_1.jsonl")
    with pytest.raises(RolloutError, match=r"rank_1.jsonl, line 1 has rank 0, and the file is of rank 1"):
        read(path, 7)
    (folder / "STABLE").unlink()
    with pytest.raises(RolloutError, match="has no STABLE"):
        read(path, 7)


def test_rows_that_nemo_rl_left_out_are_masked(tmp_path):
    batch = read(dumped.nemo_rl(tmp_path, 7, some_rows(6), left_out=(1, 4)), 7)
    for i, record in enumerate(batch):
        kept = record.metadata["per_token"].get("loss_mask", [1])
        assert any(kept) == (i not in (1, 4))
        assert record.metadata["counted"][1] == 4


def test_nemo_rls_placeholder_is_no_log_probability(tmp_path):
    rows = [row._replace(trainer=[0.0] * len(row.response)) for row in some_rows()]
    batch = read(dumped.nemo_rl(tmp_path, 7, rows), 7)
    assert all("old_logprobs" not in record.metadata.get("per_token", {}) for record in batch)


def test_rollouts_of_open_instruct_over_two_shards_lose_their_padding(tmp_path):
    rows = some_rows(4)
    rows[1] = rows[1]._replace(response=[3, 0, 5], sampler=[-0.1, -0.2, -0.3])
    dumped.open_instruct(tmp_path, 7, rows)
    whole = file_of("open_instruct", tmp_path)
    lines = whole.read_text().splitlines(keepends=True)
    whole.write_text("".join(lines[:2]))
    (tmp_path / "mine_rollouts_000001.jsonl").write_text("".join(lines[2:]))
    batch = read(tmp_path, 7, tokenizer=TOKENIZER)
    assert len(batch) == 4
    assert batch.records[1].response_ids == (3, 5)
    assert batch.records[1].logqs == (-0.1, -0.3)
    (tmp_path / "yours_rollouts_000000.jsonl").write_text("".join(lines))
    with pytest.raises(RolloutError, match="of the runs 'mine', 'yours'; name one run's file"):
        read(tmp_path, 7)


def test_a_rollout_of_slime_is_of_several_steps(tmp_path):
    rows = some_rows(6)
    path = dumped.slime(tmp_path, 7, rows, steps=3)
    with pytest.raises(RolloutError, match="3 steps were taken on this rollout; say which"):
        read(path, 7)
    with pytest.raises(RolloutError, match="no step 3 of this rollout; 3 were taken"):
        read(path, 7, minibatch=3)
    for step in range(3):
        batch = read(path, 7, minibatch=step)
        assert [list(r.response_ids) for r in batch] == [row.response for row in rows[2 * step : 2 * step + 2]]
        assert batch.rewards.tolist() == [2.0 * step, 2.0 * step + 1]


def test_what_slime_sampled_is_read_too(tmp_path):
    rows = some_rows(6)
    batch = read(dumped.slime_rollout(tmp_path, 7, rows), 7)
    assert [list(r.response_ids) for r in batch] == [row.response for row in rows]
    assert batch.rewards.tolist() == [row.reward for row in rows]
    assert all(record.advantage is None for record in batch)


def changed(place: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = dumped.slime(place, 7, some_rows(6))
    content = torch.load(place / "7.pt", weights_only=True)
    change(content)
    torch.save(content, place / "7.pt")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(rollout_id=8), "is of the rollout 8, and not 7"),
        (lambda c: c.update(format_version=3), "has format_version 3; 2 is read"),
        (lambda c: c.pop("rollout_id"), "no dump of slime's: it has no rollout_id"),
        (lambda c: c.update(rollout_data={}), "one rank's rollout_data, as slime up to 0.3.1"),
        (lambda c: c.update(samples=[]), "has no samples"),
        (lambda c: c["samples"].pop(), "the sample with rollout_position 5 is missing"),
        (lambda c: c["samples"].append(c["samples"][0]), "a sample is there twice"),
        (lambda c: c["samples"][1].pop("advantages"), r"7.pt, sample 1 has no 'advantages'"),
        (lambda c: c["samples"][1].update(advantages=torch.ones(1)), r"sample 1: advantages has 1 numbers and"),
        (lambda c: c["samples"][1]["log_probs"].fill_(float("nan")), r"sample 1: log_probs\[0\] is nan"),
        (lambda c: c["samples"][1].update(response_lengths=50), r"sample 1: its response is 50 of"),
        (lambda c: c["samples"][1]["tokens"].fill_(-1), r"sample 1: tokens\[0\] is -1"),
        (lambda c: c["samples"][1]["loss_masks"].fill_(3), r"sample 1: loss_masks\[0\] is 3"),
        (lambda c: c["dp_shards"][0].pop("partition"), "dp_shards have no partition"),
        (lambda c: c["dp_shards"][0].update(num_microbatches=[1, 1]), "do not say how many micro-batches"),
    ],
)
def test_what_is_wrong_with_a_file_of_slimes_is_said(tmp_path, change, said):
    with pytest.raises(RolloutError, match=said):
        read(changed(tmp_path, change), 7)


def test_a_file_of_slimes_is_read_as_tensors_only(tmp_path):
    class Image:
        pass

    path = dumped.slime(tmp_path, 7, some_rows())
    torch.save({"rollout_id": 7, "samples": [{"image": Path()}]}, tmp_path / "7.pt")
    with pytest.raises(CheckpointError, match=r"7.pt could not be read as tensors only"):
        read(path, 7)
    shutil.copy(tmp_path / "7.pt", tmp_path / "rank1_7.pt")
    with pytest.raises(RolloutError, match="several files of one rollout"):
        read(path, 7)


def test_verls_texts_are_looked_up_among_the_prompts(tmp_path):
    rows = [row._replace(response=[i for i in row.response if i > 1]) for row in some_rows(6)]
    path = dumped.verl(tmp_path, 7, rows)
    with pytest.raises(RolloutError, match="give tokenizer, max_new_tokens, prompts"):
        read(path, 7)
    batch = read(path, 7, **READING, prompts=[row.prompt for row in rows])
    for record, row in zip(batch, rows, strict=True):
        assert record.prompt_ids == tuple(row.prompt)
        assert record.response_ids == (*row.response, TOKENIZER.eos_token_id)
        assert record.finish == "eos"
        assert record.reward == row.reward
        assert record.provenance.group == row.group
    twice: list[Any] = [[*row.prompt] for row in rows] + [[0, *rows[0].prompt]]
    with pytest.raises(RolloutError, match="Two prompts of other tokens read"):
        read(path, 7, **READING, prompts=twice)
