"""The sweep's numbers by name: sequences of the run, shares of reward functions, p-values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel.analysis import permutations, reward_shares, significance
from fkernel.engine import RunAccount
from fkernel.record import Recording
from fkernel.rollout import SequenceRecord
from fkernel.shapes import Tensor
from fkernel.study.accounts.results import AccountResults
from fkernel.study.outcome import SequenceInfo
from fkernel.study.provenance import environment

DRAWS = 1000
"""Permutations of advantages."""
COLUMNS = ("realised", "before", "decay", "arithmetic", "unexplained", "remainder", "by_step", "own", "momentum")
BESIDE = ("beta", "entropy_coef")
"""Arguments of a trainer that put something beside advantages into a loss."""


class Taken(NamedTuple):
    """The sequences of the steps that are accounted for, N in all, in the run's order.

    Attributes:
        about: of the recording.
        records: [N].
        ids: [N] within the run.
        step: [N] its step.
        group: [N] which sequences advantages are relative to, numbered over the run.
        steps: facts of each step, JSON.
    """

    about: dict[str, Any]
    records: list[SequenceRecord]
    ids: list[str]
    step: list[int]
    group: Tensor
    steps: list[dict[str, Any]]

    @classmethod
    def of(cls, recording: Recording, chosen: range) -> Taken:
        """Read them."""
        records, ids, numbers, stems, steps = list[SequenceRecord](), list[str](), list[int](), list[str](), []
        for number in chosen:
            step = recording.step(number)
            own = step.records
            records += own
            ids += step.sequence_ids
            numbers += [number] * len(own)
            stems += [name.rpartition("-")[0] for name in step.sequence_ids]
            rates = [rate for rates in step.lr for rate in rates]
            facts = {key: getattr(step, key) for key in ("loss", "grad_norm", "clip")}
            steps.append({"step": number, "sequences": len(own), "lr": max(rates, default=None), **facts})
        place = {stem: i for i, stem in enumerate(dict.fromkeys(stems))}
        group = torch.tensor([place[stem] for stem in stems], dtype=torch.int64)
        return cls(dict(recording.about), records, ids, numbers, group, steps)

    @property
    def beside(self) -> str | None:
        """What is in the loss beside advantages; None where nothing is known to be."""
        given = {name: self.about.get("arguments", {}).get(name) for name in BESIDE}
        named = [f"{name}={value}" for name, value in given.items() if value]
        if not named and any(record.entropy_weights for record in self.records):
            named = ["an entropy term"]
        return ", ".join(named) or None


def assembled(
    made: RunAccount,
    floor: Tensor,
    taken: Taken,
    probes: list[SequenceInfo],
    request: dict[str, Any],
    p_values: bool,
) -> AccountResults:
    """Put an account together.

    Args:
        made: by the sweep.
        floor: [n_E] of rounding in the realised change.
        taken: the sequences; a step without any has one column of zeros in `made`, which is dropped.
        probes: the rows.
        request: what was asked.
        p_values: whether contributions are compared with permuted advantages.
    """
    kept = [each[:, : facts["sequences"]] for each, facts in zip(made.contributions, taken.steps, strict=True)]
    C, facts = torch.cat(kept, 1), dict[str, Any]()
    arrays = {"contributions": C, "floor": floor, **{name: getattr(made, name) for name in COLUMNS}}
    rewards = by_reward(taken, C)
    p = permuted(taken, C) if p_values else "it was not asked for"
    for name, values in (("rewards", rewards), ("p", p)):
        if isinstance(values, str):
            facts[name] = values
        else:
            arrays[name] = values
    if not isinstance(rewards, str):
        facts["reward_functions"] = [*taken.records[0].rewards]
    about = {
        "model": taken.about["model"],
        "temperature": taken.about["temperature"],
        **{key: request[key] for key in ("recording", "steps", "path", "observable", "dtype")},
        "request": request,
        "environment": environment(),
    }
    sequences = [_sequence(*each) for each in zip(taken.ids, taken.step, taken.records, strict=True)]
    single = {name: leaf.detach().cpu().to(torch.float32).numpy() for name, leaf in arrays.items()}
    return AccountResults(about, tuple(probes), tuple(sequences), tuple(taken.steps), single, facts)


def by_reward(taken: Taken, C: Tensor) -> Tensor | str:
    """Split contributions by reward function, [n_E T R] by the step that trained on them; or why that cannot be done.

    Args:
        taken: the sequences.
        C: [n_E N] contributions.
    """
    names = [*taken.records[0].rewards] if taken.records else []
    if not names or any([*record.rewards] != names for record in taken.records):
        return "the recording has no rewards by function"
    if taken.beside is not None:
        return f"the loss has {taken.beside} beside its advantages, so that contributions are not rewards' alone"
    values = [
        [float("nan") if (r := record.rewards[name]) is None else r for name in names] for record in taken.records
    ]
    weights = torch.tensor([float(taken.records[0].reward_weights[name]) for name in names])
    shares = reward_shares(torch.tensor(values), weights, taken.group)
    first = taken.steps[0]["step"]
    split = torch.zeros(len(C), len(taken.steps), len(names), dtype=torch.float64)
    place = torch.tensor(taken.step) - first
    return split.index_add_(1, place, C.double()[:, :, None] * shares)


def permuted(taken: Taken, C: Tensor) -> Tensor | str:
    """p-values of contributions against advantages permuted within prompts of a step, [n_E N]; or why there are none.

    A sequence's factor is its contribution over its advantage; the preconditioner and the run are held.

    Args:
        taken: the sequences.
        C: [n_E N] contributions.
    """
    given = [record.advantage for record in taken.records]
    if any(advantage is None for advantage in given):
        return "sequences have no advantages"
    if taken.beside is not None:
        return f"the loss has {taken.beside} beside its advantages"
    A = torch.tensor([float(advantage or 0.0) for advantage in given], dtype=torch.float64)
    there = A != 0
    draws = permutations(taken.group, DRAWS, 0, there)
    K = torch.where(there, C.double() / torch.where(there, A, 1.0), 0.0)
    return significance(K, torch.ones_like(A), A, draws).sequences


def unnamed(name: str) -> SequenceInfo:
    """A row that is no single probe."""
    return SequenceInfo(name, "", "", 0.0)


def _sequence(name: str, step: int, record: SequenceRecord) -> dict[str, Any]:
    return {
        "id": name,
        "step": step,
        "prompt": record.prompt,
        "response": record.response,
        "prompt_id": record.provenance.global_prompt_id,
        "tokens": len(record.response_ids),
        "reward": record.reward,
        "rewards": dict(record.rewards),
        "advantage": record.advantage,
        "metadata": dict(record.metadata),
    }
