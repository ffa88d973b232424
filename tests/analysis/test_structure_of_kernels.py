"""A kernel's geometry, against that of features that have it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import fkernel as fk
from fkernel import func
from fkernel.analysis.structure import _settled, alignment, clusters, correlations, kernel_pca
from tests.cases import EXAMPLES
from tests.laws import close, flat, rows

DTYPE = torch.float64


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(7)


def normal(draw, *shape):
    return torch.randn(*shape, generator=draw, dtype=DTYPE)


# --------------------------------------------------------------------------------------------------- directions


def of_features(phi, components):
    """Scores and shares of the centred features' singular values."""
    U, s, _ = torch.linalg.svd(phi - phi.mean(0), full_matrices=False)
    return (U * s)[:, :components], (s.square() / s.square().sum())[:components]


def same_up_to_sign(found, expected):
    signs = (found * expected).sum(0).sign()
    close(found * signs, expected)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_principal_components_are_those_of_the_gradients(case):
    S, params, _, U = case.engine(fk)
    P = {name: leaf.abs() + 0.1 for name, leaf in case.tree(41).items()}
    K = fk.kernel(S, params, U, U, fk.precond.diagonal(P))
    scores, shares = of_features(rows(func.per_sequence_grad(S)(params, U)) * flat(P).sqrt(), 2)
    found = kernel_pca(K, 2)
    same_up_to_sign(found.scores, scores)
    close(found.shares, shares)


def test_principal_components_of_features(draw):
    phi = normal(draw, 9, 5) + 3
    found = kernel_pca(phi @ phi.T, 9)
    scores, shares = of_features(phi, 5)
    same_up_to_sign(found.scores[:, :5], scores)
    close(found.shares[:5], shares)
    close(kernel_pca(phi @ phi.T, 2).shares, shares[:2])
    assert found.scores[:, 5:].abs().max() < 1e-6  # √ of an eigenvalue that is rounding
    assert found.shares.sum() == pytest.approx(1)
    assert bool((found.scores.gather(0, found.scores.abs().argmax(0, keepdim=True))[:, :5] > 0).all())
    assert kernel_pca(torch.ones(3, 3), 1).shares.tolist() == [0.0]
    for components in (0, 10):
        with pytest.raises(fk.BatchError, match=f"components is {components}; a kernel of 9 sequences has 1 to 9"):
            kernel_pca(phi @ phi.T, components)


# ----------------------------------------------------------------------------------------------------- clusters


