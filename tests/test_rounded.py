"""Gradients stored in half the bytes: every entry stays within the bound that comes with it, and the bound means it."""

from functools import partial

import pytest
import torch

import fkernel as fk
from fkernel import func, precond
from fkernel.engine import low_precision
from fkernel.engine.low_precision import low_precision_kernel, narrowed, shard_norms
from fkernel.func.handles.forms import Factored, SparseRows, Sum, materialize_into, nbytes, tensors
from tests.cases import EXAMPLES, Case

HALVES = (torch.bfloat16, torch.float16)
RAGGED = Case("own", 3, ((1, 1), (6, 8), (3, 2), (2, 9), (1, 4)), ((7, 1), (1, 2), (4, 8)), 1.0, 2)
CASES = [*EXAMPLES, RAGGED]
each_case = pytest.mark.parametrize("case", CASES, ids=["own", "gpt2", "ragged"])
each_P = pytest.mark.parametrize("kind", ["identity", "positive", "indefinite"])


def diagonal_of(case, kind):
    d = case.tree(21)
    return {name: leaf.abs() + 0.1 for name, leaf in d.items()} if kind == "positive" else d


def preconditioner(case, kind):
    return precond.identity() if kind == "identity" else precond.diagonal(diagonal_of(case, kind))


def swapped(case):
    """(S, params, E, U) with E smaller, then with U smaller: either side is held once."""
    S, params, E, U = case.engine(fk)
    return [(S, params, E, U), (S, params, U, E)]


@each_case
@each_P
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("microbatch", [1, 2, None])
def test_every_entry_stays_within_its_bound(case, kind, dtype, microbatch):
    P = preconditioner(case, kind)
    for S, params, E, U in swapped(case):
        K = fk.kernel(S, params, E, U, P)
        found = low_precision_kernel(S, params, E, U, P, dtype=dtype, microbatch=microbatch)
        assert found.values.shape == found.bound.shape == K.shape
        assert found.values.dtype == found.bound.dtype == K.dtype
        assert found.dtype == dtype
        error = (found.values - K).abs()
        assert (error <= found.bound + 1e-13 * K.abs().max()).all()
        assert (error > 0).all()


@each_case
@each_P
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_the_bound_is_near_what_happens(case, kind, dtype):
    """The largest bound was 2 to 19 times the largest error, in every combination; a thousandth of it is violated."""
    P = preconditioner(case, kind)
    for S, params, E, U in swapped(case):
        found = low_precision_kernel(S, params, E, U, P, dtype=dtype)
        error = (found.values - fk.kernel(S, params, E, U, P)).abs()
        assert found.bound.max() <= 100 * error.max()
        assert (error > 1e-3 * found.bound).any()


@each_case
def test_wider_storage_has_a_smaller_bound_and_the_own_dtype_none(case):
    S, params, E, U = case.engine(fk)
    P = preconditioner(case, "indefinite")
    make = partial(low_precision_kernel, S, params, E, U, P)
    bounds = [make(dtype=dtype).bound for dtype in (*HALVES, torch.float32, torch.float64)]
    for wide, narrow in zip(bounds[1:], bounds, strict=False):
        assert (wide < narrow).all()
    assert (bounds[-1] == 0).all()
    torch.testing.assert_close(make(dtype=torch.float64).values, fk.kernel(S, params, E, U, P), rtol=1e-10, atol=1e-12)


@each_case
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters_stay_within_the_bound_and_their_own_rounding(case, dtype):
    S, params, E, U = case.engine(fk)
    d = diagonal_of(case, "positive")
    exact = fk.kernel(S, params, E, U, precond.diagonal(d))
    P32 = precond.diagonal(fk.tree.cast(d, torch.float32))
    found = low_precision_kernel(S, fk.tree.cast(params, torch.float32), E, U, P32, dtype=dtype)
    assert found.values.dtype == found.bound.dtype == torch.float32
    assert ((found.values - exact).abs() <= found.bound + 1e-5 * exact.abs().max()).all()


@each_case
def test_more_shards_never_loosen_the_bound(case, monkeypatch):
    S, params, E, U = case.engine(fk)
    make = partial(low_precision_kernel, S, params, E, U, preconditioner(case, "indefinite"))
    many = make()
    monkeypatch.setattr(low_precision, "SHARDS", 1)
    assert (many.bound <= make().bound * (1 + 1e-9)).all()
    assert many.bound.sum() < 0.9 * make().bound.sum()


