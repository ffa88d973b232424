"""Save a batch to a directory, and load it with its checksums verified.

<directory>/
  records.jsonl        one sequence a line: ids, texts, rewards, provenance
  tokens.safetensors   prompt_ids, response_ids, logprobs, logqs, entropies, and token_weights/<part> and
                       entropy_weights/<part> where the batch has them, each concatenated over sequences; prompts and
                       responses, the number of tokens of each sequence
  manifest.json        schema version, fingerprint of the checkpoint, sampling, checksums of the other two and its own

The directory is written under a temporary name beside its place, flushed to disk, and then renamed. Schema 2 added
token weights and the values of several reward functions; batches of schema 1 are read as batches without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from fkernel.errors import RolloutError
from fkernel.io import (
    atomic_directory,
    checksummed_json,
    hash_json,
    make_directory,
    parse_json,
    read_checksummed,
    safetensors_chunks,
    write_file,
)
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.record import TOKEN_WEIGHTS, Provenance, SequenceRecord
from fkernel.rollout.sampling import Sampling
from fkernel.shapes import Tensor

SCHEMA = 2
READS = (1, 2)
"""Schemas that `load_batch` reads."""
RECORDS, TOKENS, MANIFEST = "records.jsonl", "tokens.safetensors", "manifest.json"
IDS = ("prompt_ids", "response_ids")
STATISTICS = ("logprobs", "logqs", "entropies")
OPTIONAL = (*TOKEN_WEIGHTS, "rewards", "reward_weights")
"""Fields that schema 2 added; an empty one is left out, so that a batch without them keeps the name it always had."""


def save_batch(batch: GeneratedBatch, directory: str | Path, *, replace: bool = False) -> Path:
    """Write a batch to a directory.

    Args:
        batch: the batch.
        directory: where; it must not exist yet.
        replace: whether another batch that is there is replaced. One that equals this one is left as it is, whatever
            else is there is an error all the same.

    Raises:
        RolloutError: there is something at that place already, or a record's metadata is no JSON.
        StoreError: no room, or no permission; nothing is left behind.
    """
    place = Path(directory)
    if replace and _holds(place, batch):
        return place
    replaced = replace and (place / MANIFEST).is_file()
    if place.exists() and not replaced:
        raise RolloutError(f"There is something at {place} already; choose another directory, or delete it.")
    lines = "".join(_line(record) for record in batch)
    contents = {RECORDS: lines.encode(), TOKENS: b"".join(safetensors_chunks(_tensors(batch)))}
    manifest = {
        "schema": SCHEMA,
        "sequences": len(batch),
        "checkpoint": batch.checkpoint,
        "sampling": None if batch.sampling is None else asdict(batch.sampling),
        "pad_id": batch.pad_id,
        "parts": _parts(batch),
        "diagnostics": batch.diagnostics,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents[MANIFEST] = checksummed_json(manifest)
    make_directory(place.parent)
    with atomic_directory(place, replaced) as work:
        for name, content in contents.items():
            write_file(work / name, [content])
    return place


def load_batch(directory: str | Path, checkpoint: str | None = None) -> GeneratedBatch:
    """Load a batch; it equals the one that was saved, to the last bit.

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
    if schema not in READS:
        raise RolloutError(
            f"The batch at {place} has schema {schema}; this version of fkernel reads up to {SCHEMA}. Update it."
        )
    if checkpoint is not None and manifest.get("checkpoint") is None:
        raise RolloutError(
            f"The batch at {place} does not say which checkpoint it is of: it was saved from a recording, a dump or by "
            f"hand. Name the step of the recording instead (--batch RECORDING:STEP, or kind: recorded), or save it "
            f"with the fingerprint of its policy in batch.checkpoint."
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
            parse_json(line) for line in contents[RECORDS].decode().split("\n") if line
        ]  # texts may hold other line ends
        columns = _columns(load_tensors(contents[TOKENS]), manifest.get("parts", []))
        records = tuple(_record(row, {name: columns[name][i] for name in columns}) for i, row in enumerate(rows))
        sampling = manifest["sampling"] and _sampling(manifest["sampling"])
        return GeneratedBatch(records, manifest["checkpoint"], sampling, manifest["pad_id"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, RolloutError):
            raise
        raise RolloutError(f"The batch at {place} is damaged: {type(error).__name__} {error}.") from error


def content_of_batch(batch: GeneratedBatch, scores: bool = True) -> str:
    """Hash what a batch holds: ids, tokens, texts, rewards, advantages, (token) weights, provenance; not metadata.

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
    kept = [{key: value for key, value in _fields(record).items() if key not in left_out} for record in batch]
    whole = [kept, batch.checkpoint, None if batch.sampling is None else asdict(batch.sampling)]
    return hash_json(whole)


def _holds(place: Path, batch: GeneratedBatch) -> bool:
    """Return whether a directory holds this very batch, undamaged."""
    try:
        return (place / MANIFEST).is_file() and load_batch(place) == batch
    except RolloutError:
        return False


def _short(fingerprint: str | None) -> str:
    return "of no fingerprint" if fingerprint is None else fingerprint[:12]


def _fields(record: SequenceRecord) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if value or key not in OPTIONAL}


def _line(record: SequenceRecord) -> str:
    """Write one record; `abstained` only where it is true, and no numbers of tokens, which `_tensors` keeps."""
    fields = _fields(record) | {"content_hash": record.content_hash}
    skipped = {*IDS, *STATISTICS, *TOKEN_WEIGHTS, *(() if record.abstained else ("abstained",))}
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
    for name in _parts(batch):
        kind, _, part = name.partition("/")
        tensors[name] = flat((getattr(record, kind)[part] for record in batch), torch.float64)
    tensors["prompts"] = torch.tensor([len(record.prompt_ids) for record in batch])
    tensors["responses"] = torch.tensor([len(record.response_ids) for record in batch])
    return tensors


def _parts(batch: GeneratedBatch) -> list[str]:
    """Name the tensors of a batch's token weights, in the order of its parts."""
    return [f"{kind}/{part}" for kind in TOKEN_WEIGHTS for part in getattr(batch.records[0], kind)]


def _columns(tensors: dict[str, Tensor], parts: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Split each tensor into the numbers of each sequence."""
    prompts, responses = tensors["prompts"].tolist(), tensors["responses"].tolist()
    each = {"prompt_ids": prompts, **dict.fromkeys((IDS[1], *STATISTICS, *parts), responses)}
    return {name: [tuple(part.tolist()) for part in tensors[name].split(sizes)] for name, sizes in each.items()}


def _record(row: dict[str, Any], tokens: dict[str, tuple[Any, ...]]) -> SequenceRecord:
    known = row.pop("content_hash")
    fields: dict[str, Any] = {**row, "provenance": Provenance(**row["provenance"])}
    for name, values in tokens.items():
        kind, _, part = name.partition("/")
        if part:
            fields.setdefault(kind, {})[part] = values
        else:
            fields[name] = values
    record = SequenceRecord(**fields)
    if record.content_hash != known:
        raise RolloutError(f"The tokens of {record.sequence_id} are not those that were written.")
    return record


def _sampling(fields: dict[str, Any]) -> Sampling:
    return Sampling(**{**fields, "stop_strings": tuple(fields["stop_strings"])})
