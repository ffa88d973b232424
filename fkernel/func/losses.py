"""Losses of policies as columns of the kernel: token log-probabilities, weighted by constants.

Policy-gradient, PPO, GRPO, KL and preference losses see θ through ℓ_ut = log π_θ(u_t | u_<t) of their sequences alone.
So each has, at θ, the gradient of a weighted sum of them:

    ∇L = −Σ_u Σ_t ω_ut ∇ℓ_ut,   ω_ut = −∂L/∂ℓ_ut, held constant
    f_u(θ) = Σ_t ω_ut ℓ_ut,     ∇L = −Σ_u ∇f_u

and column u of the kernel is f_u: ⟨∇S_e, P ∇f_u⟩ is what sequence u's share of the loss does to sequence e. With
w_u ≥ 0 the loss weight of a token of u, A_u its advantage, and r_ut = exp(ℓ_ut − ℓ_old,ut) the ratio to the policy that
sampled it:

    policy gradient   L = −Σ_u w_u A_u Σ_t ℓ_ut                              ω = w A
    clipped ratio     L = −Σ_u w_u Σ_t min(r A, clip(r, 1−low, 1+high) A)    ω = w A r, 0 where clipped
      of sequences    the same, with s_u = (Π_t r_ut)^(1/|u|) for every r    ω = w A s, 0 where clipped
    KL penalty        L = β Σ_u w_u Σ_t (exp(d) − d − 1),  d = ℓ_ref − ℓ     ω = β w (exp(d) − 1)
      corrected       L = β Σ_u w_u Σ_t r (exp(d) − d − 1)                   ω = β w r d
    preference        L = −(1/n) Σ_i log σ(m_i)                              ω = ±(β/n) σ(−m), by sequence

A ratio is clipped where A > 0 and r > 1+high, or A < 0 and r < 1−low. A sum of losses has the sum of their ω,
and parts may be columns of their own. At r = 1, a batch's first step, the clipped ratio is the policy gradient.

Sources: J. Schulman et al., "Proximal policy optimization" (2017), eq. 7; Z. Shao et al., "DeepSeekMath" (2024), eqs. 3
and 4; C. Zheng et al., "Group sequence policy optimization" (2025), eqs. 5, 7; J. Schulman, "Approximating KL
divergence" (2020), k3; DeepSeek-AI, "DeepSeek-V3.2" (2025), its correction; R. Rafailov et al., "Direct preference
optimization" (2023), eq. 7; N. Razin et al., "Unintentional unalignment" (2024); TRL 1.16's GRPO and DPO trainers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.errors import BatchError, ModelError, NonFiniteError
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.objective import Objective, TokenWeights, bare
from fkernel.func.inputs.validation import check_weights
from fkernel.func.logprob import LogitsFn, token_logprobs
from fkernel.shapes import Tensor, Tree

_SAME_TOKENS = "are both of the same tokens, at the same temperature?"


class Weighted(NamedTuple):
    """Sequences with a constant for every token.

    Attributes:
        sequences: n sequences of t tokens.
        token_weights: ω, [n t], laid out as `token_logprobs` is; what is outside of the response counts nothing.
    """

    sequences: Sequences
    token_weights: Tensor


def weighted_logprob(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Make a loss's column: the weighted sum of a response's token log-probabilities.

    f(u; θ) = Σ_{t in response} ω_ut log π_θ(u_t | u_<t)

    Both sides of a kernel take this f: `Weighted(E, E.response_mask)` is S.

    Args:
        apply: (params, input_ids, attention_mask) -> logits [n t v], as `make_functional` returns it.
        temperature: τ > 0, the sampling temperature that the logits are divided by.

    Returns:
        (params, Weighted of n) -> [n], nats times the unit of ω; ω has no derivative.

    Raises:
        ModelError: the temperature is not a positive number.
        BatchError: (when called) the batch is not `Weighted`, ω is not [n t], or a sequence cannot be scored.
        NonFiniteError: (when called) ω or a log-probability is NaN or infinite; it names the sequence.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> batch = Weighted(pad([[0]], [[1, 2]]), torch.tensor([[0.0, 1.0, -0.5]]))
        >>> weighted_logprob(uniform)({"w": torch.ones(())}, batch)  # (1 − ½) log ¼
        tensor([-0.6931])
    """
    log_p = token_logprobs(apply, temperature)

    def weights(batch: Weighted) -> tuple[Sequences, Tensor]:
        each = batch.sequences.input_ids  # the engine cuts shared padding off, and ω goes with it
        return batch.sequences, batch.token_weights[:, : each.shape[1]].detach()

    def weighted(params: Tree, batch: Weighted) -> Tensor:
        sequences, omega = weights(batch)
        each = bare(log_p)(params, sequences)
        return (omega.to(each) * each).sum(1)

    def check(batch: Any) -> None:
        if not isinstance(batch, Weighted):
            raise BatchError(
                f"weighted_logprob was given {type(batch).__name__}; expected Weighted(sequences, token_weights), such "
                f"as Weighted(batch, batch.response_mask), which makes it sequence_logprob."
            )
        given, expected = batch.token_weights.shape, batch.sequences.input_ids.shape
        if given != expected:
            raise BatchError(
                f"token_weights has shape {list(given)} for sequences of {list(expected)}; expected one weight a token."
            )
        _check_finite(batch.token_weights, "token_weights", "every token needs a finite weight, 0 where it has none")
        log_p.check(batch.sequences)

    return Objective(weighted, check, "the weighted log π", apply, tokens=TokenWeights(temperature, weights))


