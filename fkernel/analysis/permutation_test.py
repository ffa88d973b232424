"""Permutation test of contributors against advantages without information. No gradient is computed.

The null: given the completions of a prompt, their rewards are exchangeable, so advantages may be permuted within the
prompt (all rules of `fkernel.rollout.advantages` are permuted with the rewards), while K and the loss weights stay
fixed. The prompt's mean Ā is the same under all permutations and cannot be tested; the test is about

    D_eu = K_eu c w_u (A_u − Ā)        which is C_eu where advantages are centred on their prompts, as GRPO's and RLOO's
    D_eu(π) = K_eu c w_u (A_π(u) − Ā)
    p = (1 + #{π : T(π) ≥ T}) / (1 + #π)

Statistic T. For one sequence, |D_eu(π)| ≥ |D_eu| means |A_π(u) − Ā| ≥ |A_u − Ā| whatever K is: a per-entry p is
independent of the kernel. And the largest of many entries is large by chance. So a sequence is compared with the
largest of its row,

    T_eu = |D_eu|  against  max_v |D_ev(π)|

so that under the null some p of a row is ≤ α with probability at most α (the single-step maxT of Westfall & Young).
The power for a single sequence is limited by its prompt: p is at least the share of the prompt's completions whose
|A − Ā| is as large as its own, 1/8 or more in a group of eight, and 1 where half of them are right (`least`). More
powerful are tests of whether a prompt's advantages agree with the kernel, and whether all of U's do,

    T_eg = |Σ_{u in g} D_eu|  against  max_h |Σ_{u in h} D_eu(π)|        T_e = |Σ_u D_eu|  against  |Σ_u D_eu(π)|

A prompt with h of k completions right has k!/(h! (k−h)!) arrangements, half as many up to sign where h = k/2. One whose
advantages are all equal has nothing to permute: its p is 1, and other prompts' p do not depend on it.

A sequence whose reward abstained has the advantage 0 whatever the others' rewards are, so it is not exchangeable with
them: it is not permuted, Ā and k are of the others of its prompt, D is 0 in its column and its p is 1. `permutations`
takes a mask of the sequences to permute.

Kernel K. It must not depend on the permutation, but K under the step's own P does: v' = β2 v + (1−β2) g² contains the
actual advantages, so that g is divided by its own size, and permuted gradients by that of another. In a run's first
step the test then has no power: under the null, P(p ≤ ½) is .03 instead of .5. The identity and the frozen P contain no
advantages of this step. For other P, the mean of g² over all permutations replaces g²,

    g_π = −Σ_u w_u A_π(u) ∇S_u − h            h without advantages, such as a penalty's gradient
    E_π g_π² = M² + Σ_g s_g² (Σ_{u in g} (w_u ∇S_u)² − (Σ_{u in g} w_u ∇S_u)²/k_g)

    M = Σ_u w_u Ā ∇S_u + h                    s_g² = Σ_{u in g} (A_u − Ā)²/(k_g − 1)

coordinate by coordinate, g a prompt of k_g completions that may be permuted; any other enters M with its own A
(`permutation_rms`). Advantages enter through Ā and s_g alone, which are the same for all permutations, so p-values are
exact, and there is one K, with an entry for each sequence. Recomputing D for every permutation would be exact too, but
costs a gradient each and has less power: in a run's first step with informative advantages, 25% have p ≤ .05, against
35% with the mean, and none under the step's own P.

Sources: P. Westfall & S. Young, "Resampling-based multiple testing" (1993), §2.3; B. Phipson & G. Smyth, "Permutation
p-values should never be zero" (2010).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.analysis.uncertainty import check_kernel, check_seed, group_sums, places
from fkernel.boundary import public
from fkernel.errors import BatchError
from fkernel.shapes import Tensor, Tree

ROUNDING = 1e-12
"""Tolerance for equal statistics of two permutations, relative to Σ_u |K_eu c w_u| max|A − Ā|."""


class Permutations(NamedTuple):
    """Permutations within prompts, shared by all rows of a kernel.

    Attributes:
        place: [n] int64, the prompt of each sequence, 0 … G−1.
        orders: [draws n] int64, π.
        permuted: [n] bool, which sequences are permuted; None for all.
    """

    place: Tensor
    orders: Tensor
    permuted: Tensor | None = None


class Significance(NamedTuple):
    """p-values of r rows, against advantages without information.

    Attributes:
        sequences: [r n_U], each against the largest sequence of its row.
        prompts: [r G], each against the largest prompt of its row.
        influence: [r], of all of U.
        least: [n_U], lower limit of the expected p in `sequences`, whatever K is.
        informative: [G] bool, whether a prompt's advantages differ; where not, nothing can be tested.
    """

    sequences: Tensor
    prompts: Tensor
    influence: Tensor
    least: Tensor
    informative: Tensor


@public
def permutations(groups: Tensor, draws: int = 1000, seed: int = 0, permuted: Tensor | None = None) -> Permutations:
    """Draw permutations within prompts.

    Args:
        groups: [n] int64, which prompt each sequence belongs to.
        draws: number of permutations.
        seed: of the draws.
        permuted: [n] bool, which sequences may be permuted: not those whose reward abstained. None for all.

    Returns:
        Permutations; draws · n numbers of eight bytes.

    Raises:
        BatchError: no sequences, or no draws; or `permuted` is not a bool for every sequence.

    Example:
        >>> permutations(torch.tensor([7, 3]), draws=2).orders
        tensor([[0, 1],
                [0, 1]])
    """
    check_seed(seed)
    place, G = places(groups, draws)
    cells = _cells(place, G, permuted)
    chance = torch.rand(draws, len(place), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    anyhow = chance.argsort(1)
    shuffled = anyhow.gather(1, cells[anyhow].argsort(dim=1, stable=True))  # by prompt, in random order within each
    orders = torch.empty_like(shuffled)
    orders[:, cells.argsort(stable=True)] = shuffled
    return Permutations(place, orders, permuted)


def _cells(place: Tensor, G: int, permuted: Tensor | None) -> Tensor:
    """Number the exchangeable sets, [n]: a prompt's permuted sequences, and each fixed sequence by itself."""
    if permuted is None:
        return place
    if permuted.shape != place.shape or permuted.dtype != torch.bool:
        raise BatchError(
            f"permuted is {permuted.dtype} of shape {list(permuted.shape)} for {len(place)} sequences; expected [n] "
            f"bool, True for a sequence whose advantage may be exchanged."
        )
    return torch.where(permuted.to(place.device), place, G + torch.arange(len(place), device=place.device))


