"""The vocabulary head, a range of the table's rows at a time: no [t, v] is ever held.

With x_s the head's input where it predicts token y_s, W the table [v, d], z_sv = ⟨x_s, W_v⟩/τ and p = softmax(z):

    f = Σ_s ω_s log π_s + η_s H_s,      log π_s = z_{s,y_s} − lse_s,    lse_s = log Σ_v exp(z_sv)
                                        H_s = lse_s − z̄_s,              z̄_s = Σ_v p_sv z_sv,   p_sv = exp(z_sv − lse_s)
    ∂log π_s/∂x_s = (W_{y_s} − Σ_v p_sv W_v)/τ
    ∂H_s/∂x_s     = −Σ_v p_sv (z_sv − z̄_s) W_v/τ
    ∂f/∂W_v       = Σ_s δ_sv x_s,       δ_sv = (ω_s (1[y_s = v] − p_sv) − η_s p_sv (z_sv − z̄_s))/τ

`scored` walks the rows once, with the largest z so far (m), the sum l = Σ exp(z − m) and Σ exp(z − m) W, and where
there are entropies the same two sums times z; all are rescaled by exp(m_before − m) whenever m grows. ∂f/∂W of a
sequence is as large as the table: a `Head` keeps x, lse and z̄, and forms it for the rows that are wanted.

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
        rows: W by rows; it belongs to the model, and is not part of the handle's storage.
        size: v.
        temperature: τ.
        eta: η, [n s]; None where no entropy has a weight.
        mean: z̄, [n s]; None with it.
    """

    targets: Tensor
    omega: Tensor
    lse: Tensor
    x: Tensor
    rows: TableRows
    size: int
    temperature: float
    eta: Tensor | None = None
    mean: Tensor | None = None

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors with a row a sequence, by name."""
        leaves = {"targets": self.targets, "omega": self.omega, "lse": self.lse, "x": self.x}
        if self.eta is None or self.mean is None:
            return leaves
        return leaves | {"eta": self.eta, "mean": self.mean}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Head:
        """Make the same of changed tensors."""
        return self._replace(**{name: change(leaf) for name, leaf in self.stored.items()})


def deltas(head: Head, start: int, stop: int) -> Float[Tensor, "n s r"]:
    """Compute δ for a range of the table's rows.

    δ[n, s, v] = (ω (1[y = v] − p) − η p (z − z̄))/τ,  z = ⟨x, W_v⟩/τ,  p = exp(z − lse)

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
    z = (head.x @ W.mT).div_(head.temperature)
    if head.eta is None or head.mean is None:
        delta = z.sub_(head.lse[..., None]).exp_().mul_(-slope[..., None])
    else:
        factor = (z - head.mean[..., None]).mul_(head.eta[..., None]).add_(head.omega[..., None])
        delta = z.sub_(head.lse[..., None]).exp_().mul_(factor).div_(-head.temperature)
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
        entropy: (H [N], ∂H/∂x [N d]); None where it was not wanted.
    """

    logprobs: Tensor
    lse: Tensor
    slopes: Tensor
    entropy: tuple[Tensor, Tensor] | None = None


def scored(
    x: Float[Tensor, "N d"],
    targets: Int[Tensor, " N"],
    rows: TableRows,
    size: int,
    temperature: float = 1.0,
    entropies: bool = False,
) -> Scored:
    """Compute log π of tokens, H if wanted, and their derivatives in the head's inputs, by tiles of the table.

    log π = z_y − lse,  ∂log π/∂x = (W_y − Σ_v p_v W_v)/τ;   H = lse − z̄,  ∂H/∂x = −Σ_v p_v (z_v − z̄) W_v/τ

    Args:
        x: the head's inputs where they predict a token.
        targets: the tokens, y.
        rows: W by rows.
        size: v, how many there are.
        temperature: τ.
        entropies: whether H is wanted: one more product a tile.

    Example:
        >>> W = torch.tensor([[1.0], [1.0]])
        >>> scored(torch.ones(1, 1), torch.tensor([0]), W.__getitem__, 2)[:3]
        (tensor([-0.6931]), tensor([1.6931]), tensor([[0.]]))
    """
    step = max(1, LOGITS_BYTES // (x.element_size() * max(1, len(x))))
    m, l, mean = x.new_full((len(x),), -torch.inf), x.new_zeros(len(x)), torch.zeros_like(x)
    zl, z_mean = torch.zeros_like(l), torch.zeros_like(x)  # the sums times z
    for start in range(0, size, step):
        W = rows(slice(start, min(start + step, size)))
        z = (x @ W.mT).div_(temperature)
        larger = torch.maximum(m, z.amax(1))
        shrunk, m = (m - larger).exp_(), larger
        if entropies:
            pz = (z - m[:, None]).exp_().mul_(z)
            zl = zl * shrunk + pz.sum(1)
            z_mean = torch.addmm(z_mean.mul_(shrunk[:, None]), pz, W, out=z_mean)
        p = z.sub_(m[:, None]).exp_()
        l = l * shrunk + p.sum(1)
        mean = torch.addmm(mean.mul_(shrunk[:, None]), p, W, out=mean)
    own, lse = rows(targets), m + l.log()
    logprobs = (x * own).sum(1) / temperature - lse
    mean.div_(l[:, None])
    entropy = None
    if entropies:
        z_bar = zl / l
        entropy = lse - z_bar, (z_bar[:, None] * mean - z_mean.div_(l[:, None])) / temperature
    return Scored(logprobs, lse, (own - mean) / temperature, entropy)


def head_scores(
    x: list[Tensor],
    ids: Int[Tensor, "n t"],
    omega: Tensor,
    eta: Tensor | None,
    rows: TableRows,
    size: int,
    temperature: float,
    weight: float,
) -> tuple[Head, Tensor, list[Tensor]]:
    """Score a few sequences: f = Σ ω log π + η H, its derivative in x, and what its derivative in the table is made of.

    Args:
        x: the head's inputs of each sequence, [t d], at its own length.
        ids: [n t].
        omega: ω, [n t−1], of the positions that predict; those where ω and η are 0 are left out.
        eta: η, [n t−1]; None where no entropy has a weight.
        rows: W by rows.
        size: v.
        temperature: τ.
        weight: what derivatives are multiplied by, and values not.

    Returns:
        The handle of n sequences; f, [n] float64; and `weight` times ∂f/∂x of each, [t d].
    """
    counting = omega != 0 if eta is None else (omega != 0) | (eta != 0)
    places = [counts[: max(0, len(own) - 1)].nonzero()[:, 0] for own, counts in zip(x, counting, strict=True)]
    counts = [len(place) for place in places]
    chosen = torch.cat([own[place] for own, place in zip(x, places, strict=True)])
    targets = torch.cat([own[place + 1] for own, place in zip(ids, places, strict=True)])

    def at_places(weights: Tensor) -> Tensor:
        return torch.cat([own[place] for own, place in zip(weights, places, strict=True)]).to(chosen)

    ω = at_places(omega)
    logprobs, lse, slopes, entropy = scored(chosen, targets, rows, size, temperature, eta is not None)
    each, moves = ω.double() * logprobs.double(), ω[:, None] * slopes
    flat = Head(targets, weight * ω, lse, chosen, rows, size, temperature)
    if eta is not None and entropy is not None:
        η, (H, slopes) = at_places(eta), entropy
        each, moves = each + η.double() * H.double(), moves + η[:, None] * slopes
        flat = flat._replace(eta=weight * η, mean=lse - H)
    values = torch.stack([own.sum() for own in each.split(counts)])
    moves = [
        torch.zeros_like(own).index_copy_(0, place, slope)
        for own, place, slope in zip(x, places, (weight * moves).split(counts), strict=True)
    ]
    return flat.changed(lambda leaf: pad_sequence([*leaf.split(counts)], batch_first=True)), values, moves
