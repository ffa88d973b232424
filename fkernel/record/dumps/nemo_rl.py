"""NeMo-RL's training data: <log_dir>/train_data_step{n}.jsonl, of GRPO and PPO.

It is not written with env.should_log_nemo_gym_responses.

    token_ids [t]             prompt and response, padded on the right to the batch's longest with the padding token
    input_lengths             tokens of the row without its padding
    token_loss_mask [t]       1 for tokens that the policy wrote; not shifted: entry t is about token t
    sample_loss_mask          1, or 0 for a row that is left out (truncated, or too far from the sampler's log-probs)
    advantages [t]            of each token; not shifted
    generation_logprobs [t]   of the inference engine, 0 for what it did not write; entry t is of token t
    prev_logprobs [t]         of the trainer before its first step on the batch, entry t of token t, the first 0;
                              all 0 with force_on_policy_ratio, where it is not computed
    rewards, filtered_rewards, content, idx

A line is a batch of one: every value is a list with one entry. n counts from 1: step n is the step after checkpoint
step_{n-1}. Files of versions before 0.6 have no token_ids, and cannot be used.

The loss drops column 0 of all of them (`[:, 1:]`) to meet next-token log-probabilities, so that column t is about token
t. Rows whose sample_loss_mask is 0 are masked as a whole; a sequence-level loss divides by the number of the others.

Source: NeMo-RL 0.7 (commit 7ea279abf), nemo_rl/algorithms/grpo.py, `grpo_train`, `async_grpo_train`; ppo.py;
utils/logger.py, `Logger.log_batched_dict_as_jsonl`; algorithms/loss/loss_functions.py, `ClippedPGLossFn`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fkernel.errors import RolloutError
from fkernel.record.dumps.lines import Line, check_numbered, flags, read_lines
from fkernel.record.dumps.rows import Options, Row, split

NAME, FILE = "nemo_rl", re.compile(r"train_data_step(\d+)\.jsonl")


def find(path: Path) -> dict[int, list[Path]]:
    """Files by step, of a file or a folder of them."""
    files = [path] if path.is_file() else [*path.glob("train_data_step*.jsonl")]
    return {int(match[1]): [file] for file in files if (match := FILE.fullmatch(file.name))}


def lacks(files: Sequence[Path]) -> set[str]:
    """What a plan must say beside the file."""
    return {"batch_size", "weights", "temperature"}


def read(step: int, files: Sequence[Path], options: Options) -> list[Row]:
    """Read a step.

    Raises:
        RolloutError: a row is damaged, missing, or has no tokens.
    """
    (file,) = files
    lines = [Line(line.place, _single(line)) for line in read_lines(file)]
    if "token_ids" not in lines[0].values:
        raise RolloutError(
            f"{file} has no token_ids: NeMo-RL before 0.6 wrote texts and log-probabilities only. Record such a run "
            f"with fkernel.record.Recorder."
        )
    check_numbered([line.whole("idx") for line in lines], "idx", str(file))
    rows = [_row(line) for line in lines]
    n = sum(line.number("sample_loss_mask") > 0 for line in lines)
    if not n:
        raise RolloutError(f"{file}: sample_loss_mask is 0 in every row, so that the step had no loss.")
    rows = [row._replace(counted=(sum(row.mask or ()), n)) for row in rows]
    if all(row.old is not None and not any(row.old) for row in rows):  # force_on_policy_ratio: a placeholder
        rows = [row._replace(old=None) for row in rows]
    return rows


def _single(line: Line) -> dict[str, Any]:
    """The values of a batch of one; idx is no list."""
    values = dict[str, Any]()
    for name, value in line.values.items():
        if name == "idx":
            values[name] = value
            continue
        if not isinstance(value, list) or len(value) != 1:
            raise RolloutError(
                f"{line.place}: {name} is {str(value)[:40]}; expected a list of one, as NeMo-RL writes a batch of one."
            )
        values[name] = value[0]
    return values


def _row(line: Line) -> Row:
    """One row without its padding; masked as a whole where the loss left it out."""
    ids, length = line.ids("token_ids"), line.whole("input_lengths")
    t = len(ids)
    if not 2 <= length <= t:
        raise RolloutError(f"{line.place}: input_lengths is {length}, and token_ids has {t}; expected 2 to {t}.")
    mask = flags(line.get("token_loss_mask"), "token_loss_mask", line.place, "token_ids", t)
    if any(mask[length:]):
        raise RolloutError(f"{line.place}: token_loss_mask is 1 behind the {length} tokens of the row (input_lengths).")
    counted = line.number("sample_loss_mask")
    if counted not in (0.0, 1.0):
        raise RolloutError(f"{line.place}: sample_loss_mask is {counted:g}; expected 0 or 1.")
    start = split(line.place, ids[:length], mask[:length])
    names = ("advantages", "prev_logprobs", "generation_logprobs")
    streams = {name: line.numbers(name, "token_ids", t, start, length) for name in names}
    reward = line.number("filtered_rewards" if "filtered_rewards" in line.values else "rewards")
    return Row(
        line.place,
        ids[:start],
        ids[start:length],
        group=tuple(ids[:start]),
        mask=[kept and counted == 1 for kept in mask[start:length]],
        advantages=streams["advantages"],
        old=streams["prev_logprobs"],
        sampler=streams["generation_logprobs"],
        reward=reward,
        facts={"agent_ref": line.values["agent_ref"]} if "agent_ref" in line.values else {},
    )
