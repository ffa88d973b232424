"""A tap on a trainer's log-probabilities: what went through, and what autograd handed back.

The hook changes nothing: the trainer goes on with its own tensor, and its backward pass gives ω = ∂L/∂log π there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fkernel.errors import BatchError, listing
from fkernel.record.layout import RecordedMicrobatch, last_columns, prompt_width
from fkernel.shapes import Tensor

REFERENCE = "reference_logprobs"
"""Name under which the reference's log-probabilities are given."""


class Pass(NamedTuple):
    """What a tap kept of one backward pass.

    Attributes:
        microbatch: tokens, masks and weights.
        rows: what was given with each of its rows, JSON.
        heard: whether a backward pass came through.
    """

    microbatch: RecordedMicrobatch
    rows: list[dict[str, Any]]
    heard: bool


class Tap:
    """Hooks on the log-probabilities, and entropies, of one micro-batch.

    Args:
        logp: [b k] log π of the last k tokens of each row, as the trainer computed it.
        input_ids: [b t].
        attention_mask: [b t], 1 for a token.
        response_mask: [b t] or [b k], 1 for a token of the response.
        entropy: [b k]; None where the loss has none.
        metadata: {name: values}: b numbers or texts; [b k] numbers, one a token; or a mapping of b numbers each.
            `reference_logprobs` that require a gradient tell the KL penalty's share of ω.

    Raises:
        BatchError: shapes do not fit.
    """

    def __init__(
        self,
        logp: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None,
        metadata: Mapping[str, Any],
    ) -> None:
        b, t = check_shapes(logp, input_ids, attention_mask, response_mask, entropy)
        self.loss: Any = None
        self._shape, self._grads = (b, t), dict[str, Tensor]()
        mask = last_columns(response_mask.detach().long(), t).bool()
        self._tokens = (input_ids.detach().clone(), attention_mask.detach().bool(), mask)
        prompt_width(self._tokens[1], mask)
        self._values = {"logprobs": logp.detach().clone()}
        if entropy is not None:
            self._values["entropies"] = entropy.detach().clone()
        self._others, self.rows = dict[str, Tensor](), [dict[str, Any]() for _ in range(b)]
        self.add(**metadata)
        self._listen("token_weights", logp)
        if entropy is not None and entropy.requires_grad:
            self._listen("entropy_weights", entropy)

    def add(self, **metadata: Any) -> None:
        """Keep more of what belongs to the rows.

        Args:
            metadata: {name: values}, as the constructor takes them.

        Raises:
            BatchError: values are not of b sequences, or no JSON.
        """
        for name, values in metadata.items():
            self._take(name, values)
        try:
            json.dumps(self.rows, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BatchError(
                f"What was given with a micro-batch ({listing([*metadata])}) is no JSON: {error}. Expected texts, "
                f"finite numbers, None, and lists and mappings of them for each sequence."
            ) from error

    def hear(self, grad: Tensor, name: str = "token_weights") -> None:
        """Take what a backward pass handed back; several add up.

        Args:
            grad: [b k] ∂L/∂log π, or ∂L/∂H.
            name: "token_weights", "entropy_weights" or "kl_weights".
        """
        before = self._grads.get(name)
        self._grads[name] = grad.detach().clone() if before is None else before + grad.detach()

    def _listen(self, name: str, tensor: Tensor) -> None:
        tensor.register_hook(lambda grad: self.hear(grad, name))

    def _take(self, name: str, values: Any) -> None:
        b, shape = self._shape[0], self._values["logprobs"].shape
        if isinstance(values, torch.Tensor) and values.ndim == 2 and values.shape == shape:
            self._others[name] = values.detach().clone()
            if name == REFERENCE and values.requires_grad:
                values.register_hook(lambda grad: self.hear(-grad, "kl_weights"))
            return
        columns = values if isinstance(values, Mapping) else {None: values}
        for key, column in columns.items():
            each = column.tolist() if isinstance(column, torch.Tensor) else column
            if isinstance(each, str) or not isinstance(each, Sequence) or len(each) != b:
                given = list(column.shape) if isinstance(column, torch.Tensor) else type(column).__name__
                raise BatchError(
                    f"{name!r} was given as {given} with a micro-batch of {b} sequences; expected {b} values, one a "
                    f"sequence, a tensor of {list(shape)}, one a token, or a mapping of names to {b} values."
                )
            for row, value in zip(self.rows, each, strict=True):
                if key is None:
                    row[name] = value
                else:
                    row.setdefault(name, {})[key] = value

    @property
    def heard(self) -> bool:
        """Whether a backward pass came through."""
        return "token_weights" in self._grads

    def taken(self, scale: float = 1.0) -> RecordedMicrobatch:
        """What was kept, on the CPU.

        Args:
            scale: of the loss, by which ω and η are divided.

        Returns:
            The micro-batch; ω is 0 where no backward pass came.

        Raises:
            BatchError: ω or η is not finite, or not 0 outside of the response.
        """
        b, t = self._shape
        ids, attended, mask = (leaf.cpu() for leaf in self._tokens)
        values = {name: last_columns(leaf.cpu(), t) for name, leaf in {**self._values, **self._others}.items()}
        grads = {name: last_columns(leaf.cpu(), t) / scale for name, leaf in self._grads.items()}
        for name, leaf in grads.items():
            _check_weights(name, leaf, mask)
        η, kl = (grads.get(name) for name in ("entropy_weights", "kl_weights"))
        return RecordedMicrobatch(
            ids.long(),
            attended,
            mask,
            grads.get("token_weights", torch.zeros(b, t)),
            η if η is not None and bool(η.any()) else None,
            values["logprobs"],
            values.get("entropies"),
            {name: values[name] for name in self._others},
            None if self.loss is None else float(self.loss),
            kl if kl is not None and bool(kl.any()) else None,
        )


def check_shapes(
    logp: Tensor, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, entropy: Tensor | None
) -> tuple[int, int]:
    """Check that what a tap is given fits together.

    Args:
        logp: [b k].
        input_ids: [b t], t ≥ k.
        attention_mask: [b t].
        response_mask: [b t] or [b k].
        entropy: [b k] or None.

    Returns:
        (b, t).

    Raises:
        BatchError: it does not.

    Example:
        >>> ids = torch.zeros(2, 5, dtype=torch.long)
        >>> check_shapes(torch.zeros(2, 3), ids, ids, ids, None)
        (2, 5)
    """
    shapes = {"logp": logp, "input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
    given = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in shapes.items())
    if any(leaf.ndim != 2 for leaf in shapes.values()):
        raise BatchError(f"tap was given {given}; expected [b k] log-probabilities and tokens and masks [b t].")
    (b, k), (rows, t) = logp.shape, input_ids.shape
    fits = rows == b and k <= t and attention_mask.shape == input_ids.shape and len(response_mask) == b
    if not fits or response_mask.shape[1] not in (k, t):
        raise BatchError(
            f"tap was given {given}; expected log-probabilities [b k] of the last k tokens of input_ids [b t], an "
            f"attention_mask [b t], and a response_mask [b t] or [b k]."
        )
    if entropy is not None and entropy.shape != logp.shape:
        raise BatchError(f"entropy is {list(entropy.shape)} and logp {list(logp.shape)}; expected one a token of both.")
    return b, t


def _check_weights(name: str, weights: Tensor, mask: Tensor) -> None:
    what = {"token_weights": "∂L/∂log π", "entropy_weights": "∂L/∂H", "kl_weights": "∂L/∂log π_reference"}[name]
    if not bool(torch.isfinite(weights).all()):
        row = int((~torch.isfinite(weights)).any(1).nonzero()[0])
        raise BatchError(f"{what} of row {row} is not finite: the loss overflowed there, or divided by zero.")
    outside = (weights != 0) & ~mask
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise BatchError(
            f"{what} of row {row}, column {column} is {float(weights[row, column]):.3g}, and response_mask is 0 there; "
            f"expected a mask of all tokens that the loss is about. Give the mask that the loss used."
        )
