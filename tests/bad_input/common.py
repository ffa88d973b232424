"""Entries of the library, and what each is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fkernel as fk
from fkernel import func, precond
from fkernel.func import Sequences

DTYPE = torch.float64
NAN = math.nan
VOCABULARY, CONTEXT, WIDTH = 11, 8, 5

Entry = Callable[..., Any]


def _ones(batch: Any) -> torch.Tensor:
    """One weight a sequence, counted without the library."""
    leaf = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)), None)
    return torch.ones(0 if leaf is None or leaf.ndim == 0 else len(leaf), dtype=DTYPE)


def _explain(f: Any, params: Any, E: Any, U: Any, **options: Any) -> Any:
    return fk.explain_step(f, params, E, U, _ones(U), precond.adamw_init(params, lr=0.1), **options)


# Each takes (f, params, the batch at fault, a batch that is not, microbatch), and hands the first to one public name.
ENTRIES: dict[str, Entry] = {
    "per_sequence_grad": lambda f, p, b, good, m=None: func.per_sequence_grad(f, m)(p, b),
    "vjp": lambda f, p, b, good, m=None: func.vjp(f, m)(p, b, _ones(b)),
    "jvp": lambda f, p, b, good, m=None: func.jvp(f, m)(p, b, p),
    "curvature": lambda f, p, b, good, m=None: func.curvature(f, m)(p, b, p),
    "kernel, E": lambda f, p, b, good, m=8: fk.kernel(f, p, b, good, precond.identity(), microbatch=m),
    "kernel, U": lambda f, p, b, good, m=8: fk.kernel(f, p, good, b, precond.identity(), microbatch=m),
    "influence, E": lambda f, p, b, good, m=8: fk.influence(
        f, p, b, good, precond.identity(), _ones(good), microbatch=m
    ),
    "influence, U": lambda f, p, b, good, m=8: fk.influence(f, p, good, b, precond.identity(), _ones(b), microbatch=m),
    "loss_gradient, U": lambda f, p, b, good, m=8: fk.loss_gradient(f, p, b, _ones(b), microbatch=m),
    "explain_step, E": lambda f, p, b, good, m=8: _explain(f, p, b, good, microbatch=m),
    "explain_step, U": lambda f, p, b, good, m=8: _explain(f, p, good, b, microbatch=m),
    "realised_change, E": lambda f, p, b, good, m=8: fk.realised_change(f, p, p, b, microbatch=m),
}
TRANSFORMS = ("per_sequence_grad", "vjp", "jvp", "curvature")
BATCHED = [name for name in ENTRIES if "," in name]
everywhere = pytest.mark.parametrize("entry", ENTRIES)


@contextmanager
def clear_error(kind: type[Exception], *pieces: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of one kind whose message holds every piece."""
    with pytest.raises(kind) as caught:
        yield caught
    for piece in pieces:
        assert piece in str(caught.value)


def plain(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An f that has nothing to do with language."""
    return torch.tanh(x @ params["w"] + params["b"])


def vectors(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.1, 1.0, 3 * n, dtype=DTYPE).reshape(n, 3)


def sequences() -> Sequences:
    """Three sequences, five wide; the last is padded by one."""
    return func.pad([[1, 2], [3], [4, 5]], [[6, 7, 8], [9, 1, 2, 3], [4, 5]])


def _left_padded(batch: Sequences) -> Sequences:
    return Sequences(*(leaf.flip(1) for leaf in batch))._replace(response_mask=batch.attention_mask.flip(1))


def _set(batch: Sequences, field: str, row: int, column: int | slice, value: int) -> Sequences:
    changed = getattr(batch, field).clone().to(torch.int64)
    changed[row, column] = value
    return batch._replace(**{field: changed})


BAD_BATCHES: dict[str, tuple[Callable[[Sequences], Sequences], tuple[str, ...]]] = {
    "no sequence": (
        lambda b: Sequences(*(leaf[:0] for leaf in b)),
        ("empty", "0 sequences", "give at least one"),
    ),
    "no token": (
        lambda b: Sequences(*(leaf[:, :0] for leaf in b)),
        ("[3, 0]",),
    ),
    "no response": (
        lambda b: _set(b, "response_mask", 2, slice(None), 0),
        ("Sequence 2 has no response token", "1 of 3", "response_mask"),
    ),
    "response outside of the attention mask": (
        lambda b: _set(b, "response_mask", 2, 4, 1),
        ("Sequence 2", "outside its attention_mask", "1 of 3", "response_mask must lie inside attention_mask"),
    ),
    "left-padded": (
        _left_padded,
        ("Sequence 2", "padded on the left", "1 of 3", "right-padded", "fkernel.func.pad"),
    ),
    "a hole in the attention mask": (
        lambda b: _set(_set(b, "attention_mask", 2, 1, 0), "response_mask", 2, 1, 0),
        ("Sequence 2", "hole in its attention_mask", "right-padded"),
    ),
    "a response that begins at position 0": (
        lambda b: _set(b, "response_mask", 2, 0, 1),
        ("Sequence 2", "position 0", "position 1 or later"),
    ),
    "a mask of twos": (
        lambda b: _set(b, "response_mask", 2, 2, 2),
        ("Sequence 2", "response_mask holds values other than 0 and 1"),
    ),
    "ids of another integer type": (
        lambda b: b._replace(input_ids=b.input_ids.int()),
        ("input_ids is torch.int32", "int64", "long()"),
    ),
    "masks of another width": (
        lambda b: b._replace(attention_mask=b.attention_mask[:, :4]),
        ("one shape [n t]", "input_ids is [3, 5]", "attention_mask [3, 4]", "response_mask [3, 5]"),
    ),
    "masks of another number of rows": (
        lambda b: b._replace(response_mask=b.response_mask[:2]),
        ("disagree about the number of sequences", "[3, 5]", "[2, 5]"),
    ),
    "one sequence without its leading dimension": (
        lambda b: Sequences(*(leaf[0] for leaf in b)),
        ("[n t]", "input_ids is [5]"),
    ),
    "a token id beyond the vocabulary": (
        lambda b: _set(b, "input_ids", 2, 1, VOCABULARY),
        ("Sequence 2, position 1", f"token id {VOCABULARY}", f"vocabulary of {VOCABULARY}", "tokenizer"),
    ),
    "a negative token id": (
        lambda b: _set(b, "input_ids", 2, 4, -100),
        ("Sequence 2, position 4", "token id -100", f"vocabulary of {VOCABULARY}", "padding ids included"),
    ),
    "more tokens than the context holds": (
        lambda b: func.pad([[1], [2], [3]], [[1] * CONTEXT, [2], [3]]),
        (f"{CONTEXT + 1} tokens wide", f"context holds {CONTEXT}", "shorten"),
    ),
}