@public
def significance(K: Tensor, scale: Tensor, advantages: Tensor, draws: Permutations) -> Significance:
    """Compute p-values of sequences and prompts of U, and of influences, against advantages without information.

    D_eu(π) = K_eu · c w_u · (A_π(u) − Ā); the statistics are derived in `fkernel.analysis.permutation_test`

    Args:
        K: [r n_U] some rows of the kernel, nats per unit of c·w·A; under a P that does not depend on the order of
            advantages within prompts: the identity, the frozen one, or one made with `permutation_rms`. Under the
            response to the step's own gradient p is invalid in a run's first steps; this cannot be checked from K.
        scale: [n_U] c·w, the factor of each sequence's advantage; it is not permuted.
        advantages: [n_U] A.
        draws: of U's prompts. For sequences that are not permuted D is 0, and p is 1.

    Returns:
        Significance; p ≥ 1/(draws + 1). A row's numbers do not depend on the other rows; memory is draws · (r + n_U).

    Raises:
        BatchError: shapes disagree.
        NonFiniteError: K, a scale or an advantage is not finite.

    Example:
        >>> prompts = permutations(torch.tensor([0, 0, 1, 1]))
        >>> test = significance(torch.ones(1, 4), torch.ones(4), torch.tensor([1.0, -1.0, 0.5, 0.5]), prompts)
        >>> test.sequences, test.informative
        (tensor([[1., 1., 1., 1.]], dtype=torch.float64), tensor([ True, False]))
    """
    check_kernel(K, draws.place)
    for what, given in (("scale", scale), ("advantages", advantages)):
        if given.shape != draws.place.shape:
            raise BatchError(f"{what} has shape {list(given.shape)} for {len(draws.place)} sequences; expected [n_U].")
        tree.check_finite({what: given}, "significance")
    place = draws.place.to(K.device)
    G = int(place.max()) + 1
    A, informative = _centred(advantages.to(K.device).double(), place, G, draws.permuted)
    factors, shuffled = K.double() * scale.to(K.device).double(), A[draws.orders.to(K.device)]
    largest = factors.new_zeros(len(K), len(shuffled))
    total = torch.zeros_like(largest)
    for g in range(G):
        columns = (place == g).nonzero()[:, 0]
        sums = factors[:, columns] @ shuffled[:, columns].T
        largest, total = torch.maximum(largest, sums.abs()), total + sums
    sizes = factors.abs()
    largest_sequence = torch.stack([(sizes * null).amax(1) for null in shuffled.abs()], 1)
    by_prompt = group_sums(factors * A, place, G)
    slack = ROUNDING * sizes.sum(1, keepdim=True) * A.abs().max()
    return Significance(
        _p(sizes * A.abs(), largest_sequence, slack),
        _p(by_prompt.abs(), largest, slack),
        _p(by_prompt.sum(1, keepdim=True).abs(), total.abs(), slack)[:, 0],
        _least(A, _cells(place, G, draws.permuted)),
        informative,
    )


