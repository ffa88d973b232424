"""The token batch of functions over language models, and its validation.

`Sequences` is a pytree, so that `torch.func.vmap` can map over its rows. The engine itself accepts any pytree of
tensors that share their first dimension; every `Sequences` inside must satisfy the rules below.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from fkernel.boundary import public
from fkernel.errors import BatchError
from fkernel.shapes import Int, Shaped, Tensor


class Sequences(NamedTuple):
    """n prompts with their responses, right-padded to t tokens.

    Attributes:
        input_ids: [n t] int64. Prompt, response (with the EOS that ended it), padding.
        attention_mask: [n t] bool or int; 1 on prompt and response, 0 on padding.
        response_mask: [n t] bool or int; 1 on the tokens whose log-probabilities S sums.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


@public
def pad(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int = 0, device: Any = None
) -> Sequences:
    """Build one right-padded batch from prompts and their responses.

    Args:
        prompts: n lists of token ids.
        responses: n lists of token ids, each with the EOS that ended it (where one did).
        pad_id: the id of padding, which is never attended to and never scored.
        device: of the batch.

    Raises:
        BatchError: the lists differ in number, or a prompt or response is empty.

    Example:
        >>> pad([[5, 6], [7]], [[1], [2, 3, 1]]).response_mask.int()
        tensor([[0, 0, 1, 0],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    if len(prompts) != len(responses):
        raise BatchError(f"{len(prompts)} prompts but {len(responses)} responses; give one response for each prompt.")
    if not prompts:
        raise BatchError("No prompts were given; a batch needs at least one sequence.")
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not response:
            empty = "prompt" if not prompt else "response"
            raise BatchError(f"Sequence {row} has an empty {empty}; log π(response | prompt) needs a token of each.")
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention = torch.zeros(len(prompts), width, dtype=torch.bool)
    response_mask = torch.zeros_like(attention)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        attention[row, :end] = True
        response_mask[row, len(prompt) : end] = True
    return Sequences(ids.to(device), attention.to(device), response_mask.to(device))


def length(batch: Any) -> int:
    """Count the sequences of a batch.

    Raises:
        BatchError: no tensor, no row, or leaves that disagree about their first dimension.

    Example:
        >>> length((torch.zeros(3, 5), torch.zeros(3)))
        3
    """
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not leaves:
        raise BatchError(
            f"The batch ({type(batch).__name__}) holds no tensor; give a Sequences or a pytree of tensors."
        )
    if any(leaf.ndim == 0 for leaf in leaves):
        raise BatchError("The batch holds a scalar tensor; every leaf needs a first dimension that counts sequences.")
    sizes = sorted({leaf.shape[0] for leaf in leaves})
    if len(sizes) > 1:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise BatchError(f"The batch's leaves disagree about the number of sequences: shapes {shapes}.")
    if sizes[0] == 0:
        raise BatchError("The batch is empty (0 sequences); give at least one.")
    return sizes[0]


def take(batch: Any, rows: slice | Tensor | list[int]) -> Any:
    """Return some rows of a batch, as a batch of the same kind.

    Example:
        >>> take((torch.arange(4),), slice(1, 3))
        (tensor([1, 2]),)
    """
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)


def find_sequences(batch: Any) -> list[Sequences]:
    """Return every `Sequences` inside a batch, at any depth."""
    leaves = pytree.tree_leaves(batch, is_leaf=lambda node: isinstance(node, Sequences))
    return [leaf for leaf in leaves if isinstance(leaf, Sequences)]


def lengths(batch: Any) -> Shaped[Tensor, " n"] | None:
    """Count every sequence's tokens without padding, over all `Sequences` of a batch; None where it has none.

    Example:
        >>> lengths(pad([[5, 6], [7]], [[1], [2, 3, 1]]))
        tensor([3, 4])
    """
    counts = [sequences.attention_mask.long().sum(1) for sequences in find_sequences(batch)]
    return torch.stack(counts).sum(0) if counts else None


def token_counts(batch: Any) -> list[int]:
    """List every sequence's tokens; 1 each in a batch without `Sequences`."""
    counts = lengths(batch)
    return [1] * length(batch) if counts is None else counts.tolist()


