"""A batch as a directory: complete or absent, checked when it is read.

<directory>/
  records.jsonl        one sequence a line: ids, texts, reward, provenance
  tokens.safetensors   prompt_ids, response_ids, logprobs, logqs, entropies, each laid end to end; prompts and
                       responses, tokens of each sequence
  manifest.json        schema version, fingerprint of the checkpoint, sampling, checksums of the other two and its own

It is written beside its place and renamed when everything is on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fkernel.errors import RolloutError
from fkernel.io import atomic_directory, checksummed_json, hash_json, read_checksummed
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.record import Provenance, SequenceRecord
from fkernel.rollout.sampling import Sampling
from fkernel.shapes import Tensor

SCHEMA = 1
RECORDS, TOKENS, MANIFEST = "records.jsonl", "tokens.safetensors", "manifest.json"
IDS = ("prompt_ids", "response_ids")
STATISTICS = ("logprobs", "logqs", "entropies")


def save_batch(batch: GeneratedBatch, directory: str | Path, *, replace: bool = False) -> Path:
    """Write a batch.

    Args:
        batch: the batch.
        directory: where; it must not exist yet.
        replace: whether another batch that is there is replaced. One that equals this one is left as it is, whatever
            else is there is an error all the same.

    Raises:
        RolloutError: there is something at that place already, or a record's metadata is no JSON.
        OSError: no room, or no permission; nothing is left behind.
    """
    place = Path(directory)
    if replace and _holds(place, batch):
        return place
    replaced = replace and (place / MANIFEST).is_file()
    if place.exists() and not replaced:
        raise RolloutError(f"There is something at {place} already; choose another directory, or delete it.")
    lines = "".join(_line(record) for record in batch)
    contents = {RECORDS: lines.encode(), TOKENS: save_tensors(_tensors(batch))}
    manifest = {
        "schema": SCHEMA,
        "sequences": len(batch),
        "checkpoint": batch.checkpoint,
        "sampling": None if batch.sampling is None else asdict(batch.sampling),
        "pad_id": batch.pad_id,
        "diagnostics": batch.diagnostics,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents[MANIFEST] = checksummed_json(manifest)
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(place, replaced) as work:
        for name, content in contents.items():
            (work / name).write_bytes(content)
    return place


def load_batch(directory: str | Path, checkpoint: str | None = None) -> GeneratedBatch:
    """Read a batch; it equals the one that was written, to the last bit.

    Args:
        directory: what `save_batch` wrote.
        checkpoint: fingerprint of the policy that it must be of; None to take any.

    Raises:
        RolloutError: there is none, it is damaged, of a newer schema, or of another checkpoint.
    """
    place = Path(directory)
    try:
        manifest = read_checksummed(place / MANIFEST)
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RolloutError(f"There is no batch at {place}: its {MANIFEST} cannot be read ({error}).") from error
    if schema != SCHEMA:
        raise RolloutError(
            f"The batch at {place} has schema {schema}; this version of fkernel reads {SCHEMA}. Update it."
        )
    if checkpoint is not None and manifest.get("checkpoint") != checkpoint:
        raise RolloutError(
            f"The batch at {place} was written by the checkpoint {_short(manifest.get('checkpoint'))}, this one is "
            f"{_short(checkpoint)}: its log-probabilities are another policy's."
        )
    try:
        contents = {name: (place / name).read_bytes() for name in (RECORDS, TOKENS)}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
                raise RolloutError(f"{place / name} is not what was written ({len(content)} bytes): it is damaged.")
        rows = [
            json.loads(line) for line in contents[RECORDS].decode().split("\n") if line
        ]  # texts may hold other line ends
        columns = _columns(load_tensors(contents[TOKENS]))
        records = tuple(_record(row, {name: columns[name][i] for name in columns}) for i, row in enumerate(rows))
        sampling = manifest["sampling"] and _sampling(manifest["sampling"])
        return GeneratedBatch(records, manifest["checkpoint"], sampling, manifest["pad_id"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, RolloutError):
            raise
        raise RolloutError(f"The batch at {place} is damaged: {type(error).__name__} {error}.") from error


def content_of_batch(batch: GeneratedBatch, scores: bool = True) -> str:
    """Name what a batch holds: ids, tokens, texts, rewards, advantages, weights, where each came from; not metadata.

    Args:
        batch: the batch.
        scores: whether log-probabilities and entropies are part of it: a model's numbers, whose last digits another
            machine may find otherwise.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> from dataclasses import replace
        >>> given = Provenance("custom-0", "custom", "custom", 0, 0)
        >>> one = SequenceRecord("U-000-00", (1,), (2,), "a", "b", (-1.0,), (-1.0,), (0.5,), "eos", given, reward=1.0)
        >>> batch, other = GeneratedBatch((one,)), GeneratedBatch((replace(one, reward=0.5),))
        >>> content_of_batch(batch) == content_of_batch(other)
        False
    """
    left_out = {"metadata", *(() if scores else STATISTICS)}
    kept = [{key: value for key, value in asdict(record).items() if key not in left_out} for record in batch]
    whole = [kept, batch.checkpoint, None if batch.sampling is None else asdict(batch.sampling)]
    return hash_json(whole)


def _holds(place: Path, batch: GeneratedBatch) -> bool:
    """Tell whether a batch is what lies at a place, undamaged."""
    try:
        return (place / MANIFEST).is_file() and load_batch(place) == batch
    except RolloutError:
        return False


def _short(fingerprint: str | None) -> str:
    return "of no fingerprint" if fingerprint is None else fingerprint[:12]


def _line(record: SequenceRecord) -> str:
    """Write one record; `abstained` stands there only where it is true, so that others stay as they always were."""
    fields = asdict(record) | {"content_hash": record.content_hash}
    skipped = {*IDS, *STATISTICS, *(() if record.abstained else ("abstained",))}
    kept = {key: value for key, value in fields.items() if key not in skipped}
    try:
        return json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RolloutError(
            f"{record.sequence_id}: its metadata or reward is no JSON: {error}. Expected texts, finite numbers, "
            f"true, false, null, and lists and objects of them."
        ) from error


def _tensors(batch: GeneratedBatch) -> dict[str, Tensor]:
    def flat(rows: Iterable[tuple[Any, ...]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=dtype)

    tensors = {name: flat((getattr(record, name) for record in batch), torch.int64) for name in IDS}
    tensors |= {name: flat((getattr(record, name) for record in batch), torch.float64) for name in STATISTICS}
    tensors["prompts"] = torch.tensor([len(record.prompt_ids) for record in batch])
    tensors["responses"] = torch.tensor([len(record.response_ids) for record in batch])
    return tensors


def _columns(tensors: dict[str, Tensor]) -> dict[str, list[tuple[Any, ...]]]:
    """Cut each tensor into what belongs to each sequence."""
    prompts, responses = tensors["prompts"].tolist(), tensors["responses"].tolist()
    each = {"prompt_ids": prompts, **dict.fromkeys((IDS[1], *STATISTICS), responses)}
    return {name: [tuple(part.tolist()) for part in tensors[name].split(sizes)] for name, sizes in each.items()}


def _record(row: dict[str, Any], tokens: dict[str, tuple[Any, ...]]) -> SequenceRecord:
    known = row.pop("content_hash")
    record = SequenceRecord(**{**row, **tokens, "provenance": Provenance(**row["provenance"])})
    if record.content_hash != known:
        raise RolloutError(f"The tokens of {record.sequence_id} are not those that were written.")
    return record


def _sampling(fields: dict[str, Any]) -> Sampling:
    return Sampling(**{**fields, "stop_strings": tuple(fields["stop_strings"])})
