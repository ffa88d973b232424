"""TRL's completions: <output_dir>/completions/completions_{step:05d}.parquet (GRPO and RLOO, log_completions=True).

    step         the trainer's global_step once the step was taken: file 13 is of the step from checkpoint-12 to -13
    prompt       a text, or messages: as the data set has it
    completion   batch_decode(…, skip_special_tokens=True), or one message of the assistant with that text
    <reward>     one column a reward function, NaN where it returned None; and what log_extra was given
    advantage    one number a row

What the file has not: tokens (unless a reward function called log_extra("completion_ids", completion_ids)), which rows
were masked as truncated, log-probabilities. Tokens are made as the trainer makes them, `tokenizer(text=prompt)` or
`apply_chat_template(prompt, add_generation_prompt=True)`, and their numbers are held against what the run logged, where
a later checkpoint's trainer_state.json is beside it: "completions/mean_length", "…/min_length", "…/max_length",
"num_tokens".

An evaluation at the step writes the file again, with its own completions among the rows: refused where the log shows
it.

Source: TRL 1.16, trainer/grpo_trainer.py, `GRPOTrainer.log`, `_generate`, `_tokenize_prompts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fkernel.errors import RolloutError, listing
from fkernel.io import is_json
from fkernel.record.dumps.lines import token_ids
from fkernel.record.dumps.rows import Options, Row
from fkernel.record.dumps.texts import KEEP_TOKENS, chat_text, check_decoded, response_of
from fkernel.record.dumps.trl_log import check_logged

NAME, FILE = "trl", re.compile(r"completions_(\d+)\.parquet")
KNOWN = ("step", "prompt", "completion", "advantage", "prompt_ids", "completion_ids")


def find(path: Path) -> dict[int, list[Path]]:
    """Files by step, of a file, a folder of them, or a trainer's output_dir."""
    files = [path] if path.is_file() else [*path.glob("*.parquet"), *(path / "completions").glob("*.parquet")]
    return {int(match[1]): [file] for file in files if (match := FILE.fullmatch(file.name))}


def lacks(files: Sequence[Path]) -> set[str]:
    """What a plan must say beside the file."""
    columns = {*_parquet().read_schema(_only(files)).names}
    missing = {"batch_size", "old", "weights", "temperature"} | ({"advantage"} if "advantage" not in columns else set())
    return missing if "completion_ids" in columns else missing | {"max_new_tokens"}


def read(step: int, files: Sequence[Path], options: Options) -> list[Row]:
    """Read a step.

    Raises:
        RolloutError: the file is damaged or another step's, a row's tokens are not known, or their numbers are not
        those
            that the run logged.
    """
    file = _only(files)
    try:
        table = _parquet().read_table(file).to_pylist()
    except Exception as error:  # what reads a damaged file raises whatever it likes
        raise RolloutError(
            f"{file} is no whole Parquet file ({error}); copy it again, or take another step."
        ) from error
    if not table:
        raise RolloutError(f"{file} has no row.")
    other = {row.get("step") for row in table} - {step}
    if other:
        raise RolloutError(
            f"{file} holds rows of step {sorted(map(str, other))[0]}: it is another step's, or was renamed."
        )
    rewards = _reward_names(table[0], file, options)
    rows = [_row(values, f"{file}, row {i}", rewards, options) for i, values in enumerate(table)]
    check_logged(file, step, rows)
    return rows


def _row(values: Mapping[str, Any], place: str, names: Sequence[str], options: Options) -> Row:
    for name in ("prompt", "completion"):
        if values.get(name) is None:
            raise RolloutError(f"{place} has no {name!r}; it has {listing(sorted(values), 12)}.")
    advantage = values.get("advantage")
    if "advantage" in values and not (isinstance(advantage, float) and math.isfinite(advantage)):
        raise RolloutError(f"{place}: its advantage is {advantage!r}; expected a finite number.")
    prompt, completion = values["prompt"], values["completion"]
    text = completion if isinstance(completion, str) else chat_text(completion, place)
    written, prompt_ids = _prompt(prompt, values.get("prompt_ids"), place, options)
    if values.get("completion_ids") is not None:
        response = token_ids([*values["completion_ids"]], "completion_ids", place)
        ended = None if options.tokenizer is None else response[-1:] == [options.tokenizer.eos_token_id]
        if options.tokenizer is not None:
            check_decoded(options.tokenizer, response, text, "completion_ids", place)
    else:
        tokenizer, most = _for_texts(options, place, written is not None)
        response, ended = response_of(tokenizer, written, text, most, place)
    said = {name: _reward(values[name], name, place) for name in names}
    weights = {name: float((options.reward_weights or {})[name]) for name in names}
    known = [weights[name] * value for name, value in said.items() if value is not None]
    columns = {key: value for key, value in values.items() if key not in (*KNOWN, *names) and is_json(value)}
    return Row(
        place,
        prompt_ids,
        response,
        group=tuple(prompt_ids),
        advantages=advantage,
        reward=sum(known) if known else None,
        rewards=said,
        reward_weights=weights,
        texts=(written or str(prompt), text),
        ended=ended,
        facts={"columns": columns} if columns else {},
    )


def _prompt(prompt: Any, ids: Any, place: str, options: Options) -> tuple[str | None, list[int]]:
    """The prompt's text as it was tokenized, and its tokens."""
    tokenizer = options.tokenizer
    if ids is not None:
        return None, token_ids([*ids], "prompt_ids", place)
    if tokenizer is None:
        raise RolloutError(f"{place} has texts and no tokens; give the run's tokenizer (tokenizer=…).")
    if isinstance(prompt, str):
        return prompt, [int(i) for i in tokenizer(text=prompt)["input_ids"]]
    try:
        more = dict(options.chat_template_kwargs or {})
        written = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **more)
    except Exception as error:  # a template may raise whatever it likes
        raise RolloutError(f"{place}: the tokenizer's chat template fails on its prompt: {error}.") from error
    return written, [int(i) for i in tokenizer.encode(written, add_special_tokens=False)]


def _for_texts(options: Options, place: str, known: bool) -> tuple[Any, int]:
    """The tokenizer, and the most tokens of a response."""
    tokenizer = options.tokenizer
    if tokenizer is None:
        raise RolloutError(f"{place} has texts and no tokens; give the run's tokenizer (tokenizer=…).")
    if options.max_new_tokens is None:
        raise RolloutError(
            f"{place}: whether its response ended or was cut off is told by its length; give max_new_tokens, the run's "
            f"max_completion_length."
        )
    template = [name for name in ("response_template", "response_schema") if getattr(tokenizer, name, None) is not None]
    if template:
        raise RolloutError(
            f"{place}: with this tokenizer's {template[0]} TRL parses completions, and its file has the parts and not "
            f"the text. {KEEP_TOKENS}"
        )
    return tokenizer, options.max_new_tokens


def _reward_names(row: Mapping[str, Any], file: Path, options: Options) -> list[str]:
    names = [*(options.reward_weights or {})]
    unknown = [name for name in names if name not in row]
    if unknown:
        raise RolloutError(
            f"{file} has no column {unknown[0]!r} for reward_weights; its columns are {listing([*row], 12)}."
        )
    return names


def _reward(value: Any, name: str, place: str) -> float | None:
    """The value of a reward function; None where it abstained, which pandas writes as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RolloutError(f"{place}: the reward {name!r} is {value!r}; expected a number.")
    return float(value)


def _only(files: Sequence[Path]) -> Path:
    (file,) = files
    return file


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise RolloutError(
            "TRL's completions are Parquet files, which pyarrow reads: pip install pyarrow (it comes with datasets)."
        ) from None
