"""Advantages by reward function: A_u = Σ_k A_k,u, exactly, where the rule is linear in the rewards.

With r_u = Σ_k weight_k r_k(u) (a function that returned None adds nothing) and r̄_k the group's mean of weight_k r_k,

    raw          A_k = weight_k r_k
    group_mean   A_k = weight_k r_k − r̄_k
    rloo         A_k = (weight_k r_k − r̄_k) · size/(size − 1)
    grpo         A_k = (weight_k r_k − r̄_k) / (σ + 1e−4),   σ the group's standard deviation of the TOTAL reward

The last is GRPO's own rule (TRL's multi_objective_aggregation="sum_then_normalize"): given σ it is linear. Where σ = 0,
since functions that differ cancel, nobody has an advantage, and no function a part of it: divided by 1e−4 the parts
would be thousands that cancel. Normalising each function by a σ of its own ("normalize_then_sum") is another rule,
which does not add up to this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fkernel.errors import RolloutError, listing
from fkernel.rollout.advantages import EPSILON, RULES, among_judged, group_mean, group_scale
from fkernel.rollout.batch import GeneratedBatch
from fkernel.rollout.judging import weighted_sum
from fkernel.rollout.record import SequenceRecord
from fkernel.shapes import Tensor

ROUNDING = 1e-8
"""A standard deviation of equal totals, whose summands are rounded to float32."""
TOLERANCE = 1e-4
"""By which a batch's advantages may differ from those that its rewards give: float32's rounding over a small σ."""


def split_advantages(batch: GeneratedBatch, rule: str) -> dict[str, Tensor]:
    """Split advantages by reward function.

    A_u = Σ_k A_k,u

    Args:
        batch: n sequences with the values and weights of their reward functions (`SequenceRecord.rewards`).
        rule: by which its advantages are made: "group_mean", "grpo", "rloo" or "raw".

    Returns:
        {"reward:" + name: [n] float64 A_k}, 0 for a response that abstains. They add up to the rule's advantages.

    Raises:
        RolloutError: the rule is not linear in the rewards; a sequence has no rewards by function, or other functions
            than the others; its reward is not their weighted sum; or its advantage is not what the rule gives.

    Example:
        >>> from fkernel.rollout.record import Provenance
        >>> def one(k, right, short):
        ...     given = Provenance("custom-0", "custom", "custom", 0, k)
        ...     values, weights = {"right": right, "short": short}, {"right": 1.0, "short": 0.5}
        ...     return SequenceRecord(f"U-000-0{k}", (1,), (2,), "a", "b", (-1.0,), (-1.0,), (0.5,), "eos", given,
        ...                           reward=right + 0.5 * short, rewards=values, reward_weights=weights)
        >>> split_advantages(GeneratedBatch((one(0, 1.0, 0.0), one(1, 0.0, 1.0))), "group_mean")
        {'reward:right': tensor([ 0.5000, -0.5000], dtype=torch.float64),
         'reward:short': tensor([-0.2500,  0.2500], dtype=torch.float64)}
    """
    if rule not in RULES:
        raise RolloutError(
            f"The advantage rule {rule!r} is not known to be linear in the rewards, so advantages have no parts by "
            f"reward function; expected {', '.join(RULES)}."
        )
    names = _functions(batch.records)
    total = torch.tensor([_total(record) for record in batch], dtype=torch.float64)
    shares = {f"reward:{name}": _weighted(batch.records, name) for name in names}
    parts = {part: _share(rule, total, share, batch.groups) for part, share in shares.items()}
    _check_sum(batch, torch.stack([*parts.values()]).sum(0), rule)
    return parts


def _share(rule: str, total: Tensor, share: Tensor, groups: Tensor) -> Tensor:
    """One function's part of the advantages, [n], of its part of the rewards, [n]."""
    share = torch.where(total.isnan(), total, share)  # who abstains does so in every part
    if rule != "grpo":
        return among_judged(RULES[rule], share, groups)
    judged = total[~total.isnan()]

    def scaled(part: Tensor, of: Tensor) -> Tensor:
        scale = group_scale(judged, of)
        return torch.where(scale - EPSILON < ROUNDING, 0.0, group_mean(part, of) / scale)

    return among_judged(scaled, share, groups)


def _functions(records: Sequence[SequenceRecord]) -> list[str]:
    """Name the reward functions of a batch; every sequence has the same ones."""
    names = [*records[0].rewards]
    for record in records:
        if not record.rewards or {*record.rewards} != {*names}:
            raise RolloutError(
                f"{record.sequence_id} has the rewards {listing([*record.rewards]) or 'of no function by name'}, "
                f"{records[0].sequence_id} {listing(names) or 'of none'}; expected the same functions' values of every "
                f"sequence, such as rewards given as {{name: function}} record them."
            )
    return names


def _total(record: SequenceRecord) -> float:
    """Σ_k weight_k r_k, NaN for a response that abstains; it must be the recorded reward."""
    total = weighted_sum(record.rewards, record.reward_weights)
    if total is None and record.reward is None:
        return float("nan")
    if total is None or record.reward is None or abs(total - record.reward) > 1e-5 * max(1.0, abs(total)):
        raise RolloutError(
            f"{record.sequence_id}: its reward is {record.reward}, and its functions' values times their weights make "
            f"{total}; one of them was set anew, and its parts are not the reward's."
        )
    return total


def _weighted(records: Sequence[SequenceRecord], name: str) -> Tensor:
    """weight_k r_k of one function, [n] float64; 0 where it returned None."""
    values = [record.reward_weights[name] * (record.rewards[name] or 0.0) for record in records]
    return torch.tensor(values, dtype=torch.float64)


def _check_sum(batch: GeneratedBatch, total: Tensor, rule: str) -> None:
    """Hold the parts against the advantages that the batch has."""
    for record, value in zip(batch, total.tolist(), strict=True):
        given = record.advantage
        if given is not None and abs(given - value) > TOLERANCE * max(1.0, abs(value)):
            raise RolloutError(
                f"{record.sequence_id}: its advantage is {given:.6g}, and the rule {rule!r} makes {value:.6g} of its "
                f"rewards; name the rule that its advantages were made by."
            )
