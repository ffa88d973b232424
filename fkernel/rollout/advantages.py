"""From rewards to advantages, and from lengths to loss weights: L = −Σ_u w_u A_u S_u.

Advantages, over the completions u of one group G of size k, r̄ their mean reward and σ their standard deviation (k − 1):

    group_mean   A_u = r_u − r̄                           Dr. GRPO
    grpo         A_u = (r_u − r̄) / (σ + 1e−4)            GRPO; TRL's scale_rewards="group"
    rloo         A_u = r_u − mean of the others           RLOO, = k/(k−1) (r_u − r̄)
    raw          A_u = r_u                                REINFORCE without a baseline

A response for which the reward function returned None abstains: a rule sees the others alone, so that r̄, σ and k are of
those that were judged, and its own advantage is 0. The only one of a group that was judged is compared with nobody: its
advantage is 0 by group_mean, grpo and rloo, too. TRL does the same where every reward function returns None.

Loss weights, with t_u tokens in response u, n responses, and L a fixed length:

    sequence     w_u = 1 / n                              the mean of S: REINFORCE, RLOO (TRL, sequence level)
    grpo         w_u = 1 / (n t_u)                        GRPO: every response counts the same; DeepSeekMath
    group_token  w_u = 1 / (groups · Σ_{v in G(u)} t_v)   per token of the group
    bnpo         w_u = 1 / Σ_v t_v                        per token of the batch; TRL's bnpo
    dapo         w_u = G / (a Σ_v t_v)                    TRL's default: Σ over the generation batch of G micro-batches
    dr_grpo      w_u = 1 / (n L)                          Dr. GRPO: L is TRL's max_completion_length

Where a step accumulates a micro-batches, n and Σ_v t_v are those of one micro-batch (but for dapo), and TRL divides all
weights by a: `accumulation`, with which the weights of a step are those of its micro-batches. A response that abstains
stays in the batch, as in TRL: it counts in n, and its tokens in Σ_v t_v.

Sources: Z. Shao et al., "DeepSeekMath" (2024), eq. 3; Z. Liu et al., "Understanding R1-Zero-like training" (2025), for
Dr. GRPO; Q. Yu et al., "DAPO" (2025), eq. 8; A. Ahmadian et al., "Back to basics" (2024), for RLOO; TRL 1.16,
`GRPOTrainer._compute_loss`; for None, `GRPOTrainer._generate_and_score_completions` and RLOOTrainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fkernel.errors import RolloutError
from fkernel.rollout.rewards import dotted
from fkernel.shapes import Tensor

EPSILON = 1e-4
"""What GRPO adds to σ."""
Advantage = Callable[[Tensor, Tensor], Tensor]
"""(rewards [n], groups [n] int64) -> advantages [n]; of responses that were judged, each with a finite reward."""


def raw(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_u = r_u."""
    return rewards.clone()


