"""The vocabulary head, a range of the table's rows at a time: no [t, v] is ever held.

With x_s the head's input where it predicts token y_s, W the table [v, d], z_sv = ⟨x_s, W_v⟩/τ and p = softmax(z):

    S = Σ_s ω_s (z_{s,y_s} − lse_s),                        lse_s = log Σ_v exp(z_sv)
    ∂S/∂x_s = ω_s (W_{y_s} − Σ_v p_sv W_v)/τ
    ∂S/∂W_v = Σ_s δ_sv x_s,                                 δ_sv = ω_s (1[y_s = v] − p_sv)/τ,  p_sv = exp(z_sv − lse_s)

`scored` walks the rows once, with the largest z so far (m), the sum l = Σ exp(z − m) and Σ exp(z − m) W; both sums are
rescaled by exp(m_before − m) whenever m grows. ∂S/∂W of a sequence is as large as the table: a `Head` keeps x and lse,
and forms it for the rows that are asked for.

Source: M. Milakov & N. Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from fkernel.shapes import Float, Int, Tensor

LOGITS_BYTES = 64 << 20
"""Logits that are held at once, at most."""
TableRows = Callable[[slice | Tensor], Tensor]
"""Rows of a table [v, d], by range or by ids, in the dtype that is computed in."""


class Head(NamedTuple):
    """A head's gradients, G_n[v] = Σ_s δ_nsv x_ns, formed on demand from what δ is made of.

    Attributes:
        targets: y, [n s] int64, the tokens that are predicted.
        omega: ω, [n s]; 0 on padding.
        lse: log Σ_v exp(z), [n s].
        x: the head's inputs, [n s d].
        rows: W by rows; it belongs to the model, and counts as nobody's storage.
        size: v.
        temperature: τ.
    """

    targets: Tensor
    omega: Tensor
    lse: Tensor
    x: Tensor
    rows: TableRows
    size: int
    temperature: float

    def changed(self, change: Callable[[Tensor], Tensor]) -> Head:
        """Make the same of changed tensors."""
        stored = {name: change(leaf) for name, leaf in zip(self._fields, self[:4], strict=False)}
        return self._replace(**stored)


def deltas(head: Head, start: int, stop: int) -> Float[Tensor, "n s r"]:
    """Compute δ for a range of the table's rows.

    δ[n, s, v] = ω (1[y = v] − exp(⟨x, W_v⟩/τ − lse))/τ

    Args:
        head: of n sequences.
        start: the first row v.
        stop: one past the last.

    Example:
        >>> W = torch.zeros(2, 1)
        >>> ones = torch.ones(1, 1)
        >>> deltas(Head(torch.tensor([[0]]), ones, ones * 2.0 ** 0.5, ones[None], W.__getitem__, 2, 1.0), 0, 2).shape
        torch.Size([1, 1, 2])
    """
    W, slope = head.rows(slice(start, stop)), head.omega / head.temperature
    p = (head.x @ W.mT).div_(head.temperature).sub_(head.lse[..., None]).exp_()
    delta = p.mul_(-slope[..., None])
    n, s = ((head.targets >= start) & (head.targets < stop)).nonzero(as_tuple=True)
    delta[n, s, head.targets[n, s] - start] += slope[n, s]
    return delta


def add_head(head: Head, out: Float[Tensor, "n r d"], start: int, keep: float = 1.0) -> None:
    """Add a range of rows of the gradients to `keep` times what is in `out`.

    Args:
        head: of n sequences.
        out: [n, r, d], contiguous; changed in place.
        start: the first of the rows.
        keep: 0 overwrites, whatever stood there.
    """
    delta = deltas(head, start, start + out.shape[1])
    out.baddbmm_(delta.mT.to(out.dtype), head.x.to(out.dtype), beta=keep)


class Scored(NamedTuple):
    """What one pass over the table says of N predicted tokens.

    Attributes:
        logprobs: log π of each, [N].
        lse: log Σ_v exp(z), [N].
        slopes: ∂ log π/∂x, [N d].
    """

    logprobs: Tensor
    lse: Tensor
    slopes: Tensor


def scored(
    x: Float[Tensor, "N d"], targets: Int[Tensor, " N"], rows: TableRows, size: int, temperature: float = 1.0
) -> Scored:
    """Compute log π of tokens and its derivative in the head's inputs, by tiles of the table: two products a tile.

    log π = z_y − lse,   ∂ log π/∂x = (W_y − Σ_v p_v W_v)/τ

    Args:
        x: the head's inputs where they predict a token.
        targets: the tokens, y.
        rows: W by rows.
        size: v, how many there are.
        temperature: τ.

    Example:
        >>> W = torch.tensor([[1.0], [1.0]])
        >>> scored(torch.ones(1, 1), torch.tensor([0]), W.__getitem__, 2)
        Scored(logprobs=tensor([-0.6931]), lse=tensor([1.6931]), slopes=tensor([[0.]]))
    """
    step = max(1, LOGITS_BYTES // (x.element_size() * max(1, len(x))))
    m, l, mean = x.new_full((len(x),), -torch.inf), x.new_zeros(len(x)), torch.zeros_like(x)
    for start in range(0, size, step):
        W = rows(slice(start, min(start + step, size)))
        z = (x @ W.mT).div_(temperature)
        larger = torch.maximum(m, z.amax(1))
        shrunk, m = (m - larger).exp_(), larger
        p = z.sub_(m[:, None]).exp_()
        l = l * shrunk + p.sum(1)
        mean = torch.addmm(mean.mul_(shrunk[:, None]), p, W, out=mean)
    own, lse = rows(targets), m + l.log()
    logprobs = (x * own).sum(1) / temperature - lse
    return Scored(logprobs, lse, (own - mean.div_(l[:, None])) / temperature)


def head_scores(
    x: list[Tensor],
    ids: Int[Tensor, "n t"],
    omega: Tensor,
    rows: TableRows,
    size: int,
    temperature: float,
    weight: float,
) -> tuple[Head, Tensor, list[Tensor]]:
    """Score a few sequences: Σ ω log π, its derivative in x, and what its derivative in the table is made of.

    Args:
        x: the head's inputs of each sequence, [t d], at its own length.
        ids: [n t].
        omega: ω, [n t−1], of the positions that predict; those of 0 are left out.
        rows: W by rows.
        size: v.
        temperature: τ.
        weight: what derivatives are multiplied by, and values not.

    Returns:
        The handle of n sequences; Σ ω log π, [n] float64; and `weight` times ∂/∂x of each, [t d].
    """
    places = [ω[: max(0, len(own) - 1)].nonzero()[:, 0] for own, ω in zip(x, omega, strict=True)]
    counts = [len(place) for place in places]
    chosen = torch.cat([own[place] for own, place in zip(x, places, strict=True)])
    targets = torch.cat([own[place + 1] for own, place in zip(ids, places, strict=True)])
    ω = torch.cat([own[place] for own, place in zip(omega, places, strict=True)]).to(chosen)
    logprobs, lse, slopes = scored(chosen, targets, rows, size, temperature)
    values = torch.stack([each.sum() for each in (ω.double() * logprobs.double()).split(counts)])
    ω = weight * ω
    moves = [
        torch.zeros_like(own).index_copy_(0, place, slope)
        for own, place, slope in zip(x, places, (ω[:, None] * slopes).split(counts), strict=True)
    ]
    flat = Head(targets, ω, lse, chosen, rows, size, temperature)
    return flat.changed(lambda leaf: pad_sequence([*leaf.split(counts)], batch_first=True)), values, moves
