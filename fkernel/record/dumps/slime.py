"""slime's dumps: --save-debug-train-data (what was trained on), --save-debug-rollout-data (what was sampled).

Training data, format 2: {"format_version": 2, "rollout_id": n, "samples": [one dict a sample], "dp_shards": [its
schedule], "raw_reward": [one a sample of the rollout]}, of all ranks. Of a sample:

    tokens                                    prompt and response
    response_lengths                          tokens of the response, the last ones; total_lengths those of both
    loss_masks, advantages                    one a response token
    log_probs                                 of the trainer, one a response token: before its first step on the
                                              rollout, or of the training's own pass where there is one step only
    rollout_log_probs, ref_log_probs          of the engine that sampled, and of the reference policy
    rollout_mask_sums                         what a token's loss is divided by, beside the number of samples
    rollout_position                          its place in the rollout

A rollout may be trained on in several steps (dp_shards' num_microbatches has one number a step), of which `minibatch`
names one. Rollout data are {"rollout_id": n, "samples": […]}: tokens, response_length, loss_mask, reward,
rollout_log_probs, status; no advantages. Rollouts count from 0: rollout n is trained on after checkpoint iter_{n-1}.

Files are read as tensors only: one with other objects, such as images, is refused by name.

Source: slime after 0.3.1 (commit 624b824a8), slime/observability/train_data_utils.py, `_build_dump_payload`;
rollout_data_utils.py, `save_debug_rollout_data`; backends/megatron_utils/actor.py and loss.py; utils/dp_schedule.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint import read_tensors
from fkernel.errors import RolloutError, listing
from fkernel.record.dumps.lines import Line, flags
from fkernel.record.dumps.rows import Options, Row

NAME, FILE = "slime", re.compile(r"(?:.*[^\d])?(\d+)\.pt")
FORMAT = 2
WHAT = "samples that slime dumped"
TRUNCATED = "truncated"


def find(path: Path) -> dict[int, list[Path]]:
    """Files by rollout, of a file or a folder of them: the last number of the name is the rollout's."""
    files = [path] if path.is_file() else [file for file in path.glob("*.pt") if not file.name.startswith("eval_")]
    steps: dict[int, list[Path]] = {}
    for file in sorted(files):
        if match := FILE.fullmatch(file.name):
            steps.setdefault(int(match[1]), []).append(file)
    return steps


def lacks(files: Sequence[Path]) -> set[str]:
    """What a plan must say beside the file."""
    trained = "dp_shards" in _loaded(files)
    return {"weights", "temperature"} | (set() if trained else {"advantage", "batch_size", "old"})


def read(step: int, files: Sequence[Path], options: Options) -> list[Row]:
    """Read a rollout, or one of the steps that were taken on it.

    Raises:
        RolloutError: the file is another rollout's, of an older format, or a sample is damaged.
    """
    content = _loaded(files)
    place = str(files[0])
    if content.get("rollout_id") != step:
        raise RolloutError(f"{place} is of the rollout {content.get('rollout_id')}, and not {step}; was it renamed?")
    samples = content.get("samples")
    if not isinstance(samples, list) or not samples or not all(isinstance(one, Mapping) for one in samples):
        raise RolloutError(f"{place} has no samples; expected what slime writes with --save-debug-train-data.")
    lines = [Line(f"{place}, sample {i}", _plain(sample)) for i, sample in enumerate(samples)]
    if "dp_shards" not in content:
        _unasked(options, place)
        return [_sampled(line) for line in lines]
    if content.get("format_version") != FORMAT:
        raise RolloutError(f"{place} has format_version {content.get('format_version')}; {FORMAT} is read.")
    trained, sequences = _of_step(lines, content["dp_shards"], options.minibatch, place)
    rewards = content.get("raw_reward")
    return [_trained(line, rewards, sequences) for line in trained]