def policy_gradient_weights(weights: Tensor, response_mask: Tensor) -> Tensor:
    """Compute ω of the policy gradient, and of every ratio loss while π is the policy that sampled.

    ω_ut = w_u A_u in the response, 0 elsewhere

    Args:
        weights: w_u·A_u, [n]: loss weight of a token times advantage (`fkernel.rollout.loss_weights`).
        response_mask: [n t], as `Sequences` has it.

    Returns:
        ω, [n t].

    Raises:
        BatchError, NonFiniteError: the shapes do not fit, or a weight is NaN or infinite.

    Example:
        >>> policy_gradient_weights(torch.tensor([0.5, -1.0]), torch.tensor([[0, 1, 1], [0, 1, 0]]))
        tensor([[ 0.0000,  0.5000,  0.5000],
                [ 0.0000, -1.0000,  0.0000]])
    """
    mask = _response(response_mask, weights)
    return torch.where(mask, weights.detach()[:, None], 0.0)


def clipped_ratio_weights(
    logprobs: Tensor, old_logprobs: Tensor, weights: Tensor, response_mask: Tensor, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """Compute ω of the clipped surrogate of PPO and GRPO.

    L = −Σ_u w_u Σ_t min(r_ut A_u, clip(r_ut, 1−low, 1+high) A_u),  r_ut = exp(ℓ_ut − ℓ_old,ut)
    ω_ut = w_u A_u r_ut;  0 where A_u > 0 and r_ut > 1+high, and where A_u < 0 and r_ut < 1−low

    Args:
        logprobs: ℓ, [n t] nats, of the policy at θ; outside of the response anything may stand.
        old_logprobs: ℓ_old, [n t] nats, of the policy that sampled, at the same temperature.
        weights: w_u·A_u, [n]; w_u ≥ 0, so that its sign is the advantage's.
        response_mask: [n t].
        low: ε below, in [0, 1]; TRL's epsilon.
        high: ε above, ≥ 0; TRL's epsilon_high. Infinity never clips above.

    Returns:
        ω, [n t].

    Raises:
        ModelError: low or high is out of its range.
        BatchError: the shapes do not fit.
        NonFiniteError: a weight or a response token's log-probability is NaN or infinite, or a ratio overflows.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.1, -2.0]])
        >>> clipped_ratio_weights(logprobs, old, torch.tensor([1.0]), torch.tensor([[0, 1, 1]]))  # e^1 is clipped
        tensor([[0.0000, 1.1052, 0.0000]])
        >>> clipped_ratio_weights(logprobs, old, torch.tensor([-1.0]), torch.tensor([[0, 1, 1]]))
        tensor([[ 0.0000, -1.1052, -2.7183]])
    """
    mask = _response(response_mask, weights, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    return _surrogate(log_ratio, weights, mask, low, high)


def clipped_sequence_ratio_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    weights: Tensor,
    response_mask: Tensor,
    low: float = 3e-4,
    high: float = 4e-4,
) -> Tensor:
    """Compute ω of the clipped surrogate of GSPO, whose ratio is a sequence's.

    L = −Σ_u w_u |u| min(s_u A_u, clip(s_u, 1−low, 1+high) A_u),  s_u = exp((1/|u|) Σ_t (ℓ_ut − ℓ_old,ut))
    ω_ut = w_u A_u s_u;  0 where A_u > 0 and s_u > 1+high, and where A_u < 0 and s_u < 1−low

    Arguments, returns and errors as in `clipped_ratio_weights`; TRL's importance_sampling_level="sequence", and the
    paper's clipping. w_u is the weight of a token here too, 1/(n |u|) in the paper.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.1, -1.1]])
        >>> clipped_sequence_ratio_weights(logprobs, old, torch.tensor([1.0]), torch.tensor([[0, 1, 1]]), high=0.2)
        tensor([[0.0000, 1.1052, 1.1052]])
    """
    mask = _response(response_mask, weights, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return _surrogate(mean, weights, mask, low, high)


def kl_penalty_weights(
    logprobs: Tensor, reference_logprobs: Tensor, weights: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """Compute ω of the penalty on the divergence from a reference policy, by the estimator k3 of GRPO.

    L = β Σ_u w_u Σ_t (exp(d_ut) − d_ut − 1),  d_ut = ℓ_ref,ut − ℓ_ut
    ω_ut = β w_u (exp(d_ut) − 1): it raises the tokens that the reference finds likelier, and lowers the others

    TRL's use_bias_correction_kl=False; its default is `corrected_kl_penalty_weights`.

    Args:
        logprobs: ℓ, [n t] nats, of the policy at θ; outside of the response anything may stand.
        reference_logprobs: ℓ_ref, [n t] nats, of the reference.
        weights: w_u, [n], ≥ 0: loss weight of a token, WITHOUT the advantage, which a penalty does not have.
        response_mask: [n t].
        beta: β > 0; TRL's beta.

    Returns:
        ω, [n t]: added to the surrogate's it is the whole loss's; as columns of their own its effect is told apart.

    Raises:
        ModelError: β is not a positive number.
        BatchError: the shapes do not fit, or a weight is negative.
        NonFiniteError: a weight or a response token's log-probability is NaN or infinite, or an exponential overflows.

    Example:
        >>> logprobs, reference = torch.tensor([[0.0, -2.0, -1.0]]), torch.tensor([[0.0, -1.0, -2.0]])
        >>> kl_penalty_weights(logprobs, reference, torch.tensor([1.0]), torch.tensor([[0, 1, 1]]), beta=0.1)
        tensor([[ 0.0000,  0.1718, -0.0632]])
    """
    mask = _response(response_mask, weights, logprobs=logprobs, reference_logprobs=reference_logprobs)
    d = torch.where(mask, reference_logprobs - logprobs, 0.0).detach()
    return _penalty(torch.expm1(d), weights, beta, "exp(reference_logprobs − logprobs)")


def corrected_kl_penalty_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    weights: Tensor,
    response_mask: Tensor,
    beta: float,
) -> Tensor:
    """Compute ω of the penalty by k3 times the ratio: its mean gradient is the divergence's, off policy too.

    L = β Σ_u w_u Σ_t r_ut (exp(d_ut) − d_ut − 1),  d_ut = ℓ_ref,ut − ℓ_ut,  r_ut = exp(ℓ_ut − ℓ_old,ut)
    ω_ut = β w_u r_ut d_ut

    Arguments, returns and errors as in `kl_penalty_weights` and `clipped_ratio_weights`; TRL's default, with a token's
    ratio. It differs from `kl_penalty_weights` also at r = 1, for the ratio has a derivative.

    Example:
        >>> logprobs, reference = torch.tensor([[0.0, -2.0, -1.0]]), torch.tensor([[0.0, -1.0, -2.0]])
        >>> w, mask = torch.tensor([1.0]), torch.tensor([[0, 1, 1]])
        >>> corrected_kl_penalty_weights(logprobs, logprobs, reference, w, mask, beta=0.1)
        tensor([[ 0.0000,  0.1000, -0.1000]])
    """
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs, "reference_logprobs": reference_logprobs}
    mask = _response(response_mask, weights, **given)
    r_d = (logprobs - old_logprobs).exp() * (reference_logprobs - logprobs)
    return _penalty(torch.where(mask, r_d, 0.0).detach(), weights, beta, "exp(logprobs − old_logprobs)")


def preference_weights(margins: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute the weights of chosen and rejected responses under DPO's loss, for `sequence_logprob`.

    m_i = β[(S_ci − S_ref,ci) − (S_ri − S_ref,ri)],  L = −(1/n) Σ_i log σ(m_i)
    −∂L/∂S_ci = (β/n) σ(−m_i) = ∂L/∂S_ri

    To first order, what a step does to both is its kernel over all 2n responses times these weights:

        ΔS_ci = Σ_j (β/n) σ(−m_j) (K_ci,cj − K_ci,rj)
        ΔS_ri = Σ_j (β/n) σ(−m_j) (K_ri,cj − K_ri,rj)

    The loss raises m, and says nothing of either alone. A chosen response falls (likelihood displacement) where the
    kernel ties it more to the rejected ones than to the chosen ones, for a single pair where K_cr > K_cc.

    Args:
        margins: m, [n] nats, of the implicit rewards, β included; TRL's rewards/margins, one a pair.
        beta: β > 0.

    Returns:
        (of the chosen [n], of the rejected [n]): w·A, for L's gradient is −Σ weights ∇S.

    Raises:
        ModelError: β is not a positive number.
        BatchError: margins are not [n], or none.
        NonFiniteError: a margin is NaN or infinite.

    Example:
        >>> preference_weights(torch.tensor([0.0, 2.0]), beta=0.1)
        (tensor([0.0250, 0.0060]), tensor([-0.0250, -0.0060]))
    """
    _check_beta(beta)
    if margins.ndim != 1 or not len(margins):
        raise BatchError(f"margins has shape {list(margins.shape)}; expected [n], one for each pair of responses.")
    _check_finite(margins, "margins", "look at the log-probabilities that it was made of", of="pair")
    chosen = beta * torch.sigmoid(-margins.detach()) / len(margins)
    return chosen, -chosen


def _surrogate(log_ratio: Tensor, weights: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """ω of a clipped surrogate, [n t]; a ratio is a token's, [n t], or one for all of a sequence's tokens, [n 1]."""
    if not 0 <= low <= 1:
        raise ModelError(f"low is {low!r}; expected a number in [0, 1]: ratios below 1 − low are clipped.")
    if not high >= 0:
        raise ModelError(f"high is {high!r}; expected a number ≥ 0: ratios above 1 + high are clipped.")
    A, r = weights.detach()[:, None], log_ratio.exp()
    clipped = ((A > 0) & (r > 1 + high)) | ((A < 0) & (r < 1 - low))
    omega = torch.where(mask & ~clipped, A * r, 0.0)
    _check_finite(omega, "exp(logprobs − old_logprobs)", _SAME_TOKENS)
    return omega


def _penalty(slopes: Tensor, weights: Tensor, beta: float, exponential: str) -> Tensor:
    """ω of a penalty, [n t]: β w times −∂/∂ℓ of a token's."""
    _check_beta(beta)
    if bool((weights < 0).any()):
        row = int((weights < 0).nonzero()[0])
        raise BatchError(
            f"weights[{row}] is {float(weights[row])}; a penalty has no advantage: give loss weights w, and not w·A."
        )
    _check_finite(slopes, exponential, _SAME_TOKENS)
    return beta * weights.detach()[:, None] * slopes


def _response(response_mask: Tensor, weights: Tensor, **logprobs: Tensor) -> Tensor:
    """Check what was given against the response, and return its mask as bool."""
    if response_mask.ndim != 2:
        raise BatchError(f"response_mask has shape {list(response_mask.shape)}; expected [n t], as Sequences has it.")
    mask = response_mask.bool()
    for name, values in logprobs.items():
        if values.shape != mask.shape:
            raise BatchError(
                f"{name} has shape {list(values.shape)}, and response_mask {list(mask.shape)}; expected one "
                f"shape [n t], as token_logprobs returns it."
            )
        _check_finite(torch.where(mask, values, 0.0), name, "every response token needs a finite log-probability")
    check_weights(weights, len(mask))
    return mask


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ModelError(f"beta is {beta!r}; expected a positive number.")


def _check_finite(values: Tensor, name: str, todo: str, of: str = "sequence") -> None:
    """Raise NonFiniteError naming the first row that holds a NaN or an infinity."""
    if not tree.all_finite(values):
        row = int((~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[0])
        raise NonFiniteError(f"{name} of {of} {{row}} is not finite; {todo}.", row=row)