def widths(batch: Any) -> list[tuple[int, ...]]:
    """List every sequence's tokens, one number for each `Sequences` of a batch.

    Example:
        >>> widths(pad([[5, 6], [7]], [[1], [2, 3, 1]]))
        [(3,), (4,)]
    """
    counts = [sequences.attention_mask.long().sum(1).tolist() for sequences in find_sequences(batch)]
    return list(zip(*counts, strict=True)) if counts else [()] * length(batch)


def by_length(batch: Any) -> Shaped[Tensor, " n"]:
    """Return the order from the longest sequence to the shortest, stable for equal lengths.

    Neighbours in this order share a microbatch with little padding: `take(batch, order)` sorts, and
    `result[order] = sorted_result` restores the original order.

    Example:
        >>> by_length(pad([[5, 6], [7]], [[1], [2, 3, 1]]))
        tensor([1, 0])
    """
    counts = lengths(batch)
    if counts is None:
        return torch.arange(length(batch))
    return counts.sort(descending=True, stable=True).indices


def trim(batch: Any) -> Any:
    """Drop the columns that are padding in every sequence of a `Sequences`; values are unchanged.

    Example:
        >>> trim(pad([[5, 6], [7]], [[1], [2, 3, 1]])._replace()).input_ids.shape
        torch.Size([2, 4])
    """

    def cut(node: Any) -> Any:
        if not isinstance(node, Sequences):
            return node
        width = int(node.attention_mask.long().sum(1).max())
        return node if width == node.input_ids.shape[1] else Sequences(*(leaf[:, :width] for leaf in node))

    return pytree.tree_map(cut, batch, is_leaf=lambda node: isinstance(node, Sequences))


def check_batch(batch: Any) -> int:
    """Validate a batch before any transform, and count its sequences.

    Raises:
        BatchError: see `length` and `check_sequences`.
    """
    n = length(batch)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and (leaf.is_meta or leaf.layout != torch.strided):
            given = "on the meta device, without values" if leaf.is_meta else leaf.layout
            raise BatchError(f"A tensor of the batch is {given}; expected dense tensors of numbers.")
    for sequences in find_sequences(batch):
        check_sequences(sequences)
    return n


def check_sequences(batch: Sequences) -> None:
    """Raise BatchError unless a batch can be scored, naming the first sequence that cannot.

    Checked: int64 ids; equal shapes [n t]; masks of zeros and ones; right-padding; a response in every row; the
    response inside the attention mask; no scored token at position 0, which has no prediction.
    """
    ids, attention, response = batch
    if ids.ndim != 2 or attention.shape != ids.shape or response.shape != ids.shape:
        raise BatchError(
            f"Sequences wants three tensors of one shape [n t]; input_ids is {list(ids.shape)}, attention_mask "
            f"{list(attention.shape)}, response_mask {list(response.shape)}."
        )
    if 0 in ids.shape:
        raise BatchError(
            f"input_ids is {list(ids.shape)}: the batch holds no token; give at least one sequence of two."
        )
    if ids.dtype != torch.int64:
        raise BatchError(f"input_ids is {ids.dtype}; token ids are int64 (tensor.long()).")
    for name, mask in (("attention_mask", attention), ("response_mask", response)):
        _each_row(((mask != 0) & (mask != 1)).any(1), f"{name} holds values other than 0 and 1", "masks are 0/1")
    attended, scored = attention.bool(), response.bool()
    _each_row(
        (attended[:, 1:] & ~attended[:, :-1]).any(1) | ~attended[:, 0],
        "is padded on the left or has a hole in its attention_mask",
        "sequences are right-padded: tokens first, then padding (fkernel.func.pad makes such a batch)",
    )
    _each_row(~scored.any(1), "has no response token", "mark at least one token in response_mask")
    _each_row(
        (scored & ~attended).any(1),
        "has response tokens outside its attention_mask",
        "padding is never scored: response_mask must lie inside attention_mask",
    )
    _each_row(
        scored[:, 0],
        "scores its token at position 0, which no token precedes",
        "begin the response at position 1 or later (a BOS or the prompt's last token comes first)",
    )