def planted(draw, sizes=(9, 6, 4)):
    """Directions that are far apart, lengths that are anything: K and the labels."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.linalg.qr(normal(draw, 12, len(sizes))).Q.T
    phi = centres[labels] + 0.1 * normal(draw, len(labels), 12)
    phi = phi * torch.rand(len(labels), 1, generator=draw, dtype=DTYPE).mul(5).exp()
    return phi @ phi.T, labels


def test_planted_clusters_are_recovered(draw):
    K, labels = planted(draw)
    found = clusters(K, 3)
    assert torch.equal(found.labels, labels)
    phi = torch.linalg.cholesky(K + 1e-13 * K.diagonal().max() * torch.eye(len(K)))  # any features with this kernel
    phi = phi / phi.norm(dim=1, keepdim=True)
    means = torch.stack([phi[labels == c].mean(0) for c in range(3)])
    within = (phi - means[labels]).square().sum() / (phi - phi.mean(0)).square().sum()
    assert found.within == pytest.approx(float(within), rel=1e-6)
    for c, exemplar in enumerate(found.exemplars.tolist()):
        own = (labels == c).nonzero()[:, 0]
        assert exemplar == own[(phi[own] @ phi[own].T).mean(1).argmax()]


def test_clusters_do_not_depend_on_the_order(draw):
    K, _ = planted(draw)
    order = torch.randperm(len(K), generator=draw)
    found, shuffled = clusters(K, 3), clusters(K[order][:, order], 3, seed=5)
    assert torch.equal(shuffled.labels, found.labels[order])
    assert torch.equal(order[shuffled.exemplars], found.exemplars)
    assert shuffled.within == pytest.approx(found.within, rel=1e-10)


def test_clusters_are_as_tight_as_any(draw):
    """Of eight sequences all ways to make two clusters can be tried."""
    for _ in range(5):
        phi = normal(draw, 8, 3)
        found = clusters(phi @ phi.T, 2)
        phi = phi / phi.norm(dim=1, keepdim=True)
        scatter = (phi - phi.mean(0)).square().sum()

        def within(labels, phi=phi):
            parts = [phi[torch.tensor(labels) == c] for c in (0, 1)]
            return sum(float((part - part.mean(0)).square().sum()) for part in parts)

        best = min(within(labels) for labels in itertools.product((0, 1), repeat=8) if 0 < sum(labels) < 8)
        assert found.within == pytest.approx(best / float(scatter), rel=1e-9)
        assert within(found.labels.tolist()) == pytest.approx(best, rel=1e-9)


def test_clusters_ignore_lengths_and_are_the_same_again(draw):
    phi = normal(draw, 20, 4)
    scale = torch.rand(20, 1, generator=draw, dtype=DTYPE) + 0.1
    found, again, scaled = (clusters(x @ x.T, 4, seed=3) for x in (phi, phi, phi * scale))
    assert torch.equal(found.labels, again.labels)
    assert torch.equal(found.labels, scaled.labels)
    assert found.within == again.within
    sizes = torch.bincount(found.labels, minlength=4)
    assert bool((sizes[:-1] >= sizes[1:]).all())


@pytest.mark.parametrize("k", [1, 3, 6])
def test_no_cluster_is_empty(k):
    """Of six sequences in two places, one of them without gradient."""
    phi = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 0]], dtype=DTYPE)
    found = clusters(phi @ phi.T, k)
    assert sorted(set(found.labels.tolist())) == list(range(k))
    assert found.labels[found.exemplars].tolist() == list(range(k))
    assert found.within == pytest.approx({1: 1.0, 3: 0.0, 6: 0.0}[k], abs=1e-12)


def test_a_cluster_whose_members_all_leave_is_filled_again():
    """−10 and 10 share a mean of 0, and each is nearer to another cluster's: whoever is farthest from its own comes."""
    x = torch.tensor([-10.0, 10.0, -9.0, 9.0, 8.0], dtype=DTYPE)[:, None]
    labels, left = _settled(x @ x.T, torch.tensor([0, 0, 1, 2, 2]), 3)
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert left == pytest.approx(0.5 + 0.5)


def test_kernels_that_are_none_are_refused():
    with pytest.raises(fk.BatchError, match=r"K has shape \[2, 3\]; expected the kernel of a batch with itself"):
        kernel_pca(torch.ones(2, 3))
    with pytest.raises(fk.BatchError, match="k is 4 and restarts 10; 3 sequences have 1 to 3 clusters"):
        clusters(torch.eye(3), 4)
    with pytest.raises(fk.BatchError, match="restarts 0"):
        clusters(torch.eye(3), 2, restarts=0)
    with pytest.raises(fk.NonFiniteError, match="Row 1 of K2 holds"):
        alignment(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, math.nan]]))
    with pytest.raises(fk.BatchError, match="K1 is of 2 sequences, K2 of 3"):
        alignment(torch.eye(2), torch.eye(3))


# ---------------------------------------------------------------------------------------------------- alignment


def hsic(K, L):
    """The unbiased estimator as a mean over all quadruples of different sequences."""
    quadruples = [*itertools.permutations(range(len(K)), 4)]
    terms = [K[i, j] * L[i, j] + K[i, j] * L[q, r] - 2 * K[i, j] * L[i, q] for i, j, q, r in quadruples]
    return torch.stack(terms).mean()


def test_alignment_is_its_definition(draw):
    for _ in range(3):
        x, y = normal(draw, 6, 4) + 2, normal(draw, 6, 3)
        K, L = x @ x.T, y @ y.T
        expected = hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()
        assert alignment(K, L) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("n", "features"), [(8, 10), (8, 5000), (32, 5000)])
def test_unrelated_features_are_not_aligned(draw, n, features):
    """A mean of 0 over 100 pairs, within four standard errors; the diagonal would make it .99 of many features."""
    found = []
    for _ in range(100):
        x, y = normal(draw, n, features), normal(draw, n, features)
        found.append(alignment(x @ x.T, y @ y.T))
    values = torch.tensor(found)
    assert abs(float(values.mean())) < 4 * float(values.std()) / 10
    x = normal(draw, n, features)
    assert alignment(x @ x.T, x @ x.T) == pytest.approx(1, rel=1e-12)


