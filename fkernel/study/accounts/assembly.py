"""The sweep's numbers by name: sequences of the run, shares of reward functions, p-values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fkernel.analysis import permutations, reward_shares, significance
from fkernel.engine import RunAccount
from fkernel.record import LOSS, Recording
from fkernel.rollout import SequenceRecord
from fkernel.shapes import Tensor
from fkernel.study.accounts.results import AccountResults
from fkernel.study.outcome import SequenceInfo
from fkernel.study.provenance import environment

MOST = 100_000
"""Sequences whose advantages are permuted, at most: the draws are held in memory, 8 kB a sequence."""
CENTRED = 1e-3
"""Relative difference up to which advantages are rewards less their group's mean."""
ADDED = 1e-4
"""What trainers add to a group's standard deviation: advantages of equal rewards are their rounding over it."""
DRAWS = 1000
"""Permutations of advantages."""
COLUMNS = ("realised", "before", "decay", "arithmetic", "unexplained", "remainder", "by_step", "own", "momentum")
BESIDE = {"beta": "kl", "entropy_coef": "entropy"}
"""Arguments of a trainer that put something beside advantages into a loss, and the part that it is."""


class Taken(NamedTuple):
    """The sequences of the steps that are accounted for, N in all, in the run's order.

    Attributes:
        about: of the recording.
        records: [N].
        ids: [N] within the run.
        step: [N] its step.
        group: [N] which sequences advantages are relative to, numbered over the run.
        steps: facts of each step, JSON.
        parts: of each step's loss.
    """

    about: dict[str, Any]
    records: list[SequenceRecord]
    ids: list[str]
    step: list[int]
    group: Tensor
    steps: list[dict[str, Any]]
    parts: list[tuple[str, ...]]

    @classmethod
    def of(cls, recording: Recording, chosen: range) -> Taken:
        """Read them."""
        records, ids, numbers, stems, steps = list[SequenceRecord](), list[str](), list[int](), list[str](), []
        parts = list[tuple[str, ...]]()
        for number in chosen:
            step = recording.step(number)
            own = step.records
            records += own
            parts.append(step.parts)
            ids += step.sequence_ids
            numbers += [number] * len(own)
            stems += [name.rpartition("-")[0] for name in step.sequence_ids]
            rates = [rate for rates in step.lr for rate in rates]
            facts = {key: getattr(step, key) for key in ("loss", "grad_norm", "clip")}
            steps.append({"step": number, "sequences": len(own), "lr": max(rates, default=None), **facts})
        place = {stem: i for i, stem in enumerate(dict.fromkeys(stems))}
        group = torch.tensor([place[stem] for stem in stems], dtype=torch.int64)
        return cls(dict(recording.about), records, ids, numbers, group, steps, parts)

    @property
    def beside(self) -> str | None:
        """What is in the loss beside advantages, and not told apart; None where nothing is known to be."""
        there = {part for parts in self.parts for part in parts}
        given = {name: self.about.get("arguments", {}).get(name) for name, part in BESIDE.items() if part not in there}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value) or None


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
        taken: the sequences; a step without any has one column of zeros in `made`, which is dropped. Where a loss has
            several parts, `made` has the sequences' columns once for each.
        probes: the rows.
        request: what was asked.
        p_values: whether contributions are compared with permuted advantages.
    """
    split = by_part(taken, made.contributions)
    C, facts = sum(split.values(), torch.zeros(())), dict[str, Any]()
    arrays = {"contributions": C, "floor": floor, **{name: getattr(made, name) for name in COLUMNS}}
    if request["ages"]:
        arrays["older"], facts["ages"] = made.older, request["ages"]
    if len(split) > 1:
        arrays["parts"] = torch.stack([_by_step(taken, each) for each in split.values()], 2)
        facts["parts"] = [*split]
    rewards = by_reward(taken, split[LOSS])
    p = permuted(taken, split[LOSS]) if p_values else "it was not asked for"
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


def by_part(taken: Taken, contributions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Contributions by part of the loss, {part: [n_E N]}; one part, "loss", where nothing is told apart.

    Args:
        taken: the sequences.
        contributions: of each step, [n_E parts·n].
    """
    names = dict.fromkeys(part for parts in taken.parts for part in parts)
    split: dict[str, list[Tensor]] = {name: [] for name in names}
    for each, parts, facts in zip(contributions, taken.parts, taken.steps, strict=True):
        n = facts["sequences"]
        shaped = each[:, : n * len(parts)].reshape(len(each), len(parts), n)
        for name in names:
            own = shaped[:, parts.index(name)] if name in parts else each.new_zeros(len(each), n)
            split[name].append(own)
    return {name: torch.cat(own, 1) for name, own in split.items()}


def _by_step(taken: Taken, C: Tensor) -> Tensor:
    """Sum contributions over each step's sequences, [n_E T]."""
    place = torch.tensor(taken.step, dtype=torch.int64) - taken.steps[0]["step"]
    return torch.zeros(len(C), len(taken.steps), dtype=torch.float64).index_add_(1, place, C.double())


def by_reward(taken: Taken, C: Tensor) -> Tensor | str:
    """Split contributions by reward function, [n_E T R] by the step that trained on them; or why that cannot be done.

    Args:
        taken: the sequences.
        C: [n_E N] contributions of the part of the loss that advantages make.
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
    table = torch.tensor(values)
    if not _centred(taken, torch.nan_to_num(table.double()) @ weights.double()):
        return (
            "advantages are not the rewards less their group's mean, times one factor a group: completions of a group "
            "are missing or in another step, or advantages are made by another rule"
        )
    shares = reward_shares(table, weights, taken.group)
    return torch.stack([_by_step(taken, C * share) for share in shares.T], 2)


def _centred(taken: Taken, R: Tensor) -> bool:
    """Whether A_u = s_g (R_u − R̄_g) holds in every group, s_g > 0: what a split by reward function rests on."""
    if any(record.advantage is None for record in taken.records):
        return False
    A = torch.tensor([float(record.advantage or 0.0) for record in taken.records], dtype=torch.float64)
    for g in range(int(taken.group.max()) + 1):
        own = (taken.group == g).nonzero()[:, 0]
        apart, given = R[own] - R[own].mean(), A[own]
        square = float(apart @ apart)
        s = float(apart @ given) / square if square > 1e-12 else 0.0
        slack = 1e-6 if s else 1e-6 + _rounding(R[own])
        if s < 0 or float((given - s * apart).norm()) > CENTRED * float(given.norm()) + slack:
            return False
    return True


def _rounding(R: Tensor) -> float:
    """What ‖A‖ of n equal rewards can be: their mean in float32 is off by up to n/2 ε|R|, divided by what is added."""
    n = len(R)
    return n**0.5 * (n / 2 * torch.finfo(torch.float32).eps * float(R.abs().max()) / ADDED)


def permuted(taken: Taken, C: Tensor) -> Tensor | str:
    """p-values of contributions against advantages permuted within prompts of a step, [n_E N]; or why there are none.

    A sequence's factor is its contribution over its advantage; the preconditioner and the run are held.

    Args:
        taken: the sequences.
        C: [n_E N] contributions of the part of the loss that advantages make.
    """
    given = [record.advantage for record in taken.records]
    if any(advantage is None for advantage in given):
        return "sequences have no advantages"
    if taken.beside is not None:
        return f"the loss has {taken.beside} beside its advantages"
    A = torch.tensor([float(advantage or 0.0) for advantage in given], dtype=torch.float64)
    if len(A) > MOST:
        return f"of {len(A)} sequences; {DRAWS} permutations are drawn of at most {MOST}: ask for fewer steps"
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
