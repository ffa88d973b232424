"""prime-rl's token exports: <run>/token_exports/step_{n}/rank_{r}.jsonl (trainer.enable_token_export).

One line a sequence with a token of the loss, one entry a token, prompt included, nothing shifted: entry t is about
token t (log-probabilities are moved right by one before they are exported; the first is log(1/vocabulary)).

    token_ids, loss_mask, advantages        the batch
    inference_logprobs, trainer_logprobs    of the engine that sampled, and of the training's own forward pass, both at
                                            the temperature that was sampled at
    rl_weights, ce_weights, ref_kl_weights  weights of the loss's three components; null for 1 on the mask, and for none
    entropy, mismatch_kl, importance_ratio, is_masked, …    what follows from these
    schema_version, step, rank, micro_step, micro_sequence_idx, export_sequence_idx, env_name

The loss divides the sum over tokens by their number in all ranks' micro-batches (rl_scale). Step n is the step after
checkpoint step_{n-1}; STABLE lies in the folder once all ranks have written. A rank whose micro-batches were padding
alone writes no file; ranks of context parallelism but the first write none, so that numbers may go 0, 2, 4.

Components ce and ref_kl are refused: sequences without a token of the mask are not exported, so that the tokens that
the former divides by are not known, and the reference's log-probabilities of the latter are not there.

Source: prime-rl after 0.8 (commit 559b44772), src/prime_rl/trainer/rl/token_export.py, train.py, loss.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fkernel.errors import RolloutError
from fkernel.record.dumps.lines import Line, check_numbered, flags, read_lines
from fkernel.record.dumps.rows import Options, Row, split

NAME, FOLDER, FILE = "prime_rl", re.compile(r"step_(\d+)"), re.compile(r"rank_(\d+)\.jsonl")
SCHEMA, STABLE = 1, "STABLE"


def find(path: Path) -> dict[int, list[Path]]:
    """Rank files by step, of a step's folder, of token_exports, or of a run."""
    folders = [path, *path.glob("step_*"), *(path / "token_exports").glob("step_*")] if path.is_dir() else []
    steps = {int(match[1]): _ranks(folder) for folder in folders if (match := FOLDER.fullmatch(folder.name))}
    return {step: files for step, files in steps.items() if files}


def lacks(files: Sequence[Path]) -> set[str]:
    """What a plan must say beside the files."""
    return {"temperature"}


def read(step: int, files: Sequence[Path], options: Options) -> list[Row]:
    """Read a step, all ranks together.

    Raises:
        RolloutError: a rank's file is missing, another's or another step's, or damaged; a component is not the
        policy's.
    """
    _check_ranks(files, options.ranks)
    rows = list[Row]()
    for file in files:
        lines = [*read_lines(file)]
        for line in lines:
            _check_place(line, file, step)
        check_numbered([line.whole("export_sequence_idx") for line in lines], "export_sequence_idx", str(file))
        rows += [_row(line) for line in lines]
    return rows


def _ranks(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("rank_*.jsonl") if FILE.fullmatch(file.name)]
    return sorted(files, key=_rank)


def _rank(file: Path) -> int:
    match = FILE.fullmatch(file.name)
    assert match is not None
    return int(match[1])


def _check_ranks(files: Sequence[Path], expected: int | None) -> None:
    """Raise RolloutError where a rank's file is missing, as far as that can be told."""
    folder, here = files[0].parent, {_rank(file) for file in files}
    if not (folder / STABLE).is_file():
        raise RolloutError(
            f"{folder} has no {STABLE}: not all ranks had written when the run stopped, or the file was not copied."
        )
    if expected is not None:
        if len(files) != expected:
            raise RolloutError(f"{folder} has {len(files)} rank files, {sorted(here)}; expected {expected} (ranks).")
        return
    siblings = [each for each in folder.parent.glob("step_*") if FOLDER.fullmatch(each.name)]
    others = {_rank(file) for each in siblings for file in _ranks(each)} | here
    numbers = sorted(others)
    stride = min((b - a for a, b in pairwise(numbers)), default=1)
    missing = sorted({*range(0, numbers[-1] + 1, stride), *others} - here)
    if missing:
        raise RolloutError(
            f"{folder} has no rank_{missing[0]}.jsonl, and there are rank files {numbers}; copy it too. Where that "
            f"rank had no sequence of the loss, say how many files there are: ranks, {len(files)}."
        )


def _check_place(line: Line, file: Path, step: int) -> None:
    for name, expected in (("schema_version", SCHEMA), ("step", step), ("rank", _rank(file))):
        given = line.get(name)
        if given != expected:
            raise RolloutError(
                f"{line.place} has {name} {given}, and the file is of {name} {expected}; was it renamed, or written by "
                f"another version?"
            )


def _row(line: Line) -> Row:
    ids = line.ids("token_ids")
    t = len(ids)
    mask = flags(line.get("loss_mask"), "loss_mask", line.place, "token_ids", t)
    weights = _stream(line, "rl_weights", t)
    for name in ("ce_weights", "ref_kl_weights"):
        if any(_stream(line, name, t) or ()):
            raise RolloutError(
                f"{line.place} has a component of the loss by {name}, whose normaliser or reference the export leaves "
                f"out; only the policy's component (rl) is read."
            )
    if not any(mask):
        raise RolloutError(f"{line.place}: loss_mask is 0 throughout; prime-rl exports no such sequence.")
    start = split(line.place, ids, mask)
    names = ("advantages", "inference_logprobs", "trainer_logprobs")
    streams = {name: line.numbers(name, "token_ids", t, start) for name in names}
    kept = mask if weights is None else [one and weight != 0 for one, weight in zip(mask, weights, strict=True)]
    env = line.values.get("env_name")
    return Row(
        line.place,
        ids[:start],
        ids[start:],
        group=tuple(ids[:start]),
        mask=kept[start:],
        advantages=streams["advantages"],
        weights=None if weights is None else weights[start:],
        old=streams["trainer_logprobs"],
        sampler=streams["inference_logprobs"],
        facts={} if env is None else {"env_name": env},
    )


def _stream(line: Line, name: str, t: int) -> list[float] | None:
    """A component's weights; None where the stream is absent, which is null for every token."""
    values = line.values.get(name)
    if values is None or (isinstance(values, list) and all(value is None for value in values) and len(values) == t):
        return None
    return line.numbers(name, "token_ids", t)
