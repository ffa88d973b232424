"""Whose dump a path holds, which steps, and one step of it as a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fkernel.errors import RolloutError
from fkernel.record.dumps import nemo_rl, open_instruct, prime_rl, slime, trl, verl
from fkernel.record.dumps.rows import Options, Row, records_of
from fkernel.rollout import GeneratedBatch


class Source(NamedTuple):
    """A trainer whose dumps are read.

    Attributes:
        name: of the trainer.
        find: {step: files} of a path; {} where there is none of its files.
        read: rows of a step.
        lacks: what is not in the files and a plan must say.
        taken: optimizer steps, or rollouts, that were taken before step 0 of its numbering.
    """

    name: str
    find: Callable[[Path], dict[int, list[Path]]]
    read: Callable[[int, Sequence[Path], Options], list[Row]]
    lacks: Callable[[Sequence[Path]], set[str]]
    taken: int


SOURCES: Mapping[str, Source] = {
    module.NAME: Source(module.NAME, module.find, module.read, module.lacks, taken)
    for module, taken in ((trl, -1), (nemo_rl, -1), (prime_rl, -1), (open_instruct, 0), (slime, 0), (verl, -1))
}
"""By the trainer's name."""


class Dump(NamedTuple):
    """One step of a trainer's dump, found and not yet read.

    Attributes:
        source: whose.
        step: as the trainer numbers it.
        files: that hold it.
    """

    source: Source
    step: int
    files: tuple[Path, ...]

    @property
    def lacks(self) -> frozenset[str]:
        """What the files do not say: advantage, batch_size, old, weights, temperature, max_new_tokens, prompts."""
        return frozenset(self.source.lacks(self.files))

    @property
    def steps_before(self) -> int:
        """Steps that were taken before it, of the optimizer (of slime's: rollouts)."""
        return self.step + self.source.taken

    def batch(self, options: Options) -> GeneratedBatch:
        """Read it."""
        rows = self.source.read(self.step, self.files, options)
        return GeneratedBatch(records_of(rows, self.source.name, self.step, options))


def locate(path: str | Path, step: int | None = None, trainer: str | None = None) -> Dump:
    """Find a step in what a trainer dumped.

    Args:
        path: a file, or the folder that it lies in.
        step: as the trainer numbers its files; None where there is one.
        trainer: whose dump it is, where that is not told by the files' names.

    Raises:
        RolloutError: nothing is there, it is of no known trainer or of several, or there is no such step; it says which
            there are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     _ = Path(run, "3.jsonl").write_text("")
        ...     locate(run).source.name, locate(run).step, locate(run).steps_before
        ('verl', 3, 2)
    """
    place = Path(path)
    if step is not None and step < 0:
        raise RolloutError(f"step is {step}; expected a number from 0 on, as the trainer numbers its files.")
    if trainer is not None and trainer not in SOURCES:
        raise RolloutError(f"There is no reader for dumps of {trainer!r}; expected {', '.join(SOURCES)}.")
    if not place.exists():
        raise RolloutError(
            f"There is nothing at {place}; expected a file or a folder that a trainer dumped batches to."
        )
    sources = [SOURCES[trainer]] if trainer is not None else [*SOURCES.values()]
    found = {source.name: steps for source in sources if (steps := source.find(place))}
    if not found:
        raise RolloutError(f"{place} holds no file of a dump that is known. Expected {_expected(trainer)}.")
    if len(found) > 1:
        raise RolloutError(f"{place} holds files of {' and '.join(found)}; say whose are meant (trainer).")
    ((name, steps),) = found.items()
    if step is None and len(steps) > 1:
        raise RolloutError(f"{place} holds the steps {_numbers(steps)}; say which (step).")
    number = next(iter(steps)) if step is None else step
    if number not in steps:
        raise RolloutError(f"{place} holds no step {number}; it holds {_numbers(steps)}.")
    return Dump(SOURCES[name], number, tuple(steps[number]))


def read(
    path: str | Path,
    step: int | None = None,
    *,
    trainer: str | None = None,
    tokenizer: Any = None,
    vocabulary: int | None = None,
    max_new_tokens: int | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    reward_weights: Mapping[str, float] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    ranks: int | None = None,
    minibatch: int | None = None,
) -> GeneratedBatch:
    r"""Read the batch of a step that a trainer dumped: TRL, NeMo-RL, prime-rl, open-instruct, slime or verl.

    Tokens are the file's, where it has them; else the text's, where only one sequence of tokens can have been meant.

    Args:
        path: a file, or the folder that it lies in.
        step: as the trainer numbers its files; None where there is one.
        trainer: "trl", "nemo_rl", "prime_rl", "open_instruct", "slime" or "verl", where file names do not tell.
        tokenizer: the policy's; needed for texts (TRL, verl), and shows the texts of tokens.
        vocabulary: number of tokens of the model; the tokenizer's by default.
        max_new_tokens: the most tokens of a response, its EOS included, for texts: it tells which were cut off.
        prompts: tokens of the run's prompts, for verl.
        reward_weights: {column: weight} of TRL's reward functions; without it their values stay in the metadata.
        chat_template_kwargs: of TRL's trainer, for prompts that are messages.
        ranks: how many rank files prime-rl wrote, where a rank had nothing to write.
        minibatch: which of the steps on slime's rollout, from 0.

    Returns:
        The batch. Advantages are the records'; what a loss needs token by token is in their metadata, under
        "per_token". A record whose loss_mask is 0 throughout had no part in the loss, and counts where one divides by
        sequences.

    Raises:
        RolloutError: there is no such step; a file is missing, damaged, another step's or rank's; a row's lists have
            different lengths, a number is not finite, a token is outside of the vocabulary, or its tokens are not
            known.
        CheckpointError: a file of tensors holds other objects.

    Example:
        >>> import json, tempfile
        >>> row = {"token_ids": [5, 6, 7], "token_loss_mask": [0, 1, 1], "advantages": [0.0, 0.5, 0.5]}
        >>> row |= {"generation_logprobs": [0.0, -1.0, -2.0], "prev_logprobs": [0.0, -1.1, -2.1], "rewards": 1.0}
        >>> row |= {"input_lengths": 3, "sample_loss_mask": 1.0}
        >>> with tempfile.TemporaryDirectory() as logs:
        ...     line = json.dumps({name: [value] for name, value in row.items()} | {"idx": 0})
        ...     _ = Path(logs, "train_data_step12.jsonl").write_text(line + "\n")
        ...     batch = read(logs)
        >>> batch.records[0].response_ids, batch.records[0].advantage, batch.records[0].metadata["per_token"]
        ((6, 7), 0.5, {'old_logprobs': [-1.1, -2.1]})
    """
    options = Options(
        tokenizer, vocabulary, max_new_tokens, prompts, reward_weights, chat_template_kwargs, ranks, minibatch
    )
    return locate(path, step, trainer).batch(options)


def _expected(trainer: str | None) -> str:
    names = {
        "trl": "TRL's completions/completions_00012.parquet",
        "nemo_rl": "NeMo-RL's train_data_step12.jsonl",
        "prime_rl": "prime-rl's token_exports/step_12/rank_0.jsonl",
        "open_instruct": "open-instruct's <run>_rollouts_000000.jsonl",
        "slime": "slime's 12.pt (--save-debug-train-data)",
        "verl": "verl's 12.jsonl (rollout_data_dir)",
    }
    return names[trainer] if trainer is not None else ", ".join(names.values())


def _numbers(steps: Mapping[int, Any]) -> str:
    numbers = sorted(steps)
    return ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"{', '.join(map(str, numbers[:6]))}, … {numbers[-1]}"
