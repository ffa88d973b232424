"""Losses whose gradient goes through the ratio: the clipped surrogate of PPO and its kin, and SAPO's soft gate."""

from __future__ import annotations

import torch

from fkernel.func.objectives.inputs import LossInputs, check_setting, read
from fkernel.func.objectives.ratios import ratio_of, through_ratio
from fkernel.func.objectives.terms import LossTerm, term_of


def clipped_ratio(
    inputs: LossInputs, low: float = 0.2, high: float = 0.2, delta: float | None = None, level: str = "token"
) -> dict[str, LossTerm]:
    """Compute ω of the clipped surrogate of PPO, GRPO, BNPO, Dr. GRPO and DAPO, and of GSPO by sequences.

    L = −Σ_ut w_ut min( min(r, delta) A, clip(r, 1−low, 1+high) A )
    ω_ut = −w_ut A_ut r_ut;  0 where A > 0 and r > min(1+high, delta),
                             and where A < 0 and (r < 1−low or r > max(1+high, delta))

    With level="sequence" s_u stands for every r_ut, and ω is the mean of that over u's response tokens.

    These losses differ in w alone: 1/(n |u|) in GRPO and GSPO, 1/(tokens of the micro-batch) in BNPO, 1/(n · longest)
    in Dr. GRPO, 1/(tokens of the generation batch) in DAPO.

    Args:
        inputs: with advantages, weights and old.
        low: ε below, in [0, 1]; TRL's epsilon.
        high: ε above, ≥ 0; TRL's epsilon_high. Infinity never clips above.
        delta: > 0, the largest ratio that lowers a token (two-sided clipping), above 1+high as a rule; TRL's delta.
            None: a ratio however large lowers.
        level: "token", or "sequence" for GSPO; TRL's importance_sampling_level.

    Returns:
        {"advantage": ω [n t]}.

    Raises:
        ModelError: a setting is out of its range.
        BatchError: a field is missing, of another shape, or a weight is negative.
        NonFiniteError: a number of a response token is NaN or infinite, or a ratio overflows.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.1, -2.0]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.ones(1), torch.ones(1), old)
        >>> clipped_ratio(given)["advantage"].omega  # e^1 is clipped
        tensor([[ 0.0000, -1.1052,  0.0000]])
        >>> clipped_ratio(given._replace(advantages=-torch.ones(1)))["advantage"].omega
        tensor([[0.0000, 1.1052, 2.7183]])

    Source: J. Schulman et al., "Proximal policy optimization" (2017), eq. 7; Z. Shao et al., "DeepSeekMath" (2024),
    eq. 3; C. Zheng et al., "Group sequence policy optimization" (2025), eqs. 5, 7; "INTELLECT-2" (2025, arXiv
    2505.07291), for delta; TRL 1.16's "grpo", "bnpo", "dr_grpo" and "dapo".
    """
    return _surrogate(inputs, "clipped_ratio", low, high, delta, level)


def luspo(
    inputs: LossInputs, low: float = 0.2, high: float = 0.2, delta: float | None = None, level: str = "sequence"
) -> dict[str, LossTerm]:
    """Compute ω of LUSPO: the clipped surrogate of sequences, each as often as it has tokens.

    L = −(1/n) Σ_u |u| min( s_u A_u, clip(s_u, 1−low, 1+high) A_u )
    ω_ut = −(1/n) A_u s_u, 0 where clipped

    It is `clipped_ratio` of sequences with w = 1/n, the weight of a token, which `weights` must hold; |u| is the number
    of tokens that have it. TRL lets level="token" through as well, and has it as the default of its configuration.

    Arguments, returns and errors as in `clipped_ratio`.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.1, -1.1]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.ones(1), torch.ones(1), old)
        >>> luspo(given)["advantage"].omega
        tensor([[ 0.0000, -1.1052, -1.1052]])

    Source: "Length-unbiased sequence policy optimization" (2026, arXiv 2602.05261); TRL 1.16's "luspo".
    """
    return _surrogate(inputs, "luspo", low, high, delta, level)


def sapo(
    inputs: LossInputs, positive: float = 1.0, negative: float = 1.05, level: str = "token"
) -> dict[str, LossTerm]:
    """Compute ω of SAPO, which fades ratios out instead of clipping them.

    L = −Σ_ut w_ut A_ut (4/τ) σ(τ (r_ut − 1)),  τ = positive where A > 0, negative elsewhere
    ω_ut = −w_ut A_ut r_ut · 4 σ (1 − σ): the policy gradient at r = 1

    Args:
        inputs: with advantages, weights and old.
        positive: τ > 0 of advantages above 0; TRL's sapo_temperature_pos.
        negative: τ > 0 of the others; TRL's sapo_temperature_neg.
        level: "token" or "sequence", whose ratio it is; TRL's importance_sampling_level.

    Returns:
        {"advantage": ω [n t]}.

    Raises:
        ModelError, BatchError, NonFiniteError: as in `clipped_ratio`.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.0, -2.0]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.ones(1), torch.ones(1), old)
        >>> sapo(given)["advantage"].omega
        tensor([[ 0.0000, -1.0000, -1.4022]])

    Source: "Soft adaptive policy optimization" (2025, arXiv 2511.20347); TRL 1.16's "sapo".
    """
    for name, value in (("positive", positive), ("negative", negative)):
        check_setting(name, value, 0 < value < torch.inf, "a positive number, the temperature of the gate")
    mask, logprobs, old, A, w = read(inputs, "sapo", "logprobs", "old", "advantages", "weights")
    r = ratio_of(logprobs, old, mask, level)
    temperature = torch.where(A > 0, A.new_tensor(positive), A.new_tensor(negative))
    gate = torch.sigmoid(temperature * (r - 1))
    return {"advantage": term_of(mask, through_ratio(-w * A * r * 4 * gate * (1 - gate), mask, level))}


def _surrogate(
    inputs: LossInputs, loss: str, low: float, high: float, delta: float | None, level: str
) -> dict[str, LossTerm]:
    check_setting("low", low, 0 <= low <= 1, "a number in [0, 1]: ratios below 1 − low are clipped")
    check_setting("high", high, high >= 0, "a number ≥ 0: ratios above 1 + high are clipped")
    cap = torch.inf if delta is None else delta
    check_setting("delta", cap, cap > 0, "a number > 0, the largest ratio that lowers a token, or None")
    mask, logprobs, old, A, w = read(inputs, loss, "logprobs", "old", "advantages", "weights")
    r = ratio_of(logprobs, old, mask, level)
    clipped_above = (A > 0) & (r > min(1 + high, cap))
    clipped_below = (A < 0) & ((r < 1 - low) | (r > max(1 + high, cap)))
    slopes = torch.where(clipped_above | clipped_below, 0.0, -w * A * r)
    return {"advantage": term_of(mask, through_ratio(slopes, mask, level))}
