"""What a TRL run logged of the sequences of a step, against the tokens that its file was read as.

A checkpoint saved at or after the step has the log (`trainer_state.json`, log_history). Where every step was logged, a
step's entry is about its own generation:

    completions/mean_length, min_length, max_length    of the responses, EOS included
    num_tokens                                         of prompts and responses since the run began

Source: TRL 1.16, trainer/grpo_trainer.py, `GRPOTrainer._generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fkernel.checkpoint import read_json
from fkernel.errors import RolloutError
from fkernel.record.dumps.rows import Row
from fkernel.record.dumps.texts import KEEP_TOKENS

STATE = "trainer_state.json"
LENGTHS = "completions/mean_length"


def check_logged(file: Path, step: int, rows: Sequence[Row]) -> None:
    """Hold the numbers of tokens against the run's log, where there is one.

    Args:
        file: of completions.
        step: its step.
        rows: its rows.

    Raises:
        RolloutError: an evaluation wrote the file again, or the numbers are others.
    """
    log = logged(file, step)
    entries = [entry for entry in log if entry.get("step") == step]
    if any(key.startswith("eval_completions/") for entry in entries for key in entry):
        raise RolloutError(
            f"{file}: the run was evaluated at step {step}, and TRL wrote the file again with completions of the "
            f"evaluation among its rows; take a step without an evaluation."
        )
    now = next((entry for entry in entries if LENGTHS in entry), None)
    before = [entry for entry in log if entry.get("step") == step - 1 and "num_tokens" in entry]
    if now is None or (step > 1 and not before):
        return  # several steps were logged as one: their mean is of several files
    lengths = [len(row.response_ids) for row in rows]
    told = {"mean": sum(lengths) / len(lengths), "min": min(lengths), "max": max(lengths)}
    for name, value in told.items():
        meant = now.get(f"completions/{name}_length", value)
        if abs(meant - value) > 1e-4 * max(1.0, abs(meant)):
            raise RolloutError(
                f"{file}: its responses are read as {value:g} tokens ({name}), and the run logged {meant:g} at step "
                f"{step}. Is this the run's tokenizer, and max_new_tokens its max_completion_length? Or the model "
                f"wrote texts in other tokens. {KEEP_TOKENS}"
            )
    start = float(before[-1]["num_tokens"]) if step > 1 else 0.0
    total = sum(lengths) + sum(len(row.prompt_ids) for row in rows)
    if "num_tokens" in now and now["num_tokens"] - start not in (0.0, float(total)):
        raise RolloutError(
            f"{file}: its prompts and responses are read as {total} tokens, and the run counted "
            f"{now['num_tokens'] - start:g} in step {step}. Were prompts tokenized otherwise (chat_template_kwargs), "
            f"or was the batch generated in several parts, of which the file has the last (steps_per_generation)?"
        )


def logged(file: Path, step: int) -> list[Mapping[str, Any]]:
    """The log of the first checkpoint that was saved at or after a step; [] where there is none."""
    output = file.parent.parent if file.parent.name == "completions" else file.parent
    places = [(int(number), place) for place in output.glob("checkpoint-*") if (number := place.name[11:]).isdecimal()]
    for number, place in sorted(places):
        if number >= step and (place / STATE).is_file():
            state = read_json(place / STATE, "the state of a trainer of transformers")
            return [entry for entry in state.get("log_history", []) if isinstance(entry, Mapping)]
    return []
