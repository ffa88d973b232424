"""Call reward functions, one or several: r_u = Σ_k weight_k r_k(u), every function's value recorded.

A reward function has one of two signatures, told apart by its parameters:

    (prompt, response text) -> number                                    fkernel's own, one sequence a call
    (prompts=, completions=, completion_ids=, **columns) -> [numbers]    TRL's, all sequences in one call

One with TRL's gets what TRL gives it: `completions` decoded without special tokens, as texts, or as messages
`[{"role": "assistant", "content": …}]` where the prompts are chats, `prompts` likewise, and every other column of the
prompts' source under its own name. `trainer_state` is None, and `log_extra` and `log_metric` do nothing. Where a
function returns None, its value is left out of the sum; where all do, the response abstains.

Source: TRL 1.16, `GRPOTrainer._calculate_rewards` and `_generate_and_score_completions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from fkernel.errors import RolloutError, listing
from fkernel.rollout.prompts import Prompt, PromptSource
from fkernel.rollout.rewards import Reward, number_of, reward_of

BatchReward = Callable[..., "Sequence[float | None]"]
"""TRL's signature: (prompts=, completions=, completion_ids=, **columns) -> one number a completion, or None."""
RewardConfig = str | Reward | BatchReward | Mapping[str, Any] | Sequence[Any] | None
"""One reward, by name or as a function; or several, {name: reward} or a list of them."""
Messages = list[dict[str, str]]

OWN_CALL = "A reward is called as reward(prompt, response text), for one sequence at a time"
TRL_CALL = "It has TRL's signature, and is called once as reward(prompts=, completions=, completion_ids=, **columns)"


class Answer(NamedTuple):
    """A response that is to be rewarded.

    Attributes:
        sequence_id: its id, for messages.
        prompt: the question that it answers.
        response: its text, special tokens included, without the EOS that ended it.
        asked: what the policy read, for functions of TRL's signature: a text, or a chat's messages.
        completion: its text without special tokens, for functions of TRL's signature.
        completion_ids: its tokens, the EOS that ended it included.
    """

    sequence_id: str
    prompt: Prompt
    response: str
    asked: str | Messages
    completion: str
    completion_ids: tuple[int, ...]


