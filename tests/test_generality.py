"""The engine does not know language models, a preconditioner is any callable, and memory changes no value."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import fkernel as fk
from fkernel import func, precond

DTYPE = torch.float64
Tree = dict[str, torch.Tensor]


class Regression(NamedTuple):
    """A batch of the tests' own: nested, and with leaves of several ranks and dtypes."""

    data: dict[str, torch.Tensor]
    labels: torch.Tensor


def linear(params: Tree, batch: Regression) -> torch.Tensor:
    """Half a squared error; its gradient is (wᵀx + b − y)·(x, 1)."""
    return 0.5 * (batch.data["x"] @ params["w"] + params["b"] - batch.data["y"]) ** 2


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 5)
        self.out = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(x).tanh())


MODULE = Perceptron().double()


def perceptron(params: Tree, batch: Regression) -> torch.Tensor:
    """The log-probability of a label under a small network."""
    logits = functional_call(MODULE, params, (batch.data["x"],))
    return logits.log_softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)


def regression(n: int, seed: int = 0) -> Regression:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=DTYPE, generator=source)
    y = torch.randn(n, dtype=DTYPE, generator=source)
    return Regression({"x": x, "y": y}, torch.randint(4, (n,), generator=source))


def bag(params: Tree, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A language model without attention, which sees the sum of all tokens so far."""
    return params["table"][ids].cumsum(1) @ params["head"]


def tokens(n: int, seed: int = 0) -> func.Sequences:
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (n, 6), generator=source)
    lengths = 3 + torch.arange(n) % 4
    attention = torch.arange(6) < lengths[:, None]
    return func.Sequences(ids, attention, attention & (torch.arange(6) >= 1 + torch.arange(n)[:, None] % 2))


def summed_entropy(params: Tree, batch: func.Sequences) -> torch.Tensor:
    return func.token_entropy(bag, temperature=0.7)(params, batch).sum(1)


def parameters(kind: str) -> Tree:
    source = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "linear": {"w": (3,), "b": ()},
        "perceptron": {name: tuple(leaf.shape) for name, leaf in MODULE.named_parameters()},
        "entropy": {"table": (7, 4), "head": (4, 7)},
    }[kind]
    return {name: torch.randn(shape, dtype=DTYPE, generator=source) for name, shape in shapes.items()}


Problem = tuple[Callable[..., torch.Tensor], Tree, Callable[..., Any]]


@pytest.fixture(params=["linear", "perceptron", "entropy"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """f, params, and how to draw a batch of n."""
    f = {"linear": linear, "perceptron": perceptron, "entropy": summed_entropy}[request.param]
    return f, parameters(request.param), tokens if request.param == "entropy" else regression


def flat(rows: Tree) -> torch.Tensor:
    """Lay {name: [n, *shape]} out as [n, p]."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in rows.values()], 1)


def one_by_one(batch: Any, n: int) -> Iterator[Any]:
    for row in range(n):
        yield pytree.tree_map(lambda x, row=row: x[row : row + 1] if isinstance(x, torch.Tensor) else x, batch)


def looped_gradients(f: Callable[..., torch.Tensor], params: Tree, batch: Any, n: int) -> torch.Tensor:
    """The oracle: plain autograd, a sequence at a time, as a matrix [n, p]."""
    rows = []
    for single in one_by_one(batch, n):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        grads = torch.autograd.grad(f(leaves, single).sum(), list(leaves.values()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def random_like(params: Tree, seed: int = 2) -> Tree:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(leaf.shape, dtype=DTYPE, generator=source) for name, leaf in params.items()}


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- any f


@pytest.mark.parametrize("microbatch", [None, 1, 2, 5, 9])
def test_the_gradients_of_any_f_equal_a_loop_of_plain_autograd(problem, microbatch):
    f, params, draw = problem
    close(flat(func.per_sequence_grad(f, microbatch)(params, draw(5))), looped_gradients(f, params, draw(5), 5))


@pytest.mark.parametrize("microbatch", [None, 2])
def test_vjp_and_jvp_of_any_f_are_products_with_j(problem, microbatch):
    f, params, draw = problem
    J, v = looped_gradients(f, params, draw(5), 5), random_like(params)
    w = torch.linspace(-1, 2, 5, dtype=DTYPE)
    pulled = func.vjp(f, microbatch)(params, draw(5), w)
    close(torch.cat([leaf.reshape(-1) for leaf in pulled.values()]), w @ J)
    close(func.jvp(f, microbatch)(params, draw(5), v), J @ torch.cat([leaf.reshape(-1) for leaf in v.values()]))


def test_the_curvature_of_any_f_is_the_second_derivative_along_the_direction(problem):
    f, params, draw = problem
    v, h = random_like(params), 1e-5
    up, down = (func.jvp(f)(fk.tree.axpy(s * h, v, params), draw(4), v) for s in (1, -1))
    torch.testing.assert_close(func.curvature(f, 3)(params, draw(4), v), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)


def test_the_linear_model_has_the_gradient_and_curvature_that_paper_gives_it():
    params, batch, v = parameters("linear"), regression(4), random_like(parameters("linear"))
    x, y = batch.data["x"], batch.data["y"]
    residual = x @ params["w"] + params["b"] - y
    J = func.per_sequence_grad(linear)(params, batch)
    close(J["w"], residual[:, None] * x)
    close(J["b"], residual)
    close(func.curvature(linear)(params, batch, v), (x @ v["w"] + v["b"]) ** 2)


def test_jvp_of_a_quantity_per_token_keeps_its_shape_and_sums_to_the_sequence_s():
    params, batch, v = parameters("entropy"), tokens(5), random_like(parameters("entropy"))
    per_token = func.jvp(func.token_logprobs(bag), 2)(params, batch, v)
    assert per_token.shape == (5, 6)
    assert bool((per_token[~batch.response_mask] == 0).all())
    close(per_token.sum(1), func.jvp(func.sequence_logprob(bag))(params, batch, v))


def test_curvature_of_a_quantity_per_token_keeps_its_shape_too():
    params, batch, v = parameters("entropy"), tokens(5), random_like(parameters("entropy"))
    per_token = func.curvature(func.token_logprobs(bag), 2)(params, batch, v)
    assert per_token.shape == (5, 6)
    close(per_token.sum(1), func.curvature(func.sequence_logprob(bag))(params, batch, v))


@pytest.mark.parametrize("compute", ["per_sequence_grad", "vjp", "jvp", "curvature", "kernel", "influence"])
def test_a_batch_may_carry_what_is_no_tensor_under_every_transform(compute):
    """Ids or a scale travel with the rows; a microbatch takes them along."""
    p, batch, w = parameters("linear"), regression(3), torch.ones(3, dtype=DTYPE)
    P = precond.identity()
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "per_sequence_grad": lambda f, b: func.per_sequence_grad(f, 2)(p, b)["w"],
        "vjp": lambda f, b: func.vjp(f, 2)(p, b, w)["w"],
        "jvp": lambda f, b: func.jvp(f, 2)(p, b, p),
        "curvature": lambda f, b: func.curvature(f, 2)(p, b, p),
        "kernel": lambda f, b: fk.kernel(f, p, b, b, P, microbatch=2),
        "influence": lambda f, b: fk.influence(f, p, b, b, P, w, microbatch=2),
    }
    carried = {"rows": batch, "scale": 1.0, "name": "not a tensor"}
    given = calls[compute](lambda params, b: b["scale"] * linear(params, b["rows"]), carried)
    close(given, calls[compute](linear, batch))


def test_a_batch_is_left_as_it_was_and_so_are_the_parameters(problem):
    f, params, draw = problem
    batch, before = draw(4), {name: leaf.clone() for name, leaf in params.items()}
    fk.kernel(f, params, batch, batch, precond.identity(), microbatch=3)
    fk.explain_step(f, params, batch, batch, torch.ones(4, dtype=DTYPE), precond.adamw_init(params, lr=0.1))
    leaves = zip(*(pytree.tree_leaves(b) for b in (batch, draw(4))), strict=True)
    assert all(torch.equal(x, y) for x, y in leaves if isinstance(x, torch.Tensor))
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert not any(leaf.requires_grad for leaf in params.values())


def test_gradients_are_the_same_under_no_grad_and_carry_no_graph(problem):
    f, params, draw = problem
    outside = func.per_sequence_grad(f)(params, draw(3))
    with torch.no_grad():
        inside = func.per_sequence_grad(f)(params, draw(3))
    assert all(torch.equal(outside[name], inside[name]) for name in outside)
    assert not any(leaf.requires_grad for leaf in outside.values())
    assert not func.jvp(f)(params, draw(3), random_like(params)).requires_grad


# ----------------------------------------------------------------------------------------------- any preconditioner


def dense(P: torch.Tensor) -> Callable[[Tree], Tree]:
    """A preconditioner that mixes all coordinates of the two leaves w [3] and b [], written without the library."""

    def apply(x: Tree) -> Tree:
        leading = x["b"].shape
        image = torch.cat([x["w"].reshape(-1, 3), x["b"].reshape(-1, 1)], 1) @ P.T
        return {"w": image[:, :3].reshape(*leading, 3), "b": image[:, 3].reshape(leading)}

    return apply


@pytest.mark.parametrize(("n_E", "n_U"), [(2, 5), (5, 2), (3, 3)])
def test_a_dense_matrix_as_preconditioner_gives_j_p_jt(n_E, n_U):
    params = parameters("linear")
    half = torch.randn(4, 4, dtype=DTYPE)
    P = half @ half.T
    E, U = regression(n_E, seed=3), regression(n_U, seed=4)
    J_E, J_U = (looped_gradients(linear, params, *side) for side in ((E, n_E), (U, n_U)))
    w = torch.randn(n_U, dtype=DTYPE)
    close(fk.kernel(linear, params, E, U, dense(P)), J_E @ P @ J_U.T)
    close(fk.influence(linear, params, E, U, dense(P), w), J_E @ P @ J_U.T @ w)


def test_a_matrix_that_is_not_symmetric_acts_on_the_gradients_of_u():
    params, E, U = parameters("linear"), regression(2, seed=3), regression(4, seed=4)
    P = torch.randn(4, 4, dtype=DTYPE)
    expected = looped_gradients(linear, params, E, 2) @ P @ looped_gradients(linear, params, U, 4).T
    close(fk.kernel(linear, params, E, U, dense(P)), expected)
    close(fk.kernel(linear, params, U, E, dense(P.T)), expected.T)


def test_a_lambda_is_a_preconditioner(problem):
    f, params, draw = problem
    double = fk.kernel(f, params, draw(3), draw(4), lambda x: {name: 2 * leaf for name, leaf in x.items()})
    close(double, 2 * fk.kernel(f, params, draw(3), draw(4), precond.identity()))


def test_a_module_is_a_preconditioner(problem):
    class Halve(nn.Module):
        def forward(self, x: Tree) -> Tree:
            return {name: 0.5 * leaf for name, leaf in x.items()}

    f, params, draw = problem
    w = torch.ones(4, dtype=DTYPE)
    half = fk.influence(f, params, draw(3), draw(4), Halve(), w)
    close(half, 0.5 * fk.influence(f, params, draw(3), draw(4), precond.identity(), w))


def test_diagonal_select_and_chain_compose(problem):
    f, params, draw = problem
    d = {name: 1 + leaf.abs() for name, leaf in random_like(params).items()}
    first = next(iter(params))
    P = precond.chain(precond.diagonal(d), precond.select([first]), lambda x: {n: 3 * leaf for n, leaf in x.items()})
    weights = torch.cat([3 * (name == first) * d[name].reshape(-1) for name in params])
    J_E, J_U = (looped_gradients(f, params, draw(n), n) for n in (3, 4))
    close(fk.kernel(f, params, draw(3), draw(4), P), J_E * weights @ J_U.T)
    ones = torch.ones(4, dtype=DTYPE)
    close(fk.influence(f, params, draw(3), draw(4), P, ones), J_E @ (weights * J_U).T @ ones)


def test_selections_of_all_parameters_add_up_to_the_identity(problem):
    f, params, draw = problem
    parts = [fk.kernel(f, params, draw(3), draw(4), precond.select([name])) for name in params]
    close(torch.stack(parts).sum(0), fk.kernel(f, params, draw(3), draw(4), precond.identity()))


def test_an_empty_chain_is_the_identity_and_a_chain_of_one_is_that_one():
    x = {"w": torch.randn(2, 3), "b": torch.randn(2)}
    assert all(torch.equal(precond.chain()(x)[name], x[name]) for name in x)
    d = precond.diagonal({"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(4.0)})
    assert all(torch.equal(precond.chain(d)(x)[name], d(x)[name]) for name in x)


@pytest.mark.parametrize(
    "make",
    [
        lambda p, g: precond.diagonal(g),
        lambda p, g: precond.adamw_response(precond.adamw_init(p, lr=0.1), g),
        lambda p, g: precond.chain(precond.diagonal(g), precond.diagonal(g)),
    ],
    ids=["diagonal", "adamw_response", "chain"],
)
def test_a_preconditioner_takes_one_vector_and_rows_alike(make):
    params = parameters("perceptron")
    P = make(params, random_like(params))
    vectors = [random_like(params, seed) for seed in (5, 6, 7)]
    rows = P({name: torch.stack([v[name] for v in vectors]) for name in params})
    for row, v in enumerate(vectors):
        assert all(torch.equal(rows[name][row], P(v)[name]) for name in params)


# ----------------------------------------------------------------------------------------------- memory and direction


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
@pytest.mark.parametrize(("n_E", "n_U"), [(5, 7), (7, 5)])
def test_a_kernel_in_several_tiles_equals_the_kernel_in_one(problem, n_E, n_U, tile):
    f, params, draw = problem
    E, U = draw(n_E, seed=1), draw(n_U, seed=2)
    P = precond.diagonal(random_like(params))
    whole = fk.kernel(f, params, E, U, P)
    tiles = fk.Strategy("sequences", "E", tile, 2, 2)
    tiled = fk.kernel(f, params, E, U, P, strategy=tiles, microbatch=2)
    assert tiled.shape == whole.shape == (n_E, n_U)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


def test_a_small_tile_really_makes_several():
    """A tile streams the other side anew, so a call of f sees more rows in all."""
    seen = []

    def counting(params: Tree, batch: Regression) -> torch.Tensor:
        seen.append(1)
        return linear(params, batch)

    def calls(tile: int | None) -> int:
        seen.clear()
        strategy = fk.Strategy("sequences", "E", tile, 1, 1)
        fk.kernel(counting, params, regression(4), regression(6), precond.identity(), strategy=strategy)
        return len(seen)

    params = parameters("linear")
    calls(None)  # finds counting's layers, and certifies it
    assert calls(None) == 4 + 6
    assert calls(4) == 4 + 6
    assert calls(2) == 4 + 2 * 6
    assert calls(1) == 4 + 4 * 6


@pytest.mark.parametrize("memory", [8000, "8000", "8000B", "7.8125KiB", "8 kB"])
def test_memory_may_be_given_in_words(memory):
    params, P = parameters("linear"), precond.identity()
    bare = fk.kernel(linear, params, regression(3), regression(4), P)
    close(fk.kernel(linear, params, regression(3), regression(4), P, microbatch=1, memory=memory), bare)


def test_a_single_number_may_be_the_first_parameter():
    """The dtype of results is read off the first, which needs no dimension for that."""
    w, b, weights = torch.randn(3, dtype=DTYPE), torch.tensor(0.4, dtype=DTYPE), torch.tensor([1.0, -2.0], dtype=DTYPE)
    E, U, P = regression(3), regression(2, seed=1), precond.identity()

    def found(θ: Tree) -> list[torch.Tensor]:
        effect, _ = fk.explain_step(linear, θ, E, U, weights, precond.adamw_init(θ, lr=0.1))
        kernels = [fk.kernel(linear, θ, E, U, P, memory=memory) for memory in (None, "4MB")]
        assert fk.estimate(linear, θ, E, U, P, memory="1GB").chosen is not None
        return [*kernels, fk.influence(linear, θ, E, U, P, weights), effect.contributions, effect.momentum]

    for first, last in zip(found({"b": b, "w": w}), found({"w": w, "b": b}), strict=True):
        close(first, last)


@pytest.mark.parametrize(("n_E", "n_U"), [(2, 6), (6, 2), (4, 4)])
def test_whichever_side_is_held_the_kernel_is_the_same(problem, n_E, n_U):
    f, params, draw = problem
    E, U = draw(n_E, seed=1), draw(n_U, seed=2)
    d = {name: leaf.abs() for name, leaf in random_like(params).items()}
    scale = torch.cat([leaf.reshape(-1) for leaf in d.values()])
    K = fk.kernel(f, params, E, U, precond.diagonal(d))
    assert K.is_contiguous()
    close(K, looped_gradients(f, params, E, n_E) * scale @ looped_gradients(f, params, U, n_U).T)
    close(K, fk.kernel(f, params, U, E, precond.diagonal(d)).T)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 8])
def test_the_microbatch_changes_no_value_of_kernel_or_influence(problem, microbatch):
    f, params, draw = problem
    E, U, w = draw(4, seed=1), draw(5, seed=2), torch.linspace(-1, 1, 5, dtype=DTYPE)
    P = precond.diagonal(random_like(params))
    K = fk.kernel(f, params, E, U, P)
    close(fk.kernel(f, params, E, U, P, microbatch=microbatch), K)
    close(fk.influence(f, params, E, U, P, w, microbatch=microbatch), K @ w)


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize(
    "compute",
    [
        lambda f, p, E, U, w: func.per_sequence_grad(f, 2)(p, U),
        lambda f, p, E, U, w: func.vjp(f, 2)(p, U, w),
        lambda f, p, E, U, w: {"Jv": func.jvp(f, 2)(p, U, p)},
        lambda f, p, E, U, w: {"vHv": func.curvature(f, 2)(p, U, p)},
        lambda f, p, E, U, w: {"K": fk.kernel(f, p, E, U, precond.identity(), memory="8MB", microbatch=2)},
        lambda f, p, E, U, w: {"KA": fk.influence(f, p, E, U, precond.identity(), w, microbatch=2)},
        lambda f, p, E, U, w: {
            "C": fk.explain_step(f, p, E, U, w, precond.adamw_init(p, lr=0.1), max_norm=1.0)[0].contributions
        },
    ],
    ids=["per_sequence_grad", "vjp", "jvp", "curvature", "kernel", "influence", "explain_step"],
)
def test_the_same_call_twice_gives_the_same_bits_and_draws_nothing(problem, compute):
    f, params, draw = problem
    E, U, w = draw(3, seed=1), draw(5, seed=2), torch.linspace(-1, 1, 5, dtype=DTYPE)
    state = torch.get_rng_state()
    first = compute(f, params, E, U, w)
    torch.manual_seed(99)
    second = compute(f, params, E, U, w)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.set_rng_state(state)
    compute(f, params, E, U, w)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds CPU kernels with a C++ compiler")
def test_the_jitted_contraction_is_the_eager_one():
    x, y = ({"v": torch.randn(n, 3), "w": torch.randn(n, 70_000)} for n in (3, 2))
    torch.testing.assert_close(func.contract(x, y, jit=True), func.contract(x, y, jit=False))