def test_alignment_ignores_scale_rotation_and_shift(draw):
    x, y = normal(draw, 8, 5), normal(draw, 8, 5)
    Q, value = torch.linalg.qr(normal(draw, 5, 5)).Q, alignment(x @ x.T, y @ y.T)
    for other in (3 * x, x @ Q, x + normal(draw, 5)):
        assert alignment(other @ other.T, y @ y.T) == pytest.approx(value, rel=1e-9)
        assert alignment(x @ x.T, other @ other.T) == pytest.approx(1, rel=1e-12)
    assert value is not None
    assert -1 < value < 0.9


def test_alignment_of_what_has_no_geometry(draw):
    x = normal(draw, 5, 3)
    K, level = x @ x.T, normal(draw, 5)
    for constant in (torch.ones(5, 5), torch.eye(5), level + level[:, None]):
        assert alignment(constant, K) is None
        assert alignment(K, constant) is None
    for few in (1, 2, 3):  # of fewer than four sequences nothing is left
        assert alignment(K[:few, :few], K[:few, :few]) is None
    assert alignment(K[:4, :4], K[:4, :4]) == pytest.approx(1)
    turned = torch.tensor([[0.0, 1, -1, 0], [1, 0, 0, -1], [-1, 0, 0, 1], [0, -1, 1, 0]])
    assert alignment(turned, -turned) == pytest.approx(-1)


# ------------------------------------------------------------------------------------------------- correlations


def test_correlations_are_those_of_scipy(draw):
    y = normal(draw, 30)
    columns = {
        "length": torch.randint(3, 9, (30,), generator=draw),
        "reward": (normal(draw, 30) + y > 0).double(),
        "entropy": (y + normal(draw, 30)).float(),
    }
    found = correlations(y, columns)
    for name, x in columns.items():
        assert found[name].pearson == pytest.approx(stats.pearsonr(x.numpy(), y.numpy())[0], rel=1e-6)
        assert found[name].spearman == pytest.approx(stats.spearmanr(x.numpy(), y.numpy())[0], rel=1e-10)


def test_the_partial_correlation_is_the_textbooks(draw):
    z = normal(draw, 25)
    x, y = z + normal(draw, 25), 2 * z + normal(draw, 25)
    found = correlations(y, {"length": z, "x": x})["x"]
    r_xy, r_xz, r_yz = (float(np.corrcoef(a, b)[0, 1]) for a, b in ((x, y), (x, z), (y, z)))
    expected = (r_xy - r_xz * r_yz) / math.sqrt((1 - r_xz**2) * (1 - r_yz**2))
    assert found.partial == pytest.approx(expected, rel=1e-10)
    assert correlations(y, {"x": x}, given=None)["x"].partial is None


def test_a_pure_effect_of_length_vanishes_when_length_is_taken_out(draw):
    """What reward and influence do beside their length is made orthogonal, so that nothing but length links them."""
    length = torch.randint(5, 200, (40,), generator=draw).double()
    basis = torch.linalg.qr(torch.stack([torch.ones(40, dtype=DTYPE), length, normal(draw, 40), normal(draw, 40)], 1)).Q
    influence, reward = 0.5 * length + 20 * basis[:, 2], 3.0 - 0.1 * length + 5 * basis[:, 3]
    found = correlations(influence, {"length": length, "reward": reward})
    assert found["reward"].pearson is not None
    assert found["reward"].pearson < -0.9
    assert found["reward"].partial == pytest.approx(0, abs=1e-10)
    assert found["length"].partial is None
    assert correlations(0.5 * length, {"length": length, "reward": reward})["reward"].partial is None


def test_what_is_constant_correlates_with_nothing(draw):
    y = normal(draw, 12)
    found = correlations(y, {"length": torch.full((12,), 0.1), "x": y + 1})
    assert found["length"] == (None, None, None)
    assert found["x"].partial == pytest.approx(1)  # a length that is the same for all explains nothing
    assert correlations(torch.full((12,), 1e9), {"length": y})["length"] == (None, None, None)


def test_correlations_refuse_what_they_cannot_read():
    y = torch.arange(3.0)
    with pytest.raises(fk.BatchError, match="given is 'length', which is no covariate; there is 'x'"):
        correlations(y, {"x": y})
    with pytest.raises(fk.BatchError, match=r"'length' has shape \[2\] for 3 sequences"):
        correlations(y, {"length": y[1:]})
    with pytest.raises(fk.NonFiniteError, match="'length' is not finite at sequence 1"):
        correlations(y, {"length": torch.tensor([1.0, math.nan, 2.0])})