def group_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_u = r_u − r̄.

    Example:
        >>> group_mean(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    return rewards - _mean(rewards, groups)[0]


def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_u = (r_u − r̄) / (σ + 1e−4); a group of one has no σ, and no advantage."""
    return group_mean(rewards, groups) / group_scale(rewards, groups)


def group_scale(rewards: Tensor, groups: Tensor) -> Tensor:
    """σ + 1e−4 of each one's group: what GRPO divides by."""
    mean, size = _mean(rewards, groups)
    variance, _ = _mean((rewards - mean).square(), groups)
    return (variance * size / (size - 1).clamp(min=1)).sqrt() + EPSILON


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_u = r_u − mean of the others.

    Raises:
        RolloutError: a group has one completion, and so no others.
    """
    mean, size = _mean(rewards, groups)
    if bool((size < 2).any()):
        raise RolloutError("RLOO compares a completion with the others of its group; a group here has only one.")
    return (rewards - mean) * size / (size - 1)


def among_judged(rule: Advantage, rewards: Tensor, groups: Tensor) -> Tensor:
    """Make advantages by a rule that sees the judged responses alone; those that abstain have 0.

    Args:
        rule: (rewards, groups) -> advantages.
        rewards: [n], NaN for a response that abstains.
        groups: [n] int64.

    Returns:
        [n].

    Raises:
        RolloutError: the rule failed, or gave no tensor, another shape than the rewards', NaN or an infinity.

    Example:
        >>> among_judged(group_mean, torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([0, 0, 0]))
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    seen = ~rewards.isnan()
    if rule is rloo:  # of several, the only one that was judged has no others to be compared with
        share, size = _mean(seen.to(rewards.dtype), groups)
        seen &= ((share * size).round() != 1) | (size == 1)
    if not bool(seen.any()):
        return torch.zeros_like(rewards)
    name, n = getattr(rule, "__name__", type(rule).__name__), int(seen.sum())
    given = f"{n} rewards" if n == len(rewards) else f"{n} rewards (the other {len(rewards) - n} responses abstain)"
    try:
        values = rule(rewards[seen], groups[seen])
    except RolloutError:
        raise
    except Exception as error:  # a user's function may raise whatever it likes
        raise RolloutError(
            f"The advantage rule {name} raised {type(error).__name__} for {given}: {error}. A rule is called as "
            f"rule(rewards [n], groups [n]) with two tensors, and returns advantages [n]."
        ) from error
    if not isinstance(values, torch.Tensor):
        raise RolloutError(f"The advantage rule {name} returned a {type(values).__name__}; expected a tensor [n].")
    if values.shape != (n,):
        raise RolloutError(f"The advantage rule {name} gave shape {list(values.shape)} for {given}; expected [{n}].")
    return values.new_zeros(len(rewards)).masked_scatter(seen.to(values.device), values)


RULES: dict[str, Advantage] = {"group_mean": group_mean, "grpo": grpo, "rloo": rloo, "raw": raw}
"""Advantage rules by name."""
WEIGHTS = ("sequence", "grpo", "group_token", "bnpo", "dapo", "dr_grpo")


def advantage_of(name: str | Advantage | None) -> Advantage | None:
    """Find an advantage rule by its name, or a dotted one; a function is returned as it is.

    Raises:
        RolloutError: there is none of that name.
    """
    if name is None or callable(name):
        return name
    if name in RULES:
        return RULES[name]
    if "." in name:
        return dotted(name, "a rule (rewards, groups) -> advantages")
    raise RolloutError(f"There is no advantage rule {name!r}; expected {', '.join(RULES)}, or module.function.")


def loss_weights(
    lengths: Sequence[int],
    rule: str,
    *,
    groups: Sequence[int] | None = None,
    max_completion_length: int | None = None,
    accumulation: int = 1,
    tokens: int | None = None,
    steps_per_generation: int | None = None,
) -> Tensor:
    """Compute the loss weights w of one micro-batch, with which a trainer's loss is −Σ_u w_u A_u S_u.

    Args:
        lengths: t_u, tokens of each response, its EOS included.
        rule: see the table above.
        groups: of each response; for "group_token".
        max_completion_length: L; for "dr_grpo".
        accumulation: a, micro-batches that make one step.
        tokens: for "dapo": Σ_v t_v over the generation batch (TRL's num_items_in_batch); `lengths` are all by default.
        steps_per_generation: for "dapo": G, micro-batches in a generation batch; a by default, as TRL's is.

    Returns:
        [n] float64.

    Raises:
        RolloutError: an unknown rule, or one that lacks what it needs.

    Example:
        >>> loss_weights([1, 3], "bnpo").tolist(), loss_weights([1, 4], "grpo").tolist()
        ([0.25, 0.25], [0.5, 0.125])
    """
    t = torch.tensor([*lengths], dtype=torch.float64)
    if not len(t) or bool((t < 1).any()):
        raise RolloutError(f"Lengths are {[*lengths]}; a loss weight needs responses of at least one token.")
    ones = torch.ones_like(t) / accumulation
    match rule:
        case "sequence":
            return ones / len(t)
        case "grpo":
            return ones / (len(t) * t)
        case "bnpo":
            return ones / t.sum()
        case "dapo":
            batches = accumulation if steps_per_generation is None else steps_per_generation
            return ones * batches / (t.sum() if tokens is None else tokens)
        case "dr_grpo":
            if max_completion_length is None:
                raise RolloutError("dr_grpo divides by a fixed length; give max_completion_length.")
            return ones / (len(t) * max_completion_length)
        case "group_token":
            if groups is None:
                raise RolloutError("group_token divides by the tokens of a group; give groups.")
            mean, size = _mean(t, torch.tensor([*groups]))
            return ones / (len({*groups}) * mean * size)
        case _:
            raise RolloutError(f"There are no loss weights {rule!r}; expected {', '.join(WEIGHTS)}.")


def _mean(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return each entry's group mean, and the size of its group."""
    _, group = torch.unique(groups, return_inverse=True)
    size = torch.bincount(group).to(values.dtype)
    total = torch.zeros(len(size), dtype=values.dtype).index_add_(0, group, values)
    return (total / size)[group], size[group]
