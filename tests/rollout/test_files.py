"""Batches: found by id, filtered and merged without renumbering, saved whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

import fkernel as fk
from fkernel.io import checksummed_json, read_checksummed
from fkernel.rollout import GeneratedBatch, Provenance, Sampling, SequenceRecord, load_batch, save_batch


def record(name: str, **options) -> SequenceRecord:
    generator = torch.Generator().manual_seed(hash(name) % 1000)
    n = int(torch.randint(1, 6, (), generator=generator))
    numbers = tuple(torch.randn(n, generator=generator).tolist())
    prompt = f"p{name[2:5]}"
    return SequenceRecord(
        **{
            "sequence_id": name,
            "prompt_ids": (5, 6, 7),
            "response_ids": tuple(range(n)),
            "prompt": "a\u2028question\n",
            "response": "ünïcode \x00",
            "logprobs": numbers,
            "logqs": (-float("inf"), *numbers[1:]),
            "entropies": tuple(abs(x) for x in numbers),
            "finish": "eos",
            "provenance": Provenance(prompt, "train", "mine", int(name[2:5]), int(name[6:]), seed=3),
            "metadata": {"nested": [1, {"a": None}]},
            **options,
        }
    )


NAMES = ["U-000-00", "U-000-01", "U-001-00", "U-001-01"]


@pytest.fixture
def batch() -> GeneratedBatch:
    rewards = dict(zip(NAMES, (1.0, 0.0, 1.0, 1.0), strict=True))
    records = tuple(record(name, reward=rewards[name]) for name in NAMES)
    return GeneratedBatch(records, "f" * 64, Sampling(0.7, 0.9, 5, 20, ("\n\n",)), 0)


def test_a_saved_batch_is_the_same_batch(batch, tmp_path):
    batch = batch.with_advantages("grpo").with_loss_weights("grpo")
    save_batch(batch, tmp_path / "U")
    assert load_batch(tmp_path / "U") == batch
    assert load_batch(tmp_path / "U", checkpoint="f" * 64) == batch
    assert sorted(os.listdir(tmp_path)) == ["U"]
    manifest = json.loads((tmp_path / "U" / "manifest.json").read_text())
    assert manifest["schema"] == 2
    assert manifest["diagnostics"]["without_signal"] == 0.5


def test_a_batch_that_names_no_checkpoint_says_what_to_take_instead(batch, tmp_path):
    save_batch(replace(batch, checkpoint=None), tmp_path / "U")
    assert load_batch(tmp_path / "U").checkpoint is None
    with pytest.raises(fk.RolloutError, match="--batch RECORDING:STEP, or kind: recorded"):
        load_batch(tmp_path / "U", checkpoint="0" * 64)


def test_another_checkpoints_batch_is_refused(batch, tmp_path):
    save_batch(batch, tmp_path / "U")
    with pytest.raises(fk.RolloutError, match=r"written by the checkpoint ffffffffffff, this one is 000000000000"):
        load_batch(tmp_path / "U", checkpoint="0" * 64)


@pytest.mark.parametrize("name", ["records.jsonl", "tokens.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_batches_are_refused(batch, tmp_path, name, damage):
    file = save_batch(batch, tmp_path / "U") / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    with pytest.raises(fk.RolloutError, match=r"is not what was written|cannot be read|is damaged"):
        load_batch(tmp_path / "U")


def test_newer_schema_and_foreign_records_are_refused(batch, tmp_path):
    place = save_batch(batch, tmp_path / "U")
    manifest = read_checksummed(place / "manifest.json")
    (place / "manifest.json").write_bytes(checksummed_json({**manifest, "schema": 3}))
    with pytest.raises(fk.RolloutError, match=r"has schema 3; this version of fkernel reads up to 2. Update it"):
        load_batch(place)
    other = save_batch(GeneratedBatch(tuple(record(f"E-00{i}-00") for i in range(4))), tmp_path / "E")
    lines = (other / "records.jsonl").read_bytes()
    (place / "records.jsonl").write_bytes(lines)
    (place / "manifest.json").write_bytes(checksummed_json(manifest))
    with pytest.raises(fk.RolloutError, match="is not what was written"):
        load_batch(place)


def test_nothing_half_written_is_left(batch, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="U': the disk is full; make room"):
        save_batch(batch, tmp_path / "U")
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(batch, tmp_path):
    save_batch(batch, tmp_path / "U")
    with pytest.raises(fk.RolloutError, match=r"something at .* already"):
        save_batch(batch, tmp_path / "U")
    odd = GeneratedBatch((record("C-000-00", metadata={"x": {1, 2}}),))
    with pytest.raises(fk.RolloutError, match="is no JSON"):
        save_batch(odd, tmp_path / "C")
    assert not (tmp_path / "C").exists()
    with pytest.raises(fk.RolloutError, match="There is no batch at"):
        load_batch(tmp_path / "C")


def test_subsets_keep_ids_order_and_hashes(batch):
    some = batch.clone_with_subset(["U-001-01", "U-000-01"])
    assert some.ids == ["U-000-01", "U-001-01"]
    assert some.by_id("U-001-01") is batch.by_id("U-001-01")
    right = batch.clone_with_subset(lambda each: each.reward == 1.0)
    assert right.ids == ["U-000-00", "U-001-00", "U-001-01"]
    with pytest.raises(fk.RolloutError, match="no sequence 'U-001-0' in this batch of 4; near: 'U-001-0"):
        batch.by_id("U-001-0")
    with pytest.raises(fk.RolloutError, match="at least one sequence"):
        batch.clone_with_subset([])
    with pytest.raises(fk.RolloutError, match="No sequence of this batch belongs to the prompt 'p9'"):
        batch.by_prompt("p9")


def test_merging(batch):
    other = replace(batch, records=tuple(record(f"E-00{i}-00", reward=0.0) for i in range(2)))
    both = GeneratedBatch.merge([batch, other])
    assert both.ids == [*NAMES, "E-000-00", "E-001-00"]
    assert both.groups.tolist() == [0, 0, 1, 1, 2, 3]  # U-000 and E-000 are two draws
    with pytest.raises(fk.RolloutError, match=r"'U-000-00'.* occur\(s\) more than once"):
        GeneratedBatch.merge([batch, batch])
    with pytest.raises(fk.RolloutError, match="two checkpoints"):
        GeneratedBatch.merge([batch, replace(other, checkpoint="0")])
    with pytest.raises(fk.RolloutError, match="sampled differently"):
        GeneratedBatch.merge([batch, replace(other, sampling=Sampling(0.8))])
    assert GeneratedBatch.merge([replace(other, sampling=None), batch]).sampling == batch.sampling
    with pytest.raises(fk.RolloutError, match="nothing to merge"):
        GeneratedBatch.merge([])


def test_numbers_that_are_missing(batch):
    with pytest.raises(fk.RolloutError, match="4 of 4 sequences have no advantage"):
        _ = batch.advantages
    with pytest.raises(fk.RolloutError, match="gave shape"):
        batch.with_advantages(lambda rewards, groups: rewards[:1])


def test_diagnostics_and_frame(batch):
    found = batch.diagnostics
    assert found["mean_reward"] == 0.75
    assert found["truncated"] == 0.0
    lengths = sorted(len(each.response_ids) for each in batch)
    assert found["length"]["min"] == lengths[0]
    assert found["length"]["max"] == lengths[-1]
    json.dumps(found, allow_nan=False)
    frame = batch.to_frame()
    assert list(frame.index) == NAMES
    assert frame.loc["U-000-01", "reward"] == 0.0
    assert frame.loc["U-000-01", "logprob"] == batch.by_id("U-000-01").logprob


def test_sequences_are_the_engines(batch):
    tokens = batch.sequences
    assert tokens.response_mask.sum(1).tolist() == [len(each.response_ids) for each in batch]
