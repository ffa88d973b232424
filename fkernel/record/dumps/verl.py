"""verl's rollouts: <trainer.rollout_data_dir>/{global_step}.jsonl: texts and scores.

    input, output         prompt and response, decoded with skip_special_tokens=True
    score                 Σ of token-level scores, before any KL penalty in the reward
    step, gts             the step, counted from 1: step n is the step after checkpoint global_step_{n-1}; ground truths
    uid                   of trainer v1: {sample}_{rollout}_{output}; or request_id, and whatever the reward function
                          gave

What the file has not: tokens, advantages, masks, log-probabilities, whether a response ended. verl renders prompts by
the tokenizer's chat template, whose special tokens the text has lost; so each input is looked up among the prompts that
the plan names, by the text that their tokens decode to.

Source: verl 0.8 (commit 1dda039b9), verl/trainer/ppo/ray_trainer.py, `_log_rollout_data`; ppo/v1/trainer_base.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fkernel.errors import RolloutError
from fkernel.io import is_json
from fkernel.record.dumps.lines import Line, read_lines
from fkernel.record.dumps.rows import Options, Row
from fkernel.record.dumps.texts import response_of

NAME, FILE = "verl", re.compile(r"(\d+)\.jsonl")
KNOWN = ("input", "output", "score", "step")
UNIQUE = ("uid", "request_id")


def find(path: Path) -> dict[int, list[Path]]:
    """Files by step, of a file or a folder of them."""
    files = [path] if path.is_file() else [*path.glob("*.jsonl")]
    return {int(match[1]): [file] for file in files if (match := FILE.fullmatch(file.name))}


def lacks(files: Sequence[Path]) -> set[str]:
    """What a plan must say beside the file."""
    return {"advantage", "batch_size", "old", "weights", "temperature", "max_new_tokens", "prompts"}


def read(step: int, files: Sequence[Path], options: Options) -> list[Row]:
    """Read a step.

    Raises:
        RolloutError: a row is damaged or there twice, or its tokens are not known.
    """
    (file,) = files
    lines = [*read_lines(file)]
    for line in lines:
        if line.whole("step") != step:
            raise RolloutError(f"{line.place} is of step {line.whole('step')}, and the file of {step}; was it renamed?")
    for name in UNIQUE:
        seen = [line.values[name] for line in lines if name in line.values]
        twice = sorted({str(one) for one in seen if seen.count(one) > 1})
        if twice:
            raise RolloutError(f"{file} has the {name} {twice[0]} more than once; keep the rows of one of the two.")
    prompts = _prompts(options, str(file))
    return [_row(line, prompts, options) for line in lines]


def _row(line: Line, prompts: dict[str, list[int]], options: Options) -> Row:
    written, text = line.get("input"), line.get("output")
    if not isinstance(written, str) or not isinstance(text, str):
        raise RolloutError(f"{line.place}: input and output are no texts.")
    if written not in prompts:
        raise RolloutError(
            f"{line.place}: none of the {len(prompts)} prompts reads {written[:60]!r} once its special tokens are "
            f"left out; give the run's data set as prompts, in its template (chat), and its tokenizer."
        )
    prompt = prompts[written]
    assert options.max_new_tokens is not None
    response, ended = response_of(options.tokenizer, None, text, options.max_new_tokens, line.place)
    uid = line.values.get("uid")
    group = uid.rsplit("_", 2)[0] if isinstance(uid, str) and uid.count("_") >= 2 else tuple(prompt)
    facts = {name: value for name, value in line.values.items() if name not in KNOWN and is_json(value)}
    texts = (str(options.tokenizer.decode(prompt)), text)
    return Row(line.place, prompt, response, group, reward=line.number("score"), texts=texts, ended=ended, facts=facts)


def _prompts(options: Options, place: str) -> dict[str, list[int]]:
    """{text without special tokens: tokens} of the prompts that are known."""
    tokenizer = options.tokenizer
    given = {"tokenizer": tokenizer, "max_new_tokens": options.max_new_tokens, "prompts": options.prompts}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise RolloutError(
            f"{place} has texts without special tokens; give {', '.join(missing)}: the run's tokenizer, its "
            f"max_response_length, and the tokens of its prompts."
        )
    texts: dict[str, list[int]] = {}
    for ids in options.prompts or ():
        own = [int(i) for i in ids]
        text = _decoded(tokenizer, own)
        if texts.setdefault(text, own) != own:
            raise RolloutError(
                f"Two prompts of other tokens read {text[:60]!r} once their special tokens are left out; which of "
                f"them a row of {place} had is not known."
            )
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode([*ids], skip_special_tokens=True))
