"""What a diagonal rests on, against sorting; squares of held gradients, against dense ones."""

from __future__ import annotations

import importlib
import math
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.analysis.trace_shares import Health, Share, health
from fkernel.func.handles import reductions
from fkernel.func.handles.forms import at, shape_of
from fkernel.func.handles.reductions import squared_sum
from fkernel.func.handles.shards import tiles
from tests.cases import EXAMPLES
from tests.laws import close, close_trees, flat

DTYPE = torch.float64


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(5)


def one(v, eps=1e-8, step=3, beta2=0.9):
    """The state of one parameter with that second moment."""
    v = torch.as_tensor(v)
    state = precond.adamw_init({"w": v}, lr=0.1, betas=(0.9, beta2), eps=eps)
    return precond.AdamWState({"w": step}, state.exp_avg, {"w": v}, *(getattr(state, f) for f in REST))


REST = ("lr", "beta1", "beta2", "eps", "weight_decay")


def quietly(*args, **options) -> Health:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.PreconditionerWarning)
        return health(*args, **options)


# ---------------------------------------------------------------------------------------------- sums of squares


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_squares_are_those_of_dense_gradients(case, microbatch, weighted):
    S, params, _, U = case.engine(fk)
    w = case.weights if weighted else None
    J = func.per_sequence_grad(S)(params, U)
    ones = torch.ones(len(case.U), dtype=DTYPE) if w is None else w
    expected = {name: torch.tensordot(ones, leaf.square(), 1) for name, leaf in J.items()}
    close_trees(squared_sum(J, w), expected, 1e-12)
    close_trees(squared_sum(func.per_sequence_handles(S, microbatch)(params, U), w), expected, 1e-12)


def test_squares_of_every_form_of_handle(draw, monkeypatch):
    """Models this small are written out; factors, rows, sums and stacks are made here, and cut into several tiles."""
    for name in ("TILE_COLUMNS", "LEAST_COLUMNS"):
        monkeypatch.setattr(importlib.import_module("fkernel.func.handles.shards"), name, 10)
    sizes = []

    def watched(handle, step, dtype):
        sizes.append(step * math.prod(shape_of(handle)[1:]))
        return tiles(handle, step, dtype)

    monkeypatch.setattr(reductions, "tiles", watched)
    a, delta, moves = (torch.randn(3, 4, k, generator=draw, dtype=DTYPE) for k in (5, 7, 5))
    ids = torch.randint(7, (3, 4), generator=draw)
    dense = torch.randn(3, 7, 5, generator=draw, dtype=DTYPE)
    product, table = torch.einsum("nto,nti->noi", delta, a), torch.zeros_like(dense)
    for n, t in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        table[n, ids[n, t]] += moves[n, t]
    factored, rows = func.Factored(a, delta), func.SparseRows(ids, moves, 7)
    tied, first, others = func.Sum((factored, rows)), slice(0, 1), slice(1, 3)
    whole = {
        "dense": (dense, dense),
        "half": (dense.bfloat16(), dense.bfloat16().double()),
        "scalar": (dense[:, 0, 0], dense[:, 0, 0]),
        "factored": (factored, product),
        "rows": (rows, table),
        "sum": (tied, product + table),
        "stack": (
            func.Concat((at(tied, first), at(factored, others))),
            torch.cat([(product + table)[:1], product[1:]]),
        ),
        "stack of rows": (func.Concat((at(rows, slice(0, 2)), dense[2:])), torch.cat([table[:2], dense[2:]])),
    }
    w = torch.randn(3, generator=draw, dtype=DTYPE)
    found = squared_sum({name: handle for name, (handle, _) in whole.items()}, w)
    close_trees(found, {name: torch.tensordot(w, J.square(), 1) for name, (_, J) in whole.items()}, 1e-12)
    assert max(sizes) <= 10


def test_squares_add_up_to_the_diagonal_of_the_kernel(case):
    S, params, _, U = case.engine(fk)
    D = {name: leaf.abs() for name, leaf in case.tree(31).items()}
    handles = func.per_sequence_handles(S)(params, U)
    trace = func.contract(handles, handles, diagonal=D).trace()
    close(flat(D) @ flat(squared_sum(handles)), trace)


def test_squares_refuse_what_they_cannot_add():
    J = {"w": torch.ones(2, 3), "b": torch.ones(2, 1)}
    with pytest.raises(fk.BatchError, match=r"weights has shape \[3\]; the batch holds 2"):
        squared_sum(J, torch.ones(3))
    with pytest.raises(fk.NonFiniteError, match="sequence 1 with respect to 'b' is not finite"):
        squared_sum({**J, "b": torch.tensor([[0.0], [math.nan]])})
    with pytest.raises(fk.NonFiniteError, match="gradient of 'w' is not finite, or its square overflows"):
        squared_sum({"w": torch.full((2, 3), 1e30)})
    assert squared_sum({"w": torch.full((2, 3), 1e3).half()})["w"].dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- health


