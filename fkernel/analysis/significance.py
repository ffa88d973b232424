"""Which contributors are told apart from advantages that carry no information. No gradient is computed.

The null: given the completions of a prompt, their rewards are exchangeable, so advantages may be permuted within the
prompt (all rules of `fkernel.rollout.advantages` are permuted with the rewards), while K and the loss weights, which
rewards do not enter, stay where they are. The prompt's mean Ā is the same under all permutations, and they can tell
nothing about it; what they can tell is about

    D_eu = K_eu c w_u (A_u − Ā)        which is C_eu where advantages are centred on their prompts, as GRPO's and RLOO's
    D_eu(π) = K_eu c w_u (A_π(u) − Ā)
    p = (1 + #{π : T(π) ≥ T}) / (1 + #π)

Which T? For one sequence, |D_eu(π)| ≥ |D_eu| says |A_π(u) − Ā| ≥ |A_u − Ā| whatever K is: a per-entry p knows nothing
of the kernel. And the largest of many entries is large by chance. So a sequence is compared with the largest of its
row,

    T_eu = |D_eu|  against  max_v |D_ev(π)|

so that where advantages tell nothing, some p of a row is ≤ α with a chance of at most α (the single-step maxT of
Westfall & Young). Still, a single sequence cannot be told apart beyond what its prompt has to exchange: p is at least
the share of the prompt's completions whose |A − Ā| is as large as its own, 1/8 or more in a group of eight, and 1 where
half of them are right (`least`). What permutations can tell is whether a prompt's advantages agree with the kernel, and
whether all of U's do,

    T_eg = |Σ_{u in g} D_eu|  against  max_h |Σ_{u in h} D_eu(π)|        T_e = |Σ_u D_eu|  against  |Σ_u D_eu(π)|

A prompt with h of k completions right has k!/(h! (k−h)!) arrangements, half as many up to sign where h = k/2. One whose
advantages are all equal has nothing to permute: it gives no information, its p is 1, and it is in nobody's way.

Sources: P. Westfall & S. Young, "Resampling-based multiple testing" (1993), §2.3; B. Phipson & G. Smyth, "Permutation
p-values should never be zero" (2010).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.analysis.uncertainty import check_kernel, group_sums, places
from fkernel.errors import BatchError
from fkernel.shapes import Tensor

ROUNDING = 1e-12
"""By how much, relative to Σ_u |K_eu c w_u| max|A − Ā|, equal statistics of two permutations may differ."""


class Permutations(NamedTuple):
    """Permutations that keep every prompt's completions among themselves, once for all rows of a kernel.

    Attributes:
        place: [n] int64, the prompt of each sequence, 0 … G−1.
        orders: [draws n] int64, π.
    """

    place: Tensor
    orders: Tensor


class Significance(NamedTuple):
    """What is told apart from advantages that carry no information: p-values of r rows.

    Attributes:
        sequences: [r n_U], each against the largest sequence of its row.
        prompts: [r G], each against the largest prompt of its row.
        influence: [r], of all of U.
        least: [n_U], below which no p in `sequences` is expected to fall, whatever K is.
        informative: [G] bool, whether a prompt's advantages differ at all; where not, nothing can be told.
    """

    sequences: Tensor
    prompts: Tensor
    influence: Tensor
    least: Tensor
    informative: Tensor


def permutations(groups: Tensor, draws: int = 1000, seed: int = 0) -> Permutations:
    """Draw permutations within prompts.

    Args:
        groups: [n] int64, which prompt each sequence belongs to.
        draws: how many.
        seed: of the draws.

    Returns:
        Permutations; draws · n numbers of eight bytes.

    Raises:
        BatchError: no sequences, or no draws.

    Example:
        >>> permutations(torch.tensor([7, 3]), draws=2).orders
        tensor([[0, 1],
                [0, 1]])
    """
    place, _ = places(groups, draws)
    chance = torch.rand(draws, len(place), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    anyhow = chance.argsort(1)
    shuffled = anyhow.gather(1, place[anyhow].argsort(dim=1, stable=True))  # by prompt, at random inside of each
    orders = torch.empty_like(shuffled)
    orders[:, place.argsort(stable=True)] = shuffled
    return Permutations(place, orders)


def significance(K: Tensor, scale: Tensor, advantages: Tensor, draws: Permutations) -> Significance:
    """Tell which sequences and prompts of U, and which influences, are told apart from advantages without information.

    D_eu(π) = K_eu · c w_u · (A_π(u) − Ā); the statistics are derived in `fkernel.analysis.significance`

    Args:
        K: [r n_U] some rows of the kernel, nats per unit of c·w·A.
        scale: [n_U] c·w, what each sequence's advantage is multiplied with; it is not permuted.
        advantages: [n_U] A.
        draws: of U's prompts.

    Returns:
        Significance; p ≥ 1/(draws + 1). Rows give the same numbers alone as in company; memory is draws · (r + n_U).

    Raises:
        BatchError: shapes disagree.
        NonFiniteError: K, a scale or an advantage is not finite.

    Example:
        >>> prompts = permutations(torch.tensor([0, 0, 1, 1]))
        >>> found = significance(torch.ones(1, 4), torch.ones(4), torch.tensor([1.0, -1.0, 0.5, 0.5]), prompts)
        >>> found.sequences, found.informative
        (tensor([[1., 1., 1., 1.]], dtype=torch.float64), tensor([ True, False]))
    """
    check_kernel(K, draws.place)
    for what, given in (("scale", scale), ("advantages", advantages)):
        if given.shape != draws.place.shape:
            raise BatchError(f"{what} has shape {list(given.shape)} for {len(draws.place)} sequences; expected [n_U].")
        tree.check_finite({what: given}, "significance")
    place = draws.place.to(K.device)
    G = int(place.max()) + 1
    A, informative = _centred(advantages.to(K.device).double(), place, G)
    factors, shuffled = K.double() * scale.to(K.device).double(), A[draws.orders.to(K.device)]
    largest = factors.new_zeros(len(K), len(shuffled))
    total = torch.zeros_like(largest)
    for g in range(G):
        own = (place == g).nonzero()[:, 0]
        sums = factors[:, own] @ shuffled[:, own].T
        largest, total = torch.maximum(largest, sums.abs()), total + sums
    sizes = factors.abs()
    largest_sequence = torch.stack([(sizes * null).amax(1) for null in shuffled.abs()], 1)
    by_prompt = group_sums(factors * A, place, G)
    slack = ROUNDING * sizes.sum(1, keepdim=True) * A.abs().max()
    return Significance(
        _p(sizes * A.abs(), largest_sequence, slack),
        _p(by_prompt.abs(), largest, slack),
        _p(by_prompt.sum(1, keepdim=True).abs(), total.abs(), slack)[:, 0],
        _least(A, place, G),
        informative,
    )


def _p(own: Tensor, null: Tensor, slack: Tensor) -> Tensor:
    """(1 + #{T(π) ≥ T}) / (1 + #π), of T [r k] and T(π) [r draws]; what is observed is one of the permutations."""
    draws = null.shape[1]
    smaller = torch.searchsorted(null.sort(1).values, own - slack)
    return (1 + draws - smaller).double() / (1 + draws)


def _centred(A: Tensor, place: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """A − Ā of each prompt, exactly 0 where a prompt's are equal; and whether they are not, [G]."""
    low, high = (A.new_zeros(G).scatter_reduce_(0, place, A, how, include_self=False) for how in ("amin", "amax"))
    mean = group_sums(A[None], place, G)[0] / torch.bincount(place, minlength=G)
    informative = high > low
    return torch.where(informative[place], A - mean[place], 0.0), informative


def _least(A: Tensor, place: Tensor, G: int) -> Tensor:
    """Each sequence's share of its prompt's |A − Ā| that are as large as its own, [n]."""
    size, least = A.abs(), torch.empty_like(A)
    for g in range(G):
        own = size[place == g]
        least[place == g] = (own >= (1 - ROUNDING) * own[:, None]).double().mean(1)
    return least