class Judge(NamedTuple):
    """One reward function, and the name that its user knows it by.

    Attributes:
        name: as it was given, or the function's own.
        reward: the function.
        source: of the prompts, whose column of answers has a name.
    """

    name: str
    reward: Callable[..., Any]
    source: PromptSource | None = None

    def __call__(self, prompt: Prompt, response: str, sequence_id: str) -> float | None:
        """Reward one response by a function of fkernel's own signature; None where it returns None.

        Raises:
            RolloutError: the function failed, or returned something else than a finite number; the message names the
                sequence and the function.
        """
        return self._number(self._called(sequence_id, OWN_CALL, prompt, response), sequence_id, OWN_CALL)

    def values(self, answers: Sequence[Answer]) -> list[float | None]:
        """Reward responses, in their order.

        Raises:
            RolloutError: as `__call__`; or a function of TRL's signature gave another number of values.
        """
        if not answers:
            return []
        if not takes_completions(self.reward):
            return [self(each.prompt, each.response, each.sequence_id) for each in answers]
        ids = dict.fromkeys((answers[0].sequence_id, answers[-1].sequence_id))
        given = self._called(" to ".join(ids), TRL_CALL, **self._columns(answers))
        if inspect.isawaitable(given):
            getattr(given, "close", lambda: None)()
            raise RolloutError(
                f"The reward {self.name} is asynchronous; wrap it: lambda **k: asyncio.run(reward(**k))."
            )
        values = list(given) if hasattr(given, "__iter__") and not isinstance(given, str | Mapping) else None
        if values is None or len(values) != len(answers):
            what = f"a {type(given).__name__}" if values is None else f"{len(values)} values"
            raise RolloutError(
                f"The reward {self.name} returned {what} for {len(answers)} completions; expected a list of one number "
                f"each, or None where it cannot judge. ({TRL_CALL}.)"
            )
        return [self._number(v, each.sequence_id, TRL_CALL) for v, each in zip(values, answers, strict=True)]

    def _columns(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Keyword arguments as TRL makes them of a data set's rows."""
        chats = [isinstance(each.asked, list) for each in answers]
        names = dict.fromkeys(key for each in answers for key in each.prompt.metadata)
        columns: dict[str, Any] = {key: [each.prompt.metadata.get(key) for each in answers] for key in names}
        columns[getattr(self.source, "question", "question")] = [each.prompt.question for each in answers]
        columns[getattr(self.source, "answer", "answer")] = [each.prompt.answer for each in answers]
        for reserved in ("prompt", "completion", "completion_ids"):  # columns that TRL leaves out
            columns.pop(reserved, None)
        return columns | {
            "prompts": [each.asked for each in answers],
            "completions": [
                [{"role": "assistant", "content": each.completion}] if chat else each.completion
                for each, chat in zip(answers, chats, strict=True)
            ],
            "completion_ids": [list(each.completion_ids) for each in answers],
            "trainer_state": None,
            "log_extra": lambda *_: None,
            "log_metric": lambda *_: None,
        }

    def _called(self, sequence_id: str, called: str, *args: Any, **columns: Any) -> Any:
        try:
            return self.reward(*args, **columns)
        except Exception as error:  # a user's function may raise whatever it likes
            what = str(error) if isinstance(error, RolloutError) else f"{type(error).__name__}: {error}"
            raise RolloutError(f"{sequence_id}: the reward {self.name} failed: {what} ({called}.)") from error

    def _number(self, given: Any, sequence_id: str, called: str) -> float | None:
        if given is None:
            return None
        value = number_of(given)
        if value is None or not isfinite(value):
            shown = repr(given) if len(repr(given)) < 80 else f"{repr(given)[:76]} ..."
            raise RolloutError(
                f"{sequence_id}: the reward {self.name} returned {shown}, a {type(given).__name__}; expected a finite "
                f"number, or None where it cannot judge. ({called}.)"
            )
        return value


class Rewarded(NamedTuple):
    """What reward functions made of one response.

    Attributes:
        total: r = Σ_k weight_k r_k over the functions that judged it; None where none did.
        values: {function: r_k}, None where that function returned None; {} where one function was given without a name.
        weights: {function: weight_k}; the same names.
    """

    total: float | None
    values: dict[str, float | None]
    weights: dict[str, float]


class Panel(NamedTuple):
    """Reward functions and their weights.

    Attributes:
        judges: the functions.
        weights: of each; None for one function whose value is the reward itself.
    """

    judges: tuple[Judge, ...]
    weights: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """What a message calls it."""
        return " + ".join(judge.name for judge in self.judges)

    def rewarded(self, answers: Sequence[Answer]) -> list[Rewarded]:
        """Reward responses, in their order; raises as `Judge.values`."""
        columns = [judge.values(answers) for judge in self.judges]
        if self.weights is None:
            return [Rewarded(value, {}, {}) for value in columns[0]]
        names = [judge.name for judge in self.judges]
        weights = dict(zip(names, self.weights, strict=True))
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return [Rewarded(weighted_sum(row, weights), row, dict(weights)) for row in rows]


def weighted_sum(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Compute r = Σ_k weight_k r_k over the functions that judged a response; None where none did.

    Example:
        >>> weighted_sum({"right": 1.0, "short": None}, {"right": 2.0, "short": 0.5})
        2.0
    """
    judged = {name: value for name, value in values.items() if value is not None}
    return sum(weights[name] * value for name, value in judged.items()) if judged else None


def takes_completions(reward: Callable[..., Any]) -> bool:
    """Tell whether a reward function has TRL's signature: it names `completions`, or takes keyword columns alone.

    Example:
        >>> takes_completions(lambda completions, **columns: []), takes_completions(lambda prompt, response: 1.0)
        (True, False)
    """
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some built-in functions tell nothing
        return False
    kinds = [parameter.kind for parameter in parameters]
    positional = sum(
        kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
    )
    named = {"prompts", "completions", "completion_ids"} & {parameter.name for parameter in parameters}
    variadic = inspect.Parameter.VAR_POSITIONAL in kinds
    return bool(named) or (inspect.Parameter.VAR_KEYWORD in kinds and positional < 2 and not variadic)


def judge_of(given: str | Reward | BatchReward | None, source: PromptSource | None = None) -> Judge | None:
    """Find a reward as `fkernel.rollout.rewards.reward_of` does, with its name; None for none."""
    reward: Any = given if callable(given) else reward_of(given, source)
    if reward is None:
        return None
    if isinstance(given, str):
        return Judge(given, reward, source)
    own = reward if hasattr(reward, "__qualname__") else type(reward)
    return Judge(f"{own.__module__}.{own.__qualname__}", reward, source)


def panel_of(
    given: RewardConfig,
    source: PromptSource | None = None,
    weights: Mapping[str, float] | Sequence[float] | None = None,
) -> Panel | None:
    """Find reward functions and their weights.

    Args:
        given: one reward, as in `fkernel.rollout.rewards.reward_of`, or a function of TRL's signature; or several,
            {name: reward} or a list, whose names are those of the functions, as in TRL. None for none.
        source: of the prompts.
        weights: of each, by name or in the same order; 1 by default.

    Raises:
        RolloutError: there is no such reward; a name occurs twice; weights are of other names, of another number, or
            not finite.

    Example:
        >>> panel = panel_of({"right": lambda prompt, response: 1.0, "short": lambda completions, **_: [0.5]},
        ...                  weights={"right": 1.0, "short": 0.1})
        >>> panel.rewarded([Answer("U-000-00", Prompt("train-000000", "1+1?"), "2", "1+1?", "2", (5, 1))])[0].total
        1.05
    """
    if given is None or isinstance(given, str) or callable(given):
        if weights is not None:
            raise RolloutError(
                "Weights of rewards are given for one reward; give rewards as {name: reward}, or as a list."
            )
        judge = judge_of(given, source)
        return None if judge is None else Panel((judge,))
    pairs = [*given.items()] if isinstance(given, Mapping) else [(_short(each), each) for each in given]
    names = [name for name, _ in pairs]
    if not names or len({*names}) < len(names):
        raise RolloutError(
            f"The rewards are named {listing(names) or 'nothing'}; expected one or more different names."
        )
    judges = [judge_of(each, source) for _, each in pairs]
    named = tuple(Judge(name, judge.reward, source) for name, judge in zip(names, judges, strict=True) if judge)
    if len(named) < len(names):
        raise RolloutError(f"A reward among {listing(names)} is None; leave it out.")
    return Panel(named, _weights(names, weights))


def _short(reward: Any) -> str:
    """Name a reward as TRL does: its function's own name, without its module."""
    return reward.rpartition(".")[2] if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


def _weights(names: list[str], weights: Mapping[str, float] | Sequence[float] | None) -> tuple[float, ...]:
    """One weight for each name, in their order."""
    if weights is None:
        return (1.0,) * len(names)
    if isinstance(weights, Mapping):
        unknown = [*({*names} ^ {*weights})]
        if unknown:
            raise RolloutError(
                f"Weights are of {listing([*weights])}, the rewards are {listing(names)}; give one for each."
            )
        weights = [weights[name] for name in names]
    if len(weights) != len(names) or not all(isfinite(weight) for weight in weights):
        raise RolloutError(f"Weights are {[*weights]}; expected {len(names)} finite numbers, for {listing(names)}.")
    return tuple(map(float, weights))