@each_case
@pytest.mark.parametrize("shards", [1, 5, 256])
@pytest.mark.parametrize("columns", [1, 24, 1 << 17])
def test_norms_do_not_depend_on_tiles_or_on_the_form_of_a_gradient(case, shards, columns, monkeypatch):
    S, params, _, U = case.engine(fk)
    D = diagonal_of(case, "indefinite")
    monkeypatch.setattr(low_precision, "SHARDS", shards)
    monkeypatch.setattr(low_precision, "tile_columns", lambda n, itemsize: columns)
    J, dense = func.per_sequence_handles(S)(params, U), func.per_sequence_grad(S)(params, U)
    small = narrowed(J, torch.bfloat16)
    found, difference = shard_norms(J, D), shard_norms(J, D, less=small)
    torch.testing.assert_close(found, shard_norms(dense, D), rtol=1e-9, atol=1e-12)
    squares = sum((leaf.square() * D[name].abs()).flatten(1).sum(1) for name, leaf in dense.items())
    torch.testing.assert_close(found.square().sum(1), squares)
    written = {name: torch.empty_like(leaf) for name, leaf in dense.items()}
    for name, out in written.items():
        materialize_into(small[name], out)
    expected = shard_norms({name: leaf - written[name] for name, leaf in dense.items()}, D)
    torch.testing.assert_close(difference, expected, rtol=1e-8, atol=1e-12)


def test_every_form_of_a_gradient_and_every_shape_of_a_parameter_is_measured():
    """A lookup, a tied table, a convolution, a vector and a scalar, against the difference written out."""

    def f(p, ids):
        x = torch.nn.functional.embedding(ids, p["table"]) + torch.nn.functional.embedding(ids, p["tied"])
        x = x + torch.nn.functional.conv1d(x.mT, p["kernel"], padding=1).mT
        return (torch.nn.functional.linear(x, p["tied"]).sin().sum((1, 2)) + (x @ p["vector"]).sum(1)) * p["scalar"]

    shapes = {"table": (300, 4), "tied": (300, 4), "kernel": (4, 4, 3), "vector": (4,), "scalar": (), "unused": (3, 2)}
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    P = precond.diagonal({name: torch.randn_like(leaf) for name, leaf in params.items()})
    E, U = torch.randint(300, (3, 6)), torch.randint(300, (5, 6))
    kinds = {name: type(handle) for name, handle in func.per_sequence_handles(f)(params, E).items()}
    assert kinds["table"] is SparseRows
    K = fk.kernel(f, params, E, U, P)
    for dtype in HALVES:
        found = low_precision_kernel(f, params, E, U, P, dtype=dtype, microbatch=2)
        error = (found.values - K).abs()
        assert (error <= found.bound).all()
        assert found.bound.max() <= 300 * error.max()


def test_what_is_held_takes_half_the_bytes_of_float32():
    S, params, E, _ = RAGGED.engine(fk)
    J = func.per_sequence_handles(S)(fk.tree.cast(params, torch.float32), E)
    for dtype in HALVES:
        small = narrowed(J, dtype)
        for name, handle in small.items():
            for wide, narrow in zip(tensors(J[name]), tensors(handle), strict=True):
                assert narrow.dtype == (dtype if wide.is_floating_point() else wide.dtype)
        ids = sum(leaf.nbytes for each in J.values() for leaf in tensors(each) if not leaf.is_floating_point())
        assert nbytes(small) - ids == (nbytes(J) - ids) / 2


def test_what_handles_share_is_rounded_once_and_what_takes_no_storage_takes_none():
    inputs, left, right = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    rows = SparseRows(torch.tensor([[0], [1]]), torch.randn(2, 1, 4), 5)
    unused = torch.zeros(()).expand(2, 100)
    J = {
        "q": Factored(inputs, left),
        "k": Factored(inputs[:], right),
        "tied": Sum((Factored(inputs, left), rows)),
        "unused": unused,
    }
    small = narrowed(J, torch.bfloat16)
    assert nbytes(small) == (nbytes(J) + rows.ids.nbytes) / 2
    assert len({tensors(small[name])[0].data_ptr() for name in ("q", "k", "tied")}) == 1
    (leaf,) = tensors(small["unused"])
    assert (leaf.shape, leaf.stride()) == ((2, 100), (0, 0))
    own = narrowed(J, torch.float32)
    assert all(mine is theirs for n in J for mine, theirs in zip(tensors(own[n]), tensors(J[n]), strict=True))


