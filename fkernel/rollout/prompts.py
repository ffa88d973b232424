"""Sources of prompts: a file, a data set, a procedural task; prompts are numbered in their source, before any filter.

A source is anything with a `name`, a `split`, a length and `source[i] -> Prompt`. A prompt's `global_prompt_id` is its
split and its position there, so that it means the same in every batch, after every filter and on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fkernel.errors import RolloutError
from fkernel.io import parse_json


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        global_prompt_id: split and position in the source, ``train-000012``; ``custom-…`` for hand-written ones.
        question: what is asked, without any template.
        answer: the reference answer, or None.
        split: of the source.
        source: the source's name.
        metadata: whatever else the source knows; JSON.
    """

    global_prompt_id: str
    question: str
    answer: str | None = None
    split: str = "train"
    source: str = "custom"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class PromptSource(Protocol):
    """A source of prompts, as `SampleGenerator` takes it."""

    name: str
    split: str

    def __len__(self) -> int:
        """Count the prompts."""
        ...

    def __getitem__(self, index: int) -> Prompt:
        """Give the prompt at a position."""
        ...


class TablePrompts:
    """A source of rows, each a mapping; what `jsonl` and `dataset` return.

    Attributes:
        name: where the rows come from.
        split: of the source.
        question: the column of the question.
        answer: the column of the reference answer; reward functions with keyword columns get it under this name.

    Example:
        >>> TablePrompts("mine", "test", [{"question": "1+1?", "answer": "2"}])[0].global_prompt_id
        'test-000000'
    """

    def __init__(
        self,
        name: str,
        split: str,
        rows: Any,
        question: str = "question",
        answer: str = "answer",
    ) -> None:
        """Set the rows, a list or a data set of mappings, and the names of the columns of question and answer."""
        self.name, self.split = name, split
        self._rows, self.question, self.answer = rows, question, answer

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        """Give the prompt at a position.

        Raises:
            RolloutError: its row has no question.
        """
        row = dict(self._rows[index])
        question = row.pop(self.question, None)
        answer = row.pop(self.answer, None)
        if not isinstance(question, str) or not question:
            raise RolloutError(
                f"Row {index} of {self.name!r} has no text under {self.question!r} (it has {sorted(map(str, row))}); "
                f"say which column holds the question."
            )
        given = None if answer is None else str(answer)
        return Prompt(prompt_id(self.split, index), question, given, self.split, self.name, row)


def prompt_id(split: str, index: int) -> str:
    """Name a prompt by its place in its source."""
    return f"{split}-{index:06d}"


def jsonl(path: str | Path, split: str = "train", question: str = "question", answer: str = "answer") -> TablePrompts:
    """Read prompts from a file of one JSON object a line.

    Raises:
        RolloutError: there is no such file, or a line is no JSON object; it says which.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutError(f"The prompts at {path} cannot be read: {error}") from error
    return TablePrompts(str(path), split, [*_objects(path, lines)], question, answer)


def _objects(path: str | Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise RolloutError(f"{path}, line {number}: no JSON ({error}).") from None
        if not isinstance(value, dict):
            raise RolloutError(f"{path}, line {number}: expected an object; this is a {type(value).__name__}.")
        yield value


def dataset(path: str | Path, split: str = "train", question: str = "question", answer: str = "answer") -> TablePrompts:
    """Take prompts from a local Hugging Face data set, as `save_to_disk` wrote it.

    Raises:
        RolloutError: `datasets` is not installed, there is no such data set, or it has no such split.
    """
    try:
        from datasets import load_from_disk  # an optional package
    except ImportError:
        raise RolloutError("Data sets need the package datasets: pip install 'fkernel[rollout]'.") from None
    if not Path(path).is_dir():
        raise RolloutError(f"There is no data set at {path}; expected a directory of save_to_disk().")
    rows: Any = load_from_disk(str(path))
    if isinstance(rows, Mapping):
        if split not in rows:
            raise RolloutError(f"The data set at {path} has the splits {sorted(rows)}; there is no {split!r}.")
        rows = rows[split]
    return TablePrompts(str(path), split, rows, question, answer)


class Gym:
    """A `reasoning-gym` task: procedurally generated questions with an answer and a scorer; needs no download.

    Attributes:
        name: the task's name.
        split: of the prompts.
        scorer: (response text, entry) -> score in [0, 1], the task's own.
    """

    def __init__(self, task: str, split: str = "train", size: int = 1000, seed: int = 0, **options: Any) -> None:
        """Generate a task.

        Args:
            task: its name, such as "gsm_symbolic" (questions of GSM8K's kind) or "basic_arithmetic".
            split: "train" and every other split are different questions of the same task.
            size: how many questions there are.
            seed: of the task.
            **options: of the task.

        Raises:
            RolloutError: `reasoning-gym` is not installed, or knows no such task or options.
        """
        try:
            import reasoning_gym  # an optional package
        except ImportError:
            raise RolloutError("Tasks need the package reasoning-gym: pip install 'fkernel[rollout]'.") from None
        self.name, self.split = task, split
        try:
            self._entries = reasoning_gym.create_dataset(task, size=size, seed=_seed_of(split, seed), **options)
        except Exception as error:  # its configurations assert and raise as they like
            raise RolloutError(f"reasoning-gym makes no {task!r} with {options or 'its defaults'}: {error}") from error
        self.scorer = self._entries.score_answer

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self._entries)

    def __getitem__(self, index: int) -> Prompt:
        """Give the prompt at a position."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        entry = self._entries[index]
        metadata = json.loads(json.dumps(entry.get("metadata", {}), default=str))
        return Prompt(
            prompt_id(self.split, index), entry["question"], entry["answer"], self.split, self.name, {"entry": metadata}
        )


def _seed_of(split: str, seed: int) -> int:
    """Derive the seed of a split, so that splits have different questions."""
    import zlib

    return seed if split == "train" else seed + 1 + zlib.crc32(split.encode())


def custom(questions: Sequence[str]) -> list[Prompt]:
    """Make prompts of texts written by hand; an id is the text's own, so that it means the same everywhere.

    Example:
        >>> [prompt.source for prompt in custom(["What is 1+1?"])]
        ['custom']
    """
    import hashlib

    return [
        Prompt(f"custom-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text, split="custom") for text in questions
    ]
