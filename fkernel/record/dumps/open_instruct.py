"""open-instruct's rollouts: <rollouts_save_path>/<run>_rollouts_{shard:06d}.jsonl (save_traces).

    step                  counted from 0: step n is the step after n training steps, which checkpoint global_step{n}
                          follows
    sample_idx            0, 1, … in the step; prompt_idx is sample_idx // (samples per prompt)
    prompt_tokens, response_tokens
    reward, advantage     one number each
    logprobs              of vLLM, one a response token
    finish_reason         "stop" where the response ended by itself
    request_info          of tools: what they were asked; the mask of their tokens is not written

A shard holds 10,000 rows; a step's rows may lie in two. Rows of truncated responses are dropped before they are written
(mask_truncated_completions). Where sequences are packed for the loss, padding tokens are taken out of prompts and
responses (the inference engine may draw one); so they are here.

Source: open-instruct 0.3 (commit e6c3044aa), open_instruct/rl_utils.py, `RolloutRecord`, `_save_rollouts`,
`pack_sequences`; data_loader.py, `DataPreparationActor`; grpo_fast.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fkernel.errors import RolloutError, listing
from fkernel.record.dumps.lines import Line, check_numbered, read_lines
from fkernel.record.dumps.rows import Options, Row

NAME, FILE = "open_instruct", re.compile(r"(.+)_rollouts_(\d{6})\.jsonl")
BEGINNING, FINISHED = re.compile(r'\{"step": (\d+), '), "stop"


def find(path: Path) -> dict[int, list[Path]]:
    """Shards by step, of a shard or a folder of one run's.

    Raises:
        RolloutError: the folder holds several runs', or a shard is damaged.
    """
    files = sorted([path] if path.is_file() else path.glob("*_rollouts_*.jsonl"))
    named = {file: match[1] for file in files if (match := FILE.fullmatch(file.name))}
    runs = sorted({*named.values()})
    if len(runs) > 1:
        raise RolloutError(f"{path} holds rollouts of the runs {listing(runs)}; name one run's file.")
    steps: dict[int, list[Path]] = {}
    for file in named:
        for step in _steps(file):
            steps.setdefault(step, []).append(file)
    return steps


def lacks(files: Sequence[Path]) -> set[str]:
    """What a plan must say beside the files."""
    return {"batch_size", "old", "weights", "temperature"}


def read(step: int, files: Sequence[Path], options: Options) -> list[Row]:
    """Read a step, from one shard or two.

    Raises:
        RolloutError: a row is damaged, missing, written twice, or has tokens of a tool.
    """
    lines = [line for file in files for line in read_lines(file) if line.whole("step") == step]
    check_numbered([line.whole("sample_idx") for line in lines], "sample_idx", f"step {step} of {_names(files)}")
    lines.sort(key=lambda line: line.whole("sample_idx"))
    return [_row(line, options) for line in lines]


def _row(line: Line, options: Options) -> Row:
    prompt, response = line.ids("prompt_tokens"), line.ids("response_tokens")
    info = line.values.get("request_info")
    if isinstance(info, Mapping) and (info.get("tool_calleds") or info.get("num_calls")):
        raise RolloutError(
            f"{line.place}: its response holds tokens of a tool, and which they are is not in the file. Record such a "
            f"run with fkernel.record.Recorder."
        )
    logprobs = line.values.get("logprobs")
    sampler = None if logprobs is None else line.numbers("logprobs", "response_tokens", len(response))
    padding = getattr(options.tokenizer, "pad_token_id", None)
    kept = [i for i, token in enumerate(response) if token != padding]
    reason = line.get("finish_reason")
    return Row(
        line.place,
        [token for token in prompt if token != padding],
        [response[i] for i in kept],
        group=line.whole("prompt_idx"),
        advantages=line.number("advantage"),
        sampler=None if sampler is None else [sampler[i] for i in kept],
        reward=line.number("reward"),
        ended=reason == FINISHED,
        facts={"dataset": line.values.get("dataset"), "finish_reason": reason},
    )


def _steps(file: Path) -> set[int]:
    """Steps whose rows a shard holds, by how its lines begin: it may be large."""
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            matches = [BEGINNING.match(text) for text in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutError(f"{file} cannot be read: {error}.") from error
    if not matches or None in matches:
        return {line.whole("step") for line in read_lines(file)}
    return {int(match[1]) for match in matches if match}


def _names(files: Sequence[Path]) -> str:
    return " and ".join(map(str, files))