def test_small_gradients_that_float16_rounds_to_zero_are_in_the_bound():
    x = torch.full((1, 2), 1e-9, dtype=torch.float64)
    found = low_precision_kernel(_linear, _W, x, x / x, precond.identity(), dtype=torch.float16)
    assert float(found.values) == 0
    assert 2e-9 <= float(found.bound) <= 2.1e-9


# ---------------------------------------------------------------------------------------------------------- bad input

_W = {"w": torch.zeros(2, dtype=torch.float64)}


def _linear(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (torch.float16, 1e5, "overflows torch.float16: .* 1e.05, .* ends at 6.55e.04. Store it in torch.bfloat16"),
        (torch.bfloat16, 1e39, "overflows torch.bfloat16: .* Store it in torch.float64"),
    ],
    ids=["float16", "bfloat16"],
)
@pytest.mark.parametrize("side", ["E", "U"])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_an_overflow_names_the_sequence_and_the_parameter(dtype, size, message, side, microbatch):
    held, streamed = torch.ones(3, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    held[2, 1] = size
    E, U = (held, streamed) if side == "E" else (streamed, held)
    with pytest.raises(fk.NonFiniteError, match=f"In {side}, row 2 of the whole batch: .* 'w' {message}") as caught:
        low_precision_kernel(_linear, _W, E, U, precond.identity(), dtype=dtype, microbatch=microbatch)
    assert (caught.value.row, caught.value.parameter) == (2, "w")
    low_precision_kernel(_linear, _W, streamed, held, precond.identity(), dtype=torch.float64)


def test_an_overflow_in_a_ragged_batch_names_the_callers_row():
    """The shortest sequence stands first with the caller and last with the engine."""
    E = func.pad([[1], [2, 2, 2], [3, 3]], [[7], [4, 4, 4], [5, 5]])

    def f(params, batch):
        return params["w"].sum() * 1e5 ** (batch.input_ids == 7).any(1).double()

    with pytest.raises(fk.NonFiniteError, match="In E, row 0"):
        low_precision_kernel(f, _W, E, E, precond.identity(), dtype=torch.float16, microbatch=1)


def test_only_a_diagonal_is_supported():
    x = torch.eye(2, dtype=torch.float64)
    with pytest.raises(fk.FKernelError, match=r"is a function; .* diagonal only, .* or use fkernel\.kernel"):
        low_precision_kernel(_linear, _W, x, x, lambda tree: tree)
    with pytest.raises(fk.TreeError, match="params has 'w', which the preconditioner lacks"):
        low_precision_kernel(_linear, _W, x, x, precond.diagonal({"v": torch.ones(2)}))
    with pytest.raises(fk.TreeError, match=r"params\['w'\] has shape \[2\]; the preconditioner's has \[3\]"):
        low_precision_kernel(_linear, _W, x, x, precond.diagonal({"w": torch.ones(3)}))


@pytest.mark.parametrize(
    ("params_dtype", "dtype"),
    [(torch.float64, torch.int8), (torch.float64, torch.complex64), (torch.float32, torch.float64)],
    ids=str,
)
def test_only_dtypes_that_hold_a_gradient_and_no_wider_than_it_are_supported(params_dtype, dtype):
    x = torch.eye(2, dtype=params_dtype)
    with pytest.raises(fk.TreeError, match=f"dtype is {dtype}; gradients of {params_dtype} parameters"):
        low_precision_kernel(_linear, fk.tree.cast(_W, params_dtype), x, x, precond.identity(), dtype=dtype)


def test_other_bad_input_is_told_as_kernel_tells_it():
    x = torch.eye(2, dtype=torch.float64)
    with pytest.raises(fk.BatchError, match="microbatch is 0"):
        low_precision_kernel(_linear, _W, x, x, precond.identity(), microbatch=0)
    with pytest.raises(fk.BatchError, match="In U"):
        low_precision_kernel(_linear, _W, x, x[:0], precond.identity())
    with pytest.raises(fk.NonFiniteError, match="In U, row 1"):
        low_precision_kernel(_linear, _W, x, torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]).double(), precond.identity())
