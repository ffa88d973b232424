"""Reward functions by name, and how a reward is found: (prompt, response text) -> number."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import Any

from fkernel.errors import RolloutError
from fkernel.rollout.prompts import Gym, Prompt, PromptSource

Reward = Callable[[Prompt, str], float | None]
"""(prompt, response text) -> reward; or None for a response that it cannot judge: it is then left out of its group."""

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_block(response: str) -> str | None:
    """Find the text of the answer block; None unless there is exactly one.

    Example:
        >>> answer_block("so </think> <answer> 42 </answer>")
        '42'
        >>> answer_block("<answer>1</answer><answer>2</answer>") is None
        True
    """
    blocks = ANSWER.findall(response)
    tags = response.count("<answer>"), response.count("</answer>")
    return blocks[0].strip() if len(blocks) == 1 and tags == (1, 1) else None


def math(prompt: Prompt, response: str) -> float:
    r"""1 where exactly one ``<answer>`` block says what the reference answer says, as mathematics; else 0.

    GSM8K's reference answers end with ``#### 42``; what is before that is not compared.

    Raises:
        RolloutError: math-verify is not installed, or the prompt has no reference answer.
    """
    try:
        from math_verify import parse, verify  # an optional package
    except ImportError:
        raise RolloutError("The reward 'math' needs math-verify: pip install 'fkernel[rollout]'.") from None
    if prompt.answer is None:
        raise RolloutError(f"The prompt {prompt.global_prompt_id} has no reference answer to compare with.")
    answer = answer_block(response)
    if answer is None:
        return 0.0
    gold = prompt.answer.rpartition("####")[2].strip()
    # Timeouts use signals, which work in the main thread only; the texts here are short.
    sides = [parse(f"${side}$", parsing_timeout=None) for side in (gold, answer)]  # pyright: ignore[reportArgumentType]
    return float(verify(*sides, timeout_seconds=None))  # pyright: ignore[reportArgumentType]


def exact(prompt: Prompt, response: str) -> float:
    """1 where the response is the reference answer, character by character; else 0.

    Raises:
        RolloutError: the prompt has no reference answer.
    """
    if prompt.answer is None:
        raise RolloutError(f"The prompt {prompt.global_prompt_id} has no reference answer to compare with.")
    return float(response == prompt.answer)


def gym(source: PromptSource) -> Reward:
    """Make the reward of a `reasoning-gym` task: its own scorer, on the answer block where there is exactly one.

    Raises:
        RolloutError: the source is no task.
    """
    if not isinstance(source, Gym):
        raise RolloutError(f"The reward 'gym' is a reasoning-gym task's own; the prompts come from {source.name!r}.")

    def score(prompt: Prompt, response: str) -> float:
        answer = answer_block(response)
        entry = {"question": prompt.question, "answer": prompt.answer, "metadata": prompt.metadata.get("entry", {})}
        return float(source.scorer(response.strip() if answer is None else answer, entry))

    return score


def number_of(given: Any) -> float | None:
    """Read a number, or a tensor or array of one; None for anything else.

    Example:
        >>> number_of(True), number_of("1"), number_of([1.0])
        (1.0, None, None)
    """
    try:
        number = given.item() if hasattr(given, "item") else given
        return float(number) if isinstance(number, Real | Decimal) else None
    except (ValueError, RuntimeError, OverflowError):  # several numbers, or one that no float holds
        return None


def reward_of(name: str | Reward | None, source: PromptSource | None = None) -> Reward | None:
    """Find a reward: "math", "exact", "gym", a dotted name such as "my_package.rewards.brevity", or a function.

    Raises:
        RolloutError: there is none of that name.
    """
    if name is None or callable(name):
        return name
    if name == "gym":
        if source is None:
            raise RolloutError("The reward 'gym' is a reasoning-gym task's own; there is no prompt source.")
        return gym(source)
    if name in NAMED:
        return NAMED[name]
    return dotted(name, f"a reward: {', '.join([*NAMED, 'gym'])}, or module.function")


NAMED: dict[str, Reward] = {"math": math, "exact": exact}


def dotted(name: str, expected: str) -> Any:
    """Import what a dotted name says.

    Raises:
        RolloutError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.rpartition(".")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RolloutError(f"{name!r} is not {expected} ({error}).") from error
    if not callable(value):
        raise RolloutError(f"{name!r} is not {expected} (it is a {type(value).__name__}).")
    return value
