"""The task: additions and subtractions of two-digit numbers, split by a seeded generator."""

import random
from dataclasses import dataclass

ALPHABET = "0123456789+-="


@dataclass(frozen=True)
class TaskConfig:
    """Which problems exist, and how they are split.

    Attributes:
        low: smallest operand; two digits, so that every prompt has the same length.
        high: largest operand, inclusive; two digits.
        held_out: number of problems kept away from training.
        seed: seed of the split.
    """

    low: int = 10
    high: int = 99
    held_out: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse operands that would break the constant prompt length, and empty splits."""
        if not 10 <= self.low <= self.high <= 99:
            raise ValueError(f"operands must be two-digit numbers with low <= high; got {self.low}..{self.high}")
        total = 2 * (self.high - self.low + 1) ** 2
        if not 0 < self.held_out < total:
            raise ValueError(f"held_out must lie in 1..{total - 1} of the {total} problems; got {self.held_out}")


@dataclass(frozen=True)
class Problem:
    """One question and its only right answer.

    Attributes:
        id: the problem's name, unique over the whole task, e.g. ``add-37-85``.
        prompt: what the policy reads, always six characters, e.g. ``37+85=``.
        answer: what it should write, e.g. ``122`` or ``-48``.
    """

    id: str
    prompt: str
    answer: str


def addition(a: int, b: int) -> Problem:
    """The problem a + b.

    >>> addition(37, 85)
    Problem(id='add-37-85', prompt='37+85=', answer='122')
    """
    return Problem(f"add-{a}-{b}", f"{a}+{b}=", str(a + b))


def subtraction(a: int, b: int) -> Problem:
    """The problem a - b.

    >>> subtraction(37, 85)
    Problem(id='sub-37-85', prompt='37-85=', answer='-48')
    """
    return Problem(f"sub-{a}-{b}", f"{a}-{b}=", str(a - b))


def splits(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """All problems, shuffled and cut in two.

    Args:
        config: the operands' range, the size of the held-out part and the seed.

    Returns:
        ``(train, held_out)``: disjoint, together every problem once, the same for the same config.
    """
    operands = range(config.low, config.high + 1)
    problems = [make(a, b) for make in (addition, subtraction) for a in operands for b in operands]
    random.Random(config.seed).shuffle(problems)
    return problems[config.held_out :], problems[: config.held_out]


def reward(problem: Problem, response_text: str) -> float:
    """1 for exactly the answer, 0 for anything else, spaces and leading zeros included.

    >>> reward(addition(10, 10), "20"), reward(addition(10, 10), "020")
    (1.0, 0.0)
    """
    return 1.0 if response_text == problem.answer else 0.0