@public
def permutation_rms(
    weighted_sum: Callable[[Tensor], Tree],
    squared_sum: Callable[[Tensor], Tree],
    weights: Tensor,
    advantages: Tensor,
    groups: Tensor,
    constant: Tree | None = None,
    permuted: Tensor | None = None,
) -> Tree:
    """Compute the root mean square of the loss gradient over all permutations of advantages within prompts.

    √(E_π g_π²),  g_π = −Σ_u w_u A_π(u) ∇S_u − h;  in closed form, derived in `fkernel.analysis.permutation_test`

    It replaces g where P is made for p-values, `fkernel.precond.adamw_response(state, rms)`: the second moment is then
    the same for all permutations.

    Args:
        weighted_sum: [n_U] x ↦ Σ_u x_u ∇S_u, such as `func.weighted_sum` of gradients that are held. Called once, and
            once more for each prompt whose advantages differ, with zeros elsewhere.
        squared_sum: [n_U] x ↦ Σ_u x_u ∇S_u², such as `func.squared_sum`; called once.
        weights: w, [n_U].
        advantages: A, [n_U].
        groups: [n_U] int64, which prompt each sequence belongs to.
        constant: h, {name: [*shape]}; None for none.
        permuted: [n_U] bool, as in `permutations`; the others keep their advantages.

    Returns:
        {name: [*shape]}; times c for a clipped gradient. Differences of squares are bounded below by their rounding.

    Raises:
        BatchError: shapes disagree, or `permuted` is not bool.
        NonFiniteError: a weight or an advantage is not finite.

    Example:
        >>> from fkernel import func
        >>> J = {"w": torch.tensor([[1.0, 2.0], [1.0, 0.0]])}
        >>> sums = (lambda x: func.weighted_sum(J, x)), (lambda x: func.squared_sum(J, x))
        >>> rms = permutation_rms(*sums, torch.ones(2), torch.tensor([1.0, -1.0]), torch.tensor([0, 0]))
        >>> rms["w"].round(decimals=2)  # ± (∇S_0 − ∇S_1), whichever of the two is right
        tensor([0., 2.])

    Source: W. Hoeffding, "A combinatorial central limit theorem" (1951), for the mean square.
    """
    place, G = places(groups, 1)
    for what, given in (("weights", weights), ("advantages", advantages)):
        if given.shape != place.shape:
            raise BatchError(f"{what} has shape {list(given.shape)} for {len(place)} sequences; expected [n_U].")
        tree.check_finite({what: given}, "permutation_rms")
    place, w = places(_cells(place, G, permuted), 1)[0].to(weights.device), weights.double()
    G = int(place.max()) + 1
    A, informative = _centred(advantages.to(w).double(), place, G)
    size = torch.bincount(place, minlength=G)
    variance = group_sums(A.square()[None], place, G)[0] / (size - 1).clamp_min(1)
    mean = weighted_sum((w * (advantages.to(w) - A)).to(weights.dtype))
    squares = squared_sum((w.square() * variance[place]).to(weights.dtype))
    common = {name: torch.zeros_like(leaf) for name, leaf in squares.items()}
    for g in informative.nonzero()[:, 0].tolist():
        shared = weighted_sum(torch.where(place == g, w, 0.0).to(weights.dtype))
        for name, leaf in shared.items():
            common[name].addcmul_(leaf, leaf, value=float(variance[g] / size[g]))
    if constant is not None:
        mean = tree.add(mean, tree.cast(constant, weights.dtype))
    return {name: _root(mean[name], squares.pop(name), common.pop(name), len(place)) for name in [*squares]}


def _root(mean: Tensor, squares: Tensor, common: Tensor, n: int) -> Tensor:
    """√(M² + Σ (wg)² − common), with the difference bounded below by the rounding of n terms."""
    left = torch.maximum(squares - common, n * torch.finfo(squares.dtype).eps * squares)
    return left.addcmul_(mean, mean).sqrt_()


def _p(own: Tensor, null: Tensor, slack: Tensor) -> Tensor:
    """(1 + #{T(π) ≥ T}) / (1 + #π), of T [r k] and T(π) [r draws]; the observed order counts as one permutation."""
    draws = null.shape[1]
    smaller = torch.searchsorted(null.sort(1).values, own - slack)
    return (1 + draws - smaller).double() / (1 + draws)


def _centred(A: Tensor, place: Tensor, G: int, permuted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A − Ā within prompts, exactly 0 where they are equal or not permuted; and whether any differ, [G]."""
    moves = torch.ones_like(place, dtype=torch.bool) if permuted is None else permuted.to(place.device)
    moved, at = A[moves], place[moves]
    low, high = (A.new_zeros(G).scatter_reduce_(0, at, moved, how, include_self=False) for how in ("amin", "amax"))
    mean = group_sums(moved[None], at, G)[0] / torch.bincount(at, minlength=G).clamp_min(1)
    informative = high > low
    return torch.where(informative[place] & moves, A - mean[place], 0.0), informative


def _least(A: Tensor, cells: Tensor) -> Tensor:
    """Share of the |A − Ā| in each sequence's exchangeable set that are at least its own, [n]."""
    size, least = A.abs(), torch.empty_like(A)
    for g in cells.unique():
        sizes = size[cells == g]
        least[cells == g] = (sizes >= (1 - ROUNDING) * sizes[:, None]).double().mean(1)
    return least