def check_tokens(
    batch: Sequences, vocab_size: int | None, max_length: int | None, padding_idx: int | None = None
) -> None:
    """Check a batch's ids against a model.

    `torch.nn.Embedding(padding_idx=…)` drops its row's gradient in training, in reverse mode only. `fkernel` takes the
    true derivative, which differs where that id is inside a sequence, and warns.

    Raises:
        BatchError: a token id is not in the vocabulary, or the batch is wider than the model's context.
    """
    ids = batch.input_ids
    if vocab_size is not None:
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            row, column = (int(i) for i in outside.nonzero()[0])
            raise BatchError(
                f"Sequence {row}, position {column}: token id {int(ids[row, column])} is outside of the model's "
                f"vocabulary of {vocab_size}; tokenize with this model's own tokenizer (padding ids included)."
            )
    if max_length is not None and ids.shape[1] > max_length:
        raise BatchError(
            f"The batch is {ids.shape[1]} tokens wide, the model's context holds {max_length}; "
            f"drop or shorten the longer sequences."
        )
    if padding_idx is not None:
        rows = holding_inside(batch, padding_idx)
        if rows.any():
            warnings.warn(
                f"{int(rows.sum())} sequence(s) hold the model's padding id {padding_idx} inside. Training withholds "
                f"that embedding row's gradient (torch.nn.Embedding.padding_idx); the derivatives here include it.",
                stacklevel=3,
            )


def holding_inside(batch: Sequences, token: int) -> Shaped[Tensor, " n"]:
    """Return which sequences hold a token before their last position.

    The last attended token predicts no scored token, so an EOS that is also the padding id is harmless there.

    Example:
        >>> holding_inside(pad([[0, 1], [2]], [[1], [0]]), 0)
        tensor([ True, False])
    """
    inside = batch.attention_mask[:, :-1].bool() & batch.attention_mask[:, 1:].bool()
    return ((batch.input_ids[:, :-1] == token) & inside).any(1)


def _each_row(bad: Shaped[Tensor, " n"], what: str, todo: str) -> None:
    if bool(bad.any()):
        rows: Int[Tensor, "k 1"] = bad.nonzero()
        raise BatchError(f"Sequence {int(rows[0])} {what} ({len(rows)} of {len(bad)} sequences do); {todo}.")


WINDOW = 512
"""Largest number of tokens of a sequence that certificates use, to limit their memory."""


def windowed(batch: Any, most: int = WINDOW) -> Any:
    """Cut long sequences down to the end of their prompts and the beginning of their responses.

    Args:
        batch: with one `Sequences`, and possibly other tensors [n t].
        most: tokens of a window; at most a quarter of them are the prompt's.

    Returns:
        The batch itself where no sequence is longer.

    Example:
        >>> windowed(pad([[1] * 9], [[2] * 9]), most=8).input_ids
        tensor([[1, 1, 2, 2, 2, 2, 2, 2]])
    """
    sequences = find_sequences(batch)
    if len(sequences) != 1 or sequences[0].input_ids.shape[1] <= most:
        return batch
    t, mask = sequences[0].input_ids.shape[1], sequences[0].response_mask
    starts = (mask.long().argmax(1) - most // 4).clamp(min=0)
    columns = starts[:, None] + torch.arange(most, device=starts.device)
    inside = columns < t

    def window(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim != 2 or leaf.shape[1] != t:
            return leaf
        return torch.where(inside, leaf.gather(1, columns.clamp(max=t - 1)), leaf.new_zeros(()))

    return trim(pytree.tree_map(window, batch))
