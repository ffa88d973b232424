"""S(x), written once more and plainly: what the demo trains on must not come from the engine it explains."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fkernel.demo.sampling import Sample


class Tokens(NamedTuple):
    """A right-padded batch.

    Attributes:
        input_ids: [n t] int64.
        attention_mask: [n t] int64, 1 on prompt and response.
        response_mask: [n t] int64, 1 on the response, its EOS included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


def tokens(samples: Sequence[Sample], pad: int) -> Tokens:
    """Samples as one right-padded batch.

    Args:
        samples: n samples.
        pad: id of the padding token.

    Returns:
        The batch, rows in the samples' order.
    """
    length = max(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    input_ids = torch.full((len(samples), length), pad)
    attention_mask, response_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, s in enumerate(samples):
        start, end = len(s.prompt_ids), len(s.prompt_ids) + len(s.response_ids)
        input_ids[i, :end] = torch.tensor([*s.prompt_ids, *s.response_ids])
        attention_mask[i, :end] = 1
        response_mask[i, start:end] = 1
    return Tokens(input_ids, attention_mask, response_mask)


def sequence_logprob(model: nn.Module, batch: Tokens, temperature: float) -> Tensor:
    """S(x) = Σ over the response of log softmax(logits / τ) at the token that was sampled.

    Args:
        model: a Hugging Face causal language model in eval mode.
        batch: n sequences.
        temperature: τ.

    Returns:
        [n], nats.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)  # [n t-1 v]: position i predicts token i+1
    picked = logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return (picked * batch.response_mask[:, 1:]).sum(-1)
