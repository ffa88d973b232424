"""One plain pass gives the gradients that vmap over a reverse pass gives, and nothing beside its uses is dropped."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fkernel as fk
from fkernel import func
from fkernel.func.handles.forms import materialize_into, nbytes
from fkernel.func.taps.listening import tap
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.taps.rows import gradient_rows, make_plan, plan_of
from tests.cases import EXAMPLES

NOTHING = GradientPlan()
DTYPE = torch.float64


class Cube(torch.autograd.Function):
    """An operation of its own, which a function mode may not look into."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


def linear(p, x):
    return F.linear(x, p["w"], p["b"]).tanh().sum((1, 2))


def beside(p, x):
    return linear(p, x) + (p["w"] ** 2).sum() * x.sum((1, 2))


def transposed(p, x):
    return linear(p, x) + (x @ p["w"].T).sum((1, 2)) + (x @ p["w"].T).sin().sum((1, 2))


def custom(p, x):
    return linear(p, x) + (x @ Cube.apply(p["w"]).T).sum((1, 2))


def twice(p, x):
    return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["w"]).sum((1, 2))


def conv1d(p, x):
    flat = x.reshape(-1, x.shape[-1])
    return torch.addmm(p["b"], flat, p["w"]).tanh().reshape(x.shape).sum((1, 2))


def scaled(p, x):
    flat = x.reshape(-1, x.shape[-1])
    return torch.addmm(p["b"], flat, p["w"], alpha=2.0).tanh().reshape(x.shape).sum((1, 2))


def detached(p, x):
    return F.linear(x, p["w"], p["b"]).tanh().sum((1, 2)) * p["w"].detach().sum()


def unused(p, x):
    return (x + p["b"]).tanh().sum((1, 2))


def norm(p, x):
    return F.layer_norm(F.linear(x, p["w"]), (4,), p["b"]).tanh().sum((1, 2))


FUNCTIONS = {
    linear: True,
    beside: False,
    transposed: True,
    custom: False,
    twice: True,
    conv1d: True,
    scaled: False,
    detached: True,
    unused: True,
    norm: True,
}
"""Whether one plain pass does."""


