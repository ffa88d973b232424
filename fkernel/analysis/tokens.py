"""Effects by token: the change of each token of a sequence, and the kernel between two sequences' tokens.

    ΔS_e = Σ_t Δ log π(x_t | x_<t)                                   one jvp gives all, to first order
    K[t, s] = ⟨∇ log π(e_t), P ∇ log π(u_s)⟩,  Σ_ts K[t, s] = K_eu    a row for every response token of e, a column of u

A token's gradient is the gradient of S with every other token masked out, so a sequence of T response tokens becomes a
batch of T sequences, and the engine's kernel is the tokens' kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.boundary import public
from fkernel.engine import kernel
from fkernel.engine.planning import usual_microbatch
from fkernel.errors import BatchError
from fkernel.func import Sequences
from fkernel.func.inputs import length
from fkernel.precond import Preconditioner
from fkernel.shapes import Tensor, Tree


class TokenChange(NamedTuple):
    """Change of the tokens of E by a step, [n t] each, 0 outside of responses.

    Attributes:
        logprob: change of log π of each token, nats; a row's sum is the sequence's first order.
        entropy: change of the entropy of the distribution that the token was drawn from, nats.
    """

    logprob: Tensor
    entropy: Tensor


@public
def token_change(
    apply: Any, params: Tree, E: Sequences, step: Tree, temperature: float = 1.0, *, microbatch: int | None = None
) -> TokenChange:
    """Predict the change of every token, to first order.

    Args:
        apply: (params, input_ids, attention_mask) -> logits, as `make_functional` returns it.
        params: θ.
        E: n sequences.
        step: Δθ, or any direction.
        temperature: τ.
        microbatch: as in `fkernel.kernel`.

    Raises:
        As `func.jvp`.

    Example:
        >>> logits = lambda params, ids, mask: params["w"].expand(*ids.shape, 3)
        >>> E, step = func.pad([[0]], [[1, 2]]), {"w": torch.tensor([0.0, 1.0, 0.0])}
        >>> token_change(logits, {"w": torch.zeros(3)}, E, step).logprob
        tensor([[ 0.0000,  0.6667, -0.3333]])
    """
    m = usual_microbatch(microbatch, E)
    quantities = (func.token_logprobs(apply, temperature), func.token_entropy(apply, temperature))
    return TokenChange(*(func.jvp(f, m)(params, E, step) for f in quantities))


@public
def apart(sequence: Sequences) -> Sequences:
    """Repeat one sequence for each of its response tokens, each copy scored on one of them.

    Args:
        sequence: a batch of one.

    Raises:
        BatchError: it is a batch of more than one.

    Example:
        >>> apart(func.pad([[5]], [[6, 7]])).response_mask.int()
        tensor([[0, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    if (n := length(sequence)) != 1:
        raise BatchError(f"Tokens are of one sequence; this batch has {n}. Take one: func.Sequences(*(x[i:i+1] …)).")
    places = sequence.response_mask[0].nonzero()[:, 0]
    masks = torch.zeros(len(places), sequence.input_ids.shape[1], dtype=torch.bool, device=places.device)
    masks[torch.arange(len(places)), places] = True
    ids, attention = (leaf.expand(len(places), -1).contiguous() for leaf in sequence[:2])
    return Sequences(ids, attention, masks)


@public
def token_kernel(
    S: Any, params: Tree, e: Sequences, u: Sequences, precond: Preconditioner, *, microbatch: int | None = None
) -> Tensor:
    """Compute the kernel of two sequences, token by token.

    K[t, s] = ⟨∇ log π(e_t), P ∇ log π(u_s)⟩

    Args:
        S: `func.sequence_logprob(apply, temperature)`.
        params: θ.
        e: a batch of one.
        u: a batch of one.
        precond: P.
        microbatch: as in `fkernel.kernel`.

    Returns:
        [response tokens of e, response tokens of u]; its sum is `kernel(S, params, e, u, precond)`.

    Raises:
        As `fkernel.kernel`; BatchError where a batch is not of one.

    Example:
        >>> from fkernel import precond
        >>> logits = lambda params, ids, mask: params["w"].expand(*ids.shape, 3)
        >>> x = func.pad([[0]], [[1, 2]])
        >>> token_kernel(func.sequence_logprob(logits), {"w": torch.zeros(3)}, x, x, precond.identity()).shape
        torch.Size([2, 2])
    """
    return kernel(S, params, apart(e), apart(u), precond, microbatch=microbatch)
