"""What the demo hands to the study: problems as prompt files, and the last step's batch as a saved batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fkernel import checkpoint
from fkernel.demo.records import Record, read_records
from fkernel.demo.reinforce import ReinforceConfig
from fkernel.demo.task import Problem
from fkernel.func import pad
from fkernel.rollout import GeneratedBatch, Provenance, Sampling, SequenceRecord, TokenStatistics, save_batch, score


def hand_over(directory: Path, train: Sequence[Problem], held_out: Sequence[Problem], config: ReinforceConfig) -> None:
    """Write ``train.jsonl``, ``test.jsonl`` and ``update/`` beside the last step's checkpoint.

    Args:
        directory: what `reinforce` wrote to.
        train: problems that were trained on.
        held_out: problems that were not.
        config: the steps.
    """
    for split, problems in (("train", train), ("test", held_out)):
        lines = (json.dumps({"question": problem.prompt, "answer": problem.answer}) for problem in problems)
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    loaded = checkpoint.load(directory)
    records = read_records(directory / "update.json")
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    samples = [record.sample for record in records]
    sequences = pad([s.prompt_ids for s in samples], [s.response_ids for s in samples], loaded.tokenizer.pad_token_id)
    place = {problem.id: index for index, problem in enumerate(train)}
    told = score(loaded.model, sequences, sampling)
    rows = (_record(record, known, place, config) for record, known in zip(records, told, strict=True))
    batch = GeneratedBatch(tuple(rows), loaded.provenance.fingerprint, sampling, loaded.tokenizer.pad_token_id)
    save_batch(batch, directory / "update")


def _record(record: Record, known: TokenStatistics, place: dict[str, int], config: ReinforceConfig) -> SequenceRecord:
    sample = record.sample
    return SequenceRecord(
        sequence_id=sample.id,
        prompt_ids=sample.prompt_ids,
        response_ids=sample.response_ids,
        prompt=sample.problem.prompt,
        response=sample.text,
        **known._asdict(),
        finish="length" if sample.truncated else "eos",
        provenance=Provenance(
            f"train-{place[sample.problem.id]:06d}",
            "train",
            "demo",
            sample.group,
            int(sample.id.rpartition("-")[2]),
            seed=config.seed,
        ),
        reward=sample.reward,
        advantage=record.advantage,
        weight=record.weight,
    )