@pytest.fixture
def params():
    return {"w": torch.randn(4, 4, dtype=DTYPE), "b": torch.randn(4, dtype=DTYPE)}


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_one_pass_equals_vmap(f, params, microbatch):
    x = torch.randn(5, 3, 4, dtype=DTYPE)
    plan = plan_of(f, params, x)
    assert plan.batched == FUNCTIONS[f]
    captured = gradient_rows(f, microbatch, plan)(params, x)
    dense = gradient_rows(f, microbatch, NOTHING)(params, x)
    for name in params:
        torch.testing.assert_close(captured[name], dense[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "is_known"),
    [({}, True), ({"padding_idx": 1}, False), ({"scale_grad_by_freq": False}, True), ({"sparse": False}, True)],
)
def test_lookups_are_listened_to_where_nothing_changes_their_gradient(options, is_known):
    table = {"w": torch.randn(7, 3, dtype=DTYPE)}
    ids = torch.tensor([[1, 2, 2], [6, 1, 0]])

    def f(p, ids):
        return F.embedding(ids, p["w"], **options).sin().sum((1, 2))

    plan = plan_of(f, table, ids)
    assert plan.batched == is_known
    captured, dense = (gradient_rows(f, None, p)(table, ids)["w"] for p in (plan, NOTHING))
    torch.testing.assert_close(captured, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_a_language_model_takes_one_pass(case):
    S, params, _, U = case.engine(fk)
    plan = plan_of(S, params, U)
    assert plan.batched
    captured = gradient_rows(S, 2, plan)(params, U)
    dense = gradient_rows(S, 2, NOTHING)(params, U)
    for name in params:
        torch.testing.assert_close(captured[name], dense[name], rtol=1e-11, atol=1e-13)


def test_layers_may_differ_between_shapes(params):
    def f(p, x):
        return linear(p, x) if x.shape[1] < 4 else beside(p, x)

    gradient = func.per_sequence_grad(f)
    for t in (3, 5):
        x = torch.randn(2, t, 4, dtype=DTYPE)
        dense = gradient_rows(f, None, NOTHING)(params, x)
        torch.testing.assert_close(gradient(params, x)["w"], dense["w"])


def test_a_use_that_the_plan_did_not_foresee_is_an_error(params):
    x = torch.randn(2, 3, 4, dtype=DTYPE)
    plan = plan_of(linear, params, x)
    with pytest.raises(fk.ModelError, match=r"'w' is used by .*detach.* in one sequence and not in another"):
        gradient_rows(detached, None, plan)(params, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_factor_is_found(params, value):
    x = torch.randn(4, 3, 4, dtype=DTYPE)
    x[2, 1, 0] = value

    def f(p, x):  # values stay finite, the input that the gradient is made of does not
        return F.linear(x, p["w"]).nan_to_num(0.0, 0.0, 0.0).sum((1, 2)) + p["b"].sum()

    with pytest.raises(fk.NonFiniteError, match="sequence 2 with respect to 'w'") as caught:
        func.per_sequence_grad(f, 2)(params, x)
    assert caught.value.row == 2


def test_a_product_that_overflows_is_found():
    """Value and factors are finite, a = 1e30 and δ = 1e20; their product is not."""

    def f(p, x):
        return (F.linear(x, p["w"]) * 1e20).sum((1, 2))

    x = torch.tensor([[[1.0]], [[1e30]]])
    with pytest.raises(fk.NonFiniteError, match="sequence 1 with respect to 'w'"):
        func.per_sequence_grad(f)({"w": torch.full((1, 1), 1e-25)}, x)


def test_nothing_outlives_the_call(params):
    """With the collector off: a graph that holds its own watcher would keep every activation of every call."""
    kept: list[weakref.ref[tap]] = []
    init = tap.__init__

    def watched(self, *args, **kwargs):
        kept.append(weakref.ref(self))
        init(self, *args, **kwargs)

    x = torch.randn(4, 3, 4, dtype=DTYPE)
    gc.collect()
    gc.disable()
    try:
        tap.__init__ = watched
        func.per_sequence_grad(linear, 2)(params, x)
        assert len(kept) == 5  # the plan by 2 and 3 copies, a pair to certify it, two microbatches
        assert all(ref() is None for ref in kept)
    finally:
        tap.__init__ = init
        gc.enable()


def test_a_plan_is_made_of_names_alone(params):
    plan = make_plan(detached, params, torch.randn(1, 3, 4, dtype=DTYPE))
    assert plan.batched
    assert {name for name, _ in plan.loose} == {"w"}


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_handles_contract_as_dense_gradients_do(case, diagonal, microbatch):
    """In any mix: handles with handles, handles with dense rows."""
    S, params, E, U = case.engine(fk)
    D = {name: leaf.abs() + 0.1 for name, leaf in case.tree(21).items()} if diagonal else None
    x, y = (func.per_sequence_handles(S, microbatch)(params, batch) for batch in (E, U))
    dense_x, dense_y = (gradient_rows(S, microbatch, NOTHING)(params, batch) for batch in (E, U))
    weighted = dense_y if D is None else {name: D[name] * leaf for name, leaf in dense_y.items()}
    expected = func.contract(dense_x, weighted)
    for left, right in ((x, y), (x, dense_y), (dense_x, y), (dense_x, dense_y)):
        torch.testing.assert_close(func.contract(left, right, diagonal=D), expected, rtol=1e-10, atol=1e-12)


def test_an_untied_table_contracts_over_the_rows_that_were_touched():
    table = {"w": torch.randn(500, 3, dtype=DTYPE)}

    def f(p, ids):
        return F.embedding(ids, p["w"]).sin().sum((1, 2))

    ids = torch.randint(500, (6, 4))
    ids[:, 0] = 7  # some row that all share
    x = func.per_sequence_handles(f, 4)(table, ids)
    assert isinstance(x["w"], func.SparseRows)
    D = {"w": torch.rand(500, 3, dtype=DTYPE)}
    dense = gradient_rows(f, None, NOTHING)(table, ids)
    expected = func.contract(dense, {"w": D["w"] * dense["w"]})
    torch.testing.assert_close(func.contract(x, x, diagonal=D), expected, rtol=1e-12, atol=1e-12)


def test_a_handle_is_formed_in_ranges(params):
    params = {"w": torch.randn(40, 40, dtype=DTYPE), "b": torch.randn(40, dtype=DTYPE)}
    x = torch.randn(3, 2, 40, dtype=DTYPE)
    J = func.per_sequence_handles(linear, 2)(params, x)
    assert isinstance(J["w"], func.Concat)
    dense = gradient_rows(linear, None, NOTHING)(params, x)["w"]
    for start, r in ((0, 40), (0, 7), (33, 7)):
        out = torch.full((3, r, 40), torch.nan, dtype=DTYPE)
        materialize_into(J["w"], out, start)
        torch.testing.assert_close(out, dense[:, start : start + r])
    assert nbytes({"w": J["w"]}) == 8 * 3 * 2 * (40 + 40)
