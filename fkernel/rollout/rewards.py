"""From a prompt and a response to a number."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from decimal import Decimal
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple

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


class Judge(NamedTuple):
    """A reward function, and the name that its user knows it by.

    Attributes:
        name: as it was given, or the function's own.
        reward: the function.
    """

    name: str
    reward: Reward

    def __call__(self, prompt: Prompt, response: str, sequence_id: str) -> float | None:
        """Reward one response; None where the function returns None.

        Raises:
            RolloutError: the function failed, or returned something else than a finite number; the message names the
                sequence and the function.
        """
        try:
            given = self.reward(prompt, response)
        except Exception as error:  # a user's function may raise whatever it likes
            what = str(error) if isinstance(error, RolloutError) else f"{type(error).__name__}: {error}"
            raise RolloutError(f"{sequence_id}: the reward {self.name} failed: {what} ({CALLED}.)") from error
        if given is None:
            return None
        value = number_of(given)
        if value is None or not isfinite(value):
            shown = repr(given) if len(repr(given)) < 80 else f"{repr(given)[:76]} ..."
            raise RolloutError(
                f"{sequence_id}: the reward {self.name} returned {shown}, a {type(given).__name__}; expected a finite "
                f"number, or None where it cannot judge. ({CALLED}.)"
            )
        return value


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


CALLED = "A reward is called as reward(prompt, response text), for one sequence at a time"


def judge_of(given: str | Reward | None, source: PromptSource | None = None) -> Judge | None:
    """Find a reward as `reward_of` does, with its name; None for none."""
    reward = reward_of(given, source)
    if reward is None:
        return None
    if isinstance(given, str):
        return Judge(given, reward)
    own = reward if hasattr(reward, "__qualname__") else type(reward)
    return Judge(f"{own.__module__}.{own.__qualname__}", reward)


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
