"""Geometry of a kernel: principal components, clusters, alignment with another kernel, correlation with covariates.

A positive semi-definite K_UU holds inner products of features φ_u = P^½ ∇S_u, which are not needed explicitly:

    kernel PCA   H K H = Σ_i λ_i q_i q_iᵀ,  H = I − 11ᵀ/n    scores √λ_i q_i are U S of the centred features' SVD
    clusters     k-means on φ/‖φ‖:  ‖φ_u − μ_c‖² = K_uu − 2 mean_{v in c} K_uv + mean_{v,w in c} K_vw
    alignment    ⟨K̃, L̃⟩_F / (‖K̃‖_F ‖L̃‖_F)                  1 for the same geometry up to scale, 0 for unrelated ones

Spectra, effective ranks and blocks by prompt are in `fkernel.study.diagnostics`.

Sources: B. Schölkopf, A. Smola & K.-R. Müller, "Nonlinear component analysis as a kernel eigenvalue problem" (1998),
eq. 20; I. Dhillon, Y. Guan & B. Kulis, "Kernel k-means" (2004); D. Arthur & S. Vassilvitskii, "k-means++" (2007); L.
Song et al., "Feature selection via dependence maximization" (2012), eq. 4, and G. Székely & M. Rizzo, "Partial distance
correlation with methods for dissimilarities" (2014), def. 2, for K̃; S. Kornblith et al., "Similarity of neural network
representations revisited" (2019), who call the alignment CKA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.engine import mean_ranks, pearson, varies
from fkernel.errors import BatchError, NonFiniteError, listing
from fkernel.shapes import Tensor

ROUNDING = 1e-10
"""Relative size below which a variance or a distance counts as zero."""
MOST_ROUNDS = 100


class KernelPCA(NamedTuple):
    """Principal components of the centred kernel, largest first.

    Attributes:
        scores: [n c] float64, coordinates of each sequence, √ of K's units; signs are chosen such that
            each component's largest score is positive.
        shares: [c] share of the centred kernel's trace that each component explains.
    """

    scores: Tensor
    shares: Tensor


class Clusters(NamedTuple):
    """Clusters of sequences with similar gradient directions; the largest cluster is 0.

    Attributes:
        labels: [n] int64, 0 … k−1.
        exemplars: [k] int64, the member with the largest mean cosine to its cluster.
        within: share of the scatter about the mean that is within clusters, in [0, 1].
    """

    labels: Tensor
    exemplars: Tensor
    within: float


class Correlation(NamedTuple):
    """Correlation of a covariate with an influence, in [−1, 1] each; None where either is constant.

    Attributes:
        pearson: of the values.
        spearman: of their ranks, with mean ranks for ties.
        partial: of both residuals after regression on the given covariate; None also where a residual is zero, as of
            that covariate itself, or none is given.
    """

    pearson: float | None
    spearman: float | None
    partial: float | None


@public
def kernel_pca(K: Tensor, components: int = 2) -> KernelPCA:
    """Compute principal components of the centred kernel.

    H K H = Σ_i λ_i q_i q_iᵀ;  scores √λ_i q_i,  shares λ_i / Σ_j λ_j

    Args:
        K: [n n] symmetric, positive semi-definite.
        components: c, 1 … n.

    Returns:
        KernelPCA; negative eigenvalues, due to rounding, count as zero.

    Raises:
        BatchError: K is not square, or components out of range.
        NonFiniteError: K holds NaN or infinity.

    Example:
        >>> pca = kernel_pca(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 1)
        >>> pca.scores.abs()[:, 0], pca.shares
        (tensor([1., 1.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    centred = _centred(_square(K, "K"))
    if not 1 <= components <= len(K):
        raise BatchError(f"components is {components}; a kernel of {len(K)} sequences has 1 to {len(K)}.")
    try:
        values, vectors = torch.linalg.eigh(centred)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise BatchError(
            f"K, whose largest entry is {float(K.abs().max()):.3g}, has no spectrum in float64 ({error})."
        ) from error
    values, vectors = values.flip(0).clamp_min(0)[:components], vectors.flip(1)[:, :components]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    trace = centred.diagonal().sum().clamp_min(0)
    shares = torch.where(trace > 0, values / trace, 0.0)
    return KernelPCA(vectors * largest.sign() * values.sqrt(), shares)


@public
def clusters(K: Tensor, k: int, seed: int = 0, restarts: int = 10) -> Clusters:
    """Cluster sequences by gradient direction: kernel k-means on cosines.

    min over labels of Σ_u ‖φ_u/‖φ_u‖ − μ_c(u)‖², from seeds drawn with chances ∝ the squared distance to those before

    Args:
        K: [n n] symmetric, positive semi-definite. A sequence without gradient has cosine 0 with all.
        k: number of clusters, 1 … n; none is empty.
        seed: of the random initialisation.
        restarts: number of runs, of which the tightest is returned.

    Returns:
        Clusters, largest first (ties: by their first sequence).

    Raises:
        BatchError: K is not square, or k or restarts out of range.
        NonFiniteError: K holds NaN or infinity.

    Example:
        >>> J = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
        >>> clusters(J @ J.T, 2).labels
        tensor([0, 0, 1])
    """
    K = _square(K, "K")
    n = len(K)
    if not 1 <= k <= n or restarts < 1:
        raise BatchError(
            f"k is {k} and restarts {restarts}; {n} sequences have 1 to {n} clusters, from 1 start or more."
        )
    norms = K.diagonal().clamp_min(0).sqrt()
    cosine = torch.where(norms[:, None] * norms > 0, K / (norms[:, None] * norms), 0.0)
    stream = torch.Generator().manual_seed(seed)
    labels, left = min((_settled(cosine, _seeded(cosine, k, stream), k) for _ in range(restarts)), key=lambda t: t[1])
    first = [int((labels == c).nonzero()[0]) for c in range(k)]
    order = sorted(range(k), key=lambda c: (-int((labels == c).sum()), first[c]))
    labels = torch.tensor(order, device=K.device).argsort()[labels]
    members = torch.nn.functional.one_hot(labels, k).to(cosine)
    mean = (cosine @ members / members.sum(0)).masked_fill(members == 0, -torch.inf)
    scatter = float(_centred(cosine).diagonal().sum())
    return Clusters(labels, mean.argmax(0), min(1.0, left / scatter) if scatter > ROUNDING * n else 0.0)


@public
def alignment(K1: Tensor, K2: Tensor) -> float | None:
    """Compute the centred kernel alignment of two kernels of the same sequences, without bias.

    ⟨K̃1, K̃2⟩_F / (‖K̃1‖_F ‖K̃2‖_F),   K̃_uv = K_uv − (r_u + r_v)/(n−2) + s/((n−1)(n−2)) where u ≠ v, and 0 where u = v

    with r_u = Σ_{v≠u} K_uv and s = Σ_u r_u. The diagonal is left out: with many more parameters than sequences it
    dominates H K H, and would make unrelated kernels look similar. ⟨K̃1, K̃2⟩_F / (n(n−3)) is the unbiased estimator of
    HSIC, whose mean is 0 where the features are independent.

    Args:
        K1: [n n] symmetric, positive semi-definite.
        K2: [n n], of the same sequences in the same order.

    Returns:
        A number in [−1, 1], 1 for kernels that differ by scale alone, and about 0 for those of unrelated features; None
        for fewer than four sequences, and where a K̃ is zero: inner products that are all equal have no geometry.

    Raises:
        BatchError: a kernel is not square, or they differ in size.
        NonFiniteError: a kernel holds NaN or infinity.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
        >>> alignment(x @ x.T, 2 * x @ x.T)
        1.0
    """
    one, two = _square(K1, "K1"), _square(K2, "K2")
    if one.shape != two.shape:
        raise BatchError(f"K1 is of {len(one)} sequences, K2 of {len(two)}; expected the same sequences in both.")
    if len(one) < 4:
        return None
    x, y = _centred_apart(one), _centred_apart(two)
    if any(after.norm() <= ROUNDING * before.norm() for before, after in ((one, x), (two, y))):
        return None
    return min(1.0, max(-1.0, float((x / x.norm() * (y / y.norm())).sum())))


@public
def correlations(
    values: Tensor, covariates: Mapping[str, Tensor], given: str | None = "length"
) -> dict[str, Correlation]:
    """Correlate an influence with covariates, also after regression on one of them.

    r_xy,  and with z given  (r_xy − r_xz r_yz) / √((1 − r_xz²)(1 − r_yz²)), computed from residuals

    Args:
        values: [n] one number a sequence, such as its influence or the size of its contributions.
        covariates: {name: [n]} such as its length, entropy, reward, log-probability.
        given: the covariate to regress on; None for none.

    Returns:
        {name: Correlation}; Pearson of two sequences and partial of three are always ±1.

    Raises:
        BatchError: lengths differ, or `given` is not among the covariates.
        NonFiniteError: a value or covariate is NaN or infinite; it names the sequence. Leave out such sequences first.

    Example:
        >>> length = correlations(torch.tensor([1.0, 2.0, 4.0]), {"length": torch.tensor([8.0, 4.0, 2.0])})["length"]
        >>> length.spearman, length.partial is None
        (-1.0, True)
    """
    if given is not None and given not in covariates:
        raise BatchError(f"given is {given!r}, which is no covariate; there is {listing([*covariates])}.")
    y = _numbers(values, "values", len(values))
    columns = {name: _numbers(x, name, len(values)) for name, x in covariates.items()}
    z = None if given is None else columns[given]
    return {
        name: Correlation(
            _correlation(x, y),
            _correlation(mean_ranks(x), mean_ranks(y)),
            None if z is None else _correlation(_residual(x, z), _residual(y, z)),
        )
        for name, x in columns.items()
    }


def _square(K: Tensor, name: str) -> Tensor:
    """Return K in float64, exactly symmetric."""
    tree.check_tensors({name: K}, "kernel")
    if K.is_meta:
        raise BatchError(f"{name} lies on the meta device and holds no values.")
    if K.ndim != 2 or K.shape[0] != K.shape[1] or not len(K):
        raise BatchError(f"{name} has shape {list(K.shape)}; expected the kernel of a batch with itself, [n n].")
    bad = (~torch.isfinite(K)).any(1).nonzero()
    if len(bad):
        raise NonFiniteError(f"Row {{row}} of {name} holds a value that is not finite.", row=int(bad[0]))
    return (K.double() + K.double().T) / 2


def _centred(K: Tensor) -> Tensor:
    """H K H."""
    return K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()


def _centred_apart(K: Tensor) -> Tensor:
    """K̃, centred without its diagonal: rows and columns sum to 0."""
    n = len(K)
    off = K - torch.diag(K.diagonal())
    rows = off.sum(1) / (n - 2)
    centred = off - rows - rows[:, None] + rows.sum() / (n - 1)
    return centred - torch.diag(centred.diagonal())


def _seeded(K: Tensor, k: int, stream: torch.Generator) -> Tensor:
    """Labels [n] of the nearest of k seeds, drawn as in k-means++; no cluster is empty."""
    diagonal, seeds = K.diagonal(), []
    nearest = torch.ones_like(diagonal)
    distances = diagonal.new_empty(k, len(diagonal))
    for c in range(k):
        if not bool(nearest.sum() > ROUNDING):  # fewer distinct points than clusters: any other sequence
            nearest = torch.ones_like(diagonal)
            nearest[seeds] = 0.0
        seed = int(torch.multinomial(nearest.cpu(), 1, generator=stream))
        seeds.append(seed)
        distances[c] = (diagonal - 2 * K[seed] + diagonal[seed]).clamp_min(0)
        nearest = distances[: c + 1].amin(0)
        nearest[seeds] = 0.0
    labels = distances.argmin(0)
    labels[seeds] = torch.arange(k, device=K.device)  # a seed has its own label, even where points coincide
    return labels


def _settled(K: Tensor, labels: Tensor, k: int) -> tuple[Tensor, float]:
    """Iterate to labels that no reassignment improves; return them and Σ_u ‖φ_u − μ_c(u)‖²."""
    for _ in range(MOST_ROUNDS):
        distances = _distances(K, labels, k)
        new = distances.argmin(1)
        # Ties keep their label, so that rounding cannot make labels oscillate.
        distance = distances.gather(1, labels[:, None])[:, 0]
        new = torch.where(distances.amin(1) < distance - ROUNDING, new, labels)
        for empty in [c for c in range(k) if not bool((new == c).any())]:
            alone = torch.bincount(new, minlength=k)[new] == 1
            new[distances.gather(1, new[:, None])[:, 0].masked_fill(alone, -torch.inf).argmax()] = empty
        if bool((new == labels).all()):
            break
        labels = new
    return labels, float(_distances(K, labels, k).gather(1, labels[:, None]).sum())


def _distances(K: Tensor, labels: Tensor, k: int) -> Tensor:
    """‖φ_u − μ_c‖², [n k]."""
    members = torch.nn.functional.one_hot(labels, k).to(K)
    members = members / members.sum(0)
    to_mean = K @ members
    return (K.diagonal()[:, None] - 2 * to_mean + (members * to_mean).sum(0)).clamp_min(0)


def _numbers(x: Tensor, name: str, n: int) -> Tensor:
    if x.shape != (n,):
        raise BatchError(f"{name!r} has shape {list(x.shape)} for {n} sequences; expected one number each.")
    bad = (~torch.isfinite(x)).nonzero()
    if len(bad):
        raise NonFiniteError(f"{name!r} is not finite at sequence {{row}}.", row=int(bad[0]))
    return x.double()


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """r_xy, or None where either is constant: JSON has no NaN."""
    r = pearson(x, y)
    return None if r != r else r


def _residual(x: Tensor, z: Tensor) -> Tensor:
    """Residual of x after linear regression on z, with mean 0; exactly 0 where it is rounding."""
    a, c = x - x.mean(), z - z.mean()
    if not varies(z):
        return a
    c = c / c.norm()
    left = a - (a @ c) * c
    return torch.where(left.norm() > ROUNDING * a.norm(), left, 0.0)