def _loaded(files: Sequence[Path]) -> Mapping[str, Any]:
    if len(files) > 1:
        raise RolloutError(
            f"There are several files of one rollout: {listing([file.name for file in files])}; slime before 0.4 "
            f"wrote one for each rank, without the schedule of steps, and these are not read. Name one file otherwise."
        )
    content = read_tensors(files[0], WHAT)
    if isinstance(content, Mapping) and "rollout_data" in content:
        raise RolloutError(
            f"{files[0]} is one rank's rollout_data, as slime up to 0.3.1 wrote it: it does not say which samples a "
            f"step was of. Update slime, or record the run."
        )
    if not isinstance(content, Mapping) or "rollout_id" not in content:
        raise RolloutError(f"{files[0]} is no dump of slime's: it has no rollout_id.")
    return content


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as lists."""
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in sample.items()}


def _of_step(lines: list[Line], shards: Any, minibatch: int | None, place: str) -> tuple[list[Line], int]:
    """The samples of one of the rollout's steps, in the rollout's order, and how many the loss counts them as."""
    counts = {tuple(shard.get("num_microbatches") or ()) for shard in shards}
    steps = len(next(iter(counts), ()))
    if len(counts) != 1 or not steps:
        raise RolloutError(f"{place}: dp_shards do not say how many micro-batches each step had (num_microbatches).")
    if minibatch is None and steps > 1:
        raise RolloutError(
            f"{place}: {steps} steps were taken on this rollout; say which (minibatch, 0 for the first, which begins "
            f"at the checkpoint)."
        )
    number = minibatch or 0
    if number >= steps:
        raise RolloutError(
            f"{place}: there is no step {number} of this rollout; {steps} were taken (minibatch from 0)."
        )
    positions = list[int]()
    for shard in shards:
        each, partition = shard["num_microbatches"], shard.get("partition")
        if partition is None:
            raise RolloutError(
                f"{place}: dp_shards have no partition, so that it is not known which samples a step was of."
            )
        first = sum(each[:number])
        batches = shard["micro_batch_indices"][first : first + each[number]]
        positions += [partition[i] for batch in batches for i in batch]
    at = {line.whole("rollout_position"): line for line in lines}
    if len(at) < len(lines) or len({*positions}) < len(positions):
        raise RolloutError(f"{place}: a sample is there twice (rollout_position).")
    missing = sorted({*positions} - {*at})
    if missing:
        raise RolloutError(f"{place}: the sample with rollout_position {missing[0]} is missing.")
    sizes = shards[0].get("global_batch_sizes") or ()
    return [at[i] for i in sorted(positions)], int(sizes[number]) if number < len(sizes) else len(positions)


def _trained(line: Line, rewards: Any, sequences: int) -> Row:
    ids, length = line.ids("tokens"), line.whole("response_lengths")
    start = _start(line, ids, length)
    mask = flags(line.get("loss_masks"), "loss_masks", line.place, "response_lengths", length)
    position = line.whole("rollout_position")
    tokens = line.whole("rollout_mask_sums") if "rollout_mask_sums" in line.values else None
    known = isinstance(rewards, list) and position < len(rewards) and isinstance(rewards[position], int | float)
    return Row(
        line.place,
        ids[:start],
        ids[start:],
        group=tuple(ids[:start]),
        mask=mask,
        advantages=line.numbers("advantages", "response_lengths", length),
        old=_optional(line, "log_probs", length),
        sampler=_optional(line, "rollout_log_probs", length),
        reference=_optional(line, "ref_log_probs", length),
        reward=float(rewards[position]) if known else None,
        ended=not line.values.get(TRUNCATED, False),
        counted=None if tokens is None else (tokens, sequences),
    )


def _sampled(line: Line) -> Row:
    ids, length = line.ids("tokens"), line.whole("response_length")
    start, mask = _start(line, ids, length), line.values.get("loss_mask")
    kept = [True] * length if mask is None else flags(mask, "loss_mask", line.place, "response_length", length)
    if line.values.get("remove_sample"):
        kept = [False] * length
    group = line.values.get("group_index")
    return Row(
        line.place,
        ids[:start],
        ids[start:],
        group=tuple(ids[:start]) if group is None else group,
        mask=kept,
        sampler=_optional(line, "rollout_log_probs", length),
        reward=line.number("reward"),
        ended=line.values.get("status") != TRUNCATED,
    )


def _start(line: Line, ids: Sequence[int], length: int) -> int:
    if not 0 < length < len(ids):
        raise RolloutError(
            f"{line.place}: its response is {length} of {len(ids)} tokens; expected a prompt and a response."
        )
    return len(ids) - length


def _optional(line: Line, name: str, length: int) -> list[float] | None:
    return None if line.values.get(name) is None else line.numbers(name, "the response", length)


def _unasked(options: Options, place: str) -> None:
    if options.minibatch is not None:
        raise RolloutError(f"{place} is what was sampled, and does not say which samples a step was of (minibatch).")