def test_shares_are_those_of_sorting(case):
    S, params, _, U = case.engine(fk)
    state, handles = case.state(fk), func.per_sequence_handles(S)(params, U)
    P = {name: leaf.square() for name, leaf in case.tree(33).items()}
    squared = squared_sum(handles)
    found = quietly(state, P, squared, smallest=0.1)
    v, carried = flat(state.exp_avg_sq), flat(P) * flat(squared)
    k = int(0.1 * len(v))
    trace = func.contract(handles, handles, diagonal=P).trace()
    assert found.coordinates == len(v)
    assert found.smallest.coordinates == k / len(v)
    assert found.smallest.trace == pytest.approx(float(carried[v.argsort()[:k]].sum() / trace), rel=1e-10)
    assert sum(found.by_parameter.values()) == pytest.approx(1, rel=1e-12)
    for name, share in found.by_parameter.items():
        assert share == pytest.approx(float((P[name] * squared[name]).sum() / trace), rel=1e-10)


@pytest.mark.parametrize("smallest", [1e-9, 0.01, 0.3, 0.49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_are_found_over_all_magnitudes(draw, dtype, smallest):
    """Denormals, both zeros, and many equal ones, in more shards than one."""
    v = torch.randn(150_000, generator=draw).mul(12).exp2().mul(1e-38).to(dtype)
    v[:3], v[3:5] = -0.0, 0.0
    carried = torch.rand(len(v), generator=draw)
    found = quietly(one(v), {"w": torch.ones(len(v))}, {"w": carried}, smallest)
    k = max(1, int(smallest * len(v)))
    threshold = v.double().sort().values[k - 1]
    under, ties = (carried[v.double() < threshold].double(), carried[v.double() == threshold].double())
    expected = under.sum() + ties.mean() * (k - len(under))
    assert found.smallest.trace == pytest.approx(float(expected / carried.double().sum()), rel=1e-10)


def test_equal_second_moments_share_what_they_carry():
    found = health(one([1.0] * 8), {"w": torch.ones(8)}, {"w": torch.tensor([8.0] + [0.0] * 7)}, smallest=0.25)
    assert found.smallest == Share(0.25, 0.25)
    assert not found.dominated


def test_below_epsilon_is_by_the_corrected_second_moment():
    # v̂ = v / (1 − 0.9³): √v̂ is 1.92 √v
    state = one([0.0, 0.4**2, 0.6**2, 4.0], eps=1.0)
    found = quietly(state, {"w": torch.ones(4)}, {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert found.unseen == Share(0.25, 0.1)
    assert found.below_eps == pytest.approx((0.5, 0.3))


def test_before_the_first_step_there_is_no_second_moment_to_judge_by():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = health(one(torch.zeros(4), step=0), {"w": torch.ones(4)}, {"w": torch.ones(4)}, smallest=0.25)
    assert found.below_eps is None
    assert (found.unseen, found.smallest, found.dominated) == (Share(1.0, 1.0), Share(0.25, 0.25), False)
    assert quietly(one(torch.zeros(4), step=1), {"w": torch.ones(4)}, {"w": torch.ones(4)}).dominated


def test_a_dominated_kernel_is_said_in_numbers():
    v = torch.ones(200)
    v[:2] = 1e-20
    P = {"w": 1 / v.sqrt()}
    with pytest.warns(fk.PreconditionerWarning, match=r"Of 200 coordinates, the 1\.0% .* carry 100% .*'w' has 100%"):
        assert health(one(v), P, {"w": torch.ones(200)}).dominated
    v[:2] = 0
    with pytest.warns(fk.PreconditionerWarning, match=r"the 1\.0% that never received a gradient carry 100%"):
        assert health(one(v), {"w": 1 / (v.sqrt() + 1e-8)}, {"w": torch.ones(200)}, smallest=0.001).dominated
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not health(one(torch.ones(200)), {"w": torch.ones(200)}, {"w": torch.ones(200)}).dominated
        assert health(one(v), {"w": torch.zeros(200)}, {"w": torch.ones(200)}).smallest == Share(0.01, 0.0)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, views of what was there before left out."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {leaf.untyped_storage().data_ptr() for leaf in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in (leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)):
            if leaf.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return found


def test_nothing_of_the_size_of_v_is_made(draw):
    v, P, squared = (torch.rand(20 * tree.SHARD_COLUMNS, generator=draw) for _ in range(3))
    state = one(v)
    with Largest(v, P, squared) as seen:
        health(state, {"w": P}, {"w": squared})
    assert seen.bytes <= 8 * tree.SHARD_COLUMNS < v.nbytes / 9


def test_health_refuses_what_it_cannot_judge():
    state, ones = one(torch.ones(2)), {"w": torch.ones(2)}
    for share in (0.0, 0.5, -1.0):
        with pytest.raises(fk.OptimizerStateError, match=rf"smallest is {share}; expected a share"):
            health(state, ones, ones, share)
    with pytest.raises(fk.TreeError, match="the diagonal lacks 'w'"):
        health(state, {}, ones)
    with pytest.raises(fk.TreeError, match=r"squares\['w'\] has shape \[3\]"):
        health(state, ones, {"w": torch.ones(3)})
    for P, squared, what in ((math.nan, 1.0, "the diagonal"), (1.0, math.inf, "squares")):
        with pytest.raises(fk.NonFiniteError, match=rf"{what}\['w'\] holds 2 non-finite"):
            health(state, {"w": torch.full((2,), P)}, {"w": torch.full((2,), squared)})
