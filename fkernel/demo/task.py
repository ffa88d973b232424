"""The task: additions and subtractions of two-digit numbers, split by a seeded generator."""

import random
from dataclasses import dataclass

from fkernel.rollout import TablePrompts

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
        """Check that prompts have a constant length, and that no split is empty."""
        if not 10 <= self.low <= self.high <= 99:
            raise ValueError(f"operands must be two-digit numbers with low <= high; got {self.low}..{self.high}")
        total = 2 * (self.high - self.low + 1) ** 2
        if not 0 < self.held_out < total:
            raise ValueError(f"held_out must lie in 1..{total - 1} of the {total} problems; got {self.held_out}")


def problem(a: int, sign: str, b: int) -> dict[str, str]:
    """One question, always six characters, and its answer.

    Example:
        >>> problem(37, "-", 85)
        {'question': '37-85=', 'answer': '-48'}
    """
    return {"question": f"{a}{sign}{b}=", "answer": str(a + b if sign == "+" else a - b)}


def splits(config: TaskConfig) -> dict[str, TablePrompts]:
    """All problems, shuffled and cut in two.

    Args:
        config: the operands' range, the size of the held-out part and the seed.

    Returns:
        Prompts by split, "train" and "test": disjoint, together every problem once, the same for the same config.

    Example:
        >>> {name: len(prompts) for name, prompts in splits(TaskConfig()).items()}
        {'train': 15200, 'test': 1000}
    """
    operands = range(config.low, config.high + 1)
    problems = [problem(a, sign, b) for sign in "+-" for a in operands for b in operands]
    random.Random(config.seed).shuffle(problems)
    parts = {"train": problems[config.held_out :], "test": problems[: config.held_out]}
    return {name: TablePrompts("demo", name, part) for name, part in parts.items()}
