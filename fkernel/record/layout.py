"""One backward pass as it was padded, and the same sequences without their padding.

A trainer pads prompts on their left to one width, or everything on the right. Whatever it did is kept, since the padded
pass is what was executed; `unpadded` makes of it what the engine takes:

    tokens of row i       input_ids[i] where attention_mask[i] is 1; they are contiguous
    response of row i     from its first response token to its last token

A row without a response token (a completion that the trainer masked as a whole) had no part in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fkernel.errors import BatchError
from fkernel.shapes import Tensor

LOSS = "loss"
"""Name of the part of a loss that is neither a KL penalty nor an entropy term."""


@dataclass(frozen=True, eq=False)
class RecordedMicrobatch:
    """What one backward pass was given, and what autograd handed back; every tensor is [b t], padded as it was.

    Attributes:
        input_ids: tokens, prompt and response.
        attention_mask: bool, whether a token was attended to.
        response_mask: bool, whether a token belongs to the response.
        token_weights: ω = ∂L/∂log π of each token, GradScaler's factor divided out; 0 outside of the response.
        entropy_weights: η = ∂L/∂H; None where no entropy was given or none was in the loss.
        logprobs: log π of each token as the trainer computed it, at its temperature; 0 where it computed none.
        entropies: H of each token; None where none was given.
        others: {name: [b t]} whatever else was given for each token, such as log-probabilities of the reference.
        loss: of this pass, where it was noted.
        kl_weights: the share of ω that a KL penalty has, −∂L/∂log π_reference: a penalty is a function of
            log π_reference − log π. None where the reference's were not given with a gradient.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    token_weights: Tensor
    entropy_weights: Tensor | None
    logprobs: Tensor
    entropies: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float | None = None
    kl_weights: Tensor | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.input_ids)

    @property
    def width(self) -> int:
        """Tokens of a row, padding included."""
        return self.input_ids.shape[1]

    @property
    def prompt_width(self) -> int | None:
        """Tokens to which prompts were padded on their left; None where all padding is on the right."""
        return prompt_width(self.attention_mask, self.response_mask)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the loss: "loss", and "kl" and "entropy" where they are told apart."""
        told = {"kl": self.kl_weights is not None, "entropy": self.entropy_weights is not None}
        return (LOSS, *(name for name, there in told.items() if there))

    @property
    def answered(self) -> list[int]:
        """Rows that have a response token."""
        return self.response_mask.any(1).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Row:
    """One sequence of a pass without its padding; the numbers are of response tokens.

    Attributes:
        prompt_ids: tokens of the prompt.
        response_ids: tokens of the response.
        token_weights: ω.
        entropy_weights: η; empty where no entropy was in the loss.
        logprobs: log π at the trainer's temperature.
        entropies: H; empty where none was given.
        others: {name: numbers}.
        kl_weights: the share of ω that a KL penalty has; empty where it is not told apart.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    token_weights: tuple[float, ...]
    entropy_weights: tuple[float, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    others: Mapping[str, tuple[float, ...]]
    kl_weights: tuple[float, ...] = ()

    def weighed(self, parts: Mapping[str, float]) -> Row:
        """The same sequence with the parts of its loss weighed: ω = a_loss (ω − ω_kl) + a_kl ω_kl, η = a_entropy η.

        Args:
            parts: {part: a}, 1 for one that is not named.
        """
        kl = self.kl_weights or (0.0,) * len(self.token_weights)
        a, b, c = (parts.get(name, 1.0) for name in (LOSS, "kl", "entropy"))
        ω = tuple(a * (whole - own) + b * own for whole, own in zip(self.token_weights, kl, strict=True))
        return replace(self, token_weights=ω, entropy_weights=tuple(c * η for η in self.entropy_weights))


def unpadded(microbatch: RecordedMicrobatch, row: int) -> Row:
    """Take one sequence out of its pass, without padding.

    Args:
        microbatch: the pass.
        row: which of its rows; it has a response token.

    Returns:
        The sequence.

    Example:
        >>> ids, mask = torch.tensor([[0, 5, 6, 0]]), torch.tensor([[False, True, True, False]])
        >>> response = torch.tensor([[False, False, True, False]])
        >>> each = RecordedMicrobatch(ids, mask, response, response * 0.5, None, response * -1.0)
        >>> unpadded(each, 0).prompt_ids, unpadded(each, 0).response_ids, unpadded(each, 0).token_weights
        ((5,), (6,), (0.5,))
    """
    attended = microbatch.attention_mask[row].nonzero().flatten()
    first, stop = int(microbatch.response_mask[row].long().argmax()), int(attended[-1]) + 1

    def numbers(values: Tensor | None) -> tuple[float, ...]:
        return () if values is None else tuple(values[row, first:stop].double().tolist())

    return Row(
        tuple(microbatch.input_ids[row, int(attended[0]) : first].tolist()),
        tuple(microbatch.input_ids[row, first:stop].tolist()),
        numbers(microbatch.token_weights),
        numbers(microbatch.entropy_weights),
        numbers(microbatch.logprobs),
        numbers(microbatch.entropies),
        {name: numbers(values) for name, values in microbatch.others.items()},
        numbers(microbatch.kl_weights),
    )


def prompt_width(attention_mask: Tensor, response_mask: Tensor) -> int | None:
    """Tell how rows are padded: the width of left-padded prompts, or None for padding on the right alone.

    Args:
        attention_mask: [b t] bool.
        response_mask: [b t] bool.

    Returns:
        The column where every response begins; None where every row begins in column 0.

    Raises:
        BatchError: rows are padded in neither way, or have holes.

    Example:
        >>> prompt_width(torch.tensor([[False, True, True]]), torch.tensor([[False, False, True]]))
        2
    """
    attended, rows = attention_mask.long(), response_mask.any(1)
    if not bool(rows.any()):
        return None
    attended, response = attended[rows], response_mask[rows].long()
    runs = (attended.diff(dim=1) > 0).sum(1) + attended[:, 0]
    if bool(runs.gt(1).any()) or bool((response > attended).any()):
        raise BatchError(
            "attention_mask has holes, or leaves response tokens out: a row is not one sequence. Expected one "
            "contiguous sequence a row, padded on its left or right; packed sequences are not recorded."
        )
    if bool(attended[:, 0].all()):
        return None
    first = response.argmax(1)
    if bool((first != first[0]).any()):
        raise BatchError(
            f"Rows are padded on their left, and responses begin in columns {sorted({*first.tolist()})[:6]}; expected "
            f"prompts padded to one width, with every response beginning in the same column, or padding on the right."
        )
    return int(first[0])


def last_columns(values: Tensor, width: int) -> Tensor:
    """Lay out [b k] in the last k of `width` columns; zeros before.

    Args:
        values: one number for each of the last k tokens.
        width: of the whole rows.

    Example:
        >>> last_columns(torch.tensor([[1.0, 2.0]]), 3)
        tensor([[0., 1., 2.]])
    """
    return torch.nn.functional.pad(values, (width - values.shape[1], 0))
