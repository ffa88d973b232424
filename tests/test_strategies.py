"""Every strategy gives the same kernel, and a memory grant chooses among them."""

import gc

import pytest
import torch

import fkernel as fk
from fkernel import func, precond
from fkernel.engine.batching import SortedBatch, cuts_of
from fkernel.engine.gradients import computed
from fkernel.engine.planning import Rates, Workload
from fkernel.engine.planning.curve import Curve
from fkernel.engine.planning.strategy import NAMES, cost, options
from fkernel.engine.planning.work import Work, count_cost
from fkernel.engine.streaming import contraction
from fkernel.func.handles.products import ProductSpec, RowSpec
from tests.cases import EXAMPLES

RATES = Rates(flops=1e11, moved=1e10, call=5e-6, forming=1e11, write=1e9, read=2e9)


def forms(T: int):
    """Strategies of every kind, whole and in pieces."""
    return [
        fk.Strategy("sequences", "E", None, T, 2 * T),
        fk.Strategy("sequences", "U", None, None, 2 * T),
        fk.Strategy("sequences", "E", None, None, T),
        fk.Strategy("sequences", "U", None, 2 * T, T),
        fk.Strategy("sequences", "E", T, 2 * T, None),
        fk.Strategy("sequences", "U", T, 2 * T, None),
        fk.Strategy("layers", "E", None, None, 0),
        fk.Strategy("layers", "E", None, None, 2 * T, 2),
        fk.Strategy("store", "E", 2 * T, None, T),
    ]


@pytest.mark.turns(6)
@pytest.mark.parametrize("arbitrary", [False, True], ids=["diagonal", "any callable"])
@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_every_strategy_gives_the_same_kernel(case, arbitrary, tmp_path):
    S, params, E, U = case.engine(fk)
    D = precond.diagonal({name: leaf.abs() + 0.1 for name, leaf in case.tree(21).items()})
    P = (lambda x: D(x)) if arbitrary else D
    J = func.per_sequence_grad(S)
    expected = func.contract(J(params, E), D(J(params, U)))
    for strategy in forms(E.input_ids.shape[1]):
        if strategy.name == "layers" and arbitrary:
            with pytest.raises(fk.BatchError, match="needs whole gradients"):
                fk.kernel(S, params, E, U, P, strategy=strategy)
            continue
        K = fk.kernel(S, params, E, U, P, strategy=strategy, store=tmp_path)
        torch.testing.assert_close(K, expected, rtol=1e-9, atol=1e-12, msg=lambda m, s=strategy: f"{s}: {m}")


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_a_kernel_of_a_batch_with_itself_computes_its_gradients_once(case):
    S, params, _, U = case.engine(fk)
    seen = []

    def counting(p, batch):
        seen.append(1)
        return S.fn(p, batch)

    P = precond.diagonal({name: leaf.abs() + 0.1 for name, leaf in case.tree(21).items()})
    copy = func.Sequences(*(leaf.clone() for leaf in U))
    fk.kernel(counting, params, U, U, P, microbatch=1)  # finds its layers, and certifies it
    seen.clear()
    K, once = fk.kernel(counting, params, U, U, P, microbatch=1), len(seen)
    seen.clear()
    torch.testing.assert_close(K, fk.kernel(counting, params, U, copy, P, microbatch=1), rtol=1e-10, atol=1e-12)
    assert once < len(seen)
    torch.testing.assert_close(K, K.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_a_side_s_gradients_in_parts_add_up_and_are_found_again(case):
    S, params, _, U = case.engine(fk)
    w, J = case.weights.clone(), func.per_sequence_grad(S)(params, U)
    w[1] = 0.0
    side = SortedBatch("U", U, S)
    found = computed(side, ((1.0, params),), cuts_of(side, side.tokens[0]))
    assert len(found.cuts) > 1
    for name, leaf in found.weighted_sum(w).items():
        torch.testing.assert_close(leaf, torch.tensordot(w, J[name], 1), rtol=1e-9, atol=1e-12)
    for name, leaf in found.squared_sum(w).items():
        torch.testing.assert_close(leaf, torch.tensordot(w, J[name].square(), 1), rtol=1e-9, atol=1e-12)
    rows = torch.tensor([len(w) - 1, 0])
    some, whole = found.chosen(rows), func.contract(J, J)
    for block in contraction(
        some, found, ProductSpec({"": None}, RowSpec(squares={"norm": None})), block=side.tokens[0]
    ):
        torch.testing.assert_close(block.kernel(), whole[rows[block.at]], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(block.rows("norm"), whole.diagonal()[rows[block.at]], rtol=1e-9, atol=1e-12)
    (one,) = func.contract(found.one(1), J)
    torch.testing.assert_close(one, whole[1], rtol=1e-9, atol=1e-12)


def load(n_E: int = 16, n_U: int = 64, T: int = 128, size: int = 1_000_000, dense_U: bool = False) -> Workload:
    """A workload whose handles are a tenth of its rows."""
    work = Work(flops=4.0 * size * T, weights=8.0 * size, moved=100.0 * size, calls=2000, peak=size, kept=size // 3)
    tokens = {"E": [T] * n_E, "U": [T] * n_U}
    return Workload(tokens, size, 4, 2.0 * size, Curve(((T, work),)), dense_U)


@pytest.mark.parametrize("dense_U", [False, True])
@pytest.mark.parametrize("budget", [None, 10**10, 10**8, 3 * 10**7, 10**7])
def test_options_stay_within_the_budget_or_say_why_not(budget, dense_U):
    found = options(load(dense_U=dense_U), RATES, budget, 8, store=True)
    assert tuple(option.name for option in found) == NAMES
    assert {option.name: option.infeasible_reason for option in found}["layers"] == "not counted"
    for option in (option for option in found if option.name != "layers"):
        assert option == cost(load(dense_U=dense_U), RATES, option.strategy)._replace(
            infeasible_reason=option.infeasible_reason
        )
        if budget is not None:
            assert bool(option.infeasible_reason) == (option.needs > budget)


def test_less_memory_takes_more_time_and_never_more_memory():
    times = []
    for budget in (10**9, 10**8, 3 * 10**7, 2 * 10**7):
        feasible = [o for o in options(load(), RATES, budget, 8, store=True) if not o.infeasible_reason]
        times.append(min(option.seconds for option in feasible))
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_the_store_is_only_chosen_where_there_is_a_directory():
    found = {option.name: option for option in options(load(), RATES, None, 8, store=False)}
    assert found["store"].infeasible_reason == "no directory was given (store=)"
    assert found["store"].disk > 0


@pytest.mark.turns(6)
@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_an_estimate_chooses_what_kernel_takes(case):
    S, params, E, U = case.engine(fk)
    P = precond.identity()
    expected = fk.kernel(S, params, E, U, P)
    ample = fk.estimate(S, params, E, U, P, memory="1GiB")
    assert ample.chosen is not None
    assert "fastest feasible" in ample.reason
    tight = fk.estimate(S, params, E, U, P, memory=min(option.needs for option in ample.options) + 1000)
    assert tight.chosen is not None
    for found in (ample, tight):
        assert found.chosen is not None
        K = fk.kernel(S, params, E, U, P, strategy=found.chosen.strategy)
        torch.testing.assert_close(K, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fk.kernel(S, params, E, U, P, memory=found.budget), expected, rtol=1e-9, atol=1e-12)
    none = fk.estimate(S, params, E, U, P, memory=1)
    assert none.chosen is None
    assert "at least" in none.reason
    with pytest.raises(fk.BatchError, match="too small for every strategy"):
        fk.kernel(S, params, E, U, P, memory=1)


def test_work_is_counted_without_a_value():
    """A product of [6 × 4] and [4 × 5]: 2·6·4·5 operations, 80 bytes of parameters, and its result alive at the end."""
    work = count_cost(
        lambda p, x: (x @ p["w"]).sin(), {"w": torch.full((4, 5), torch.nan)}, torch.full((6, 4), torch.nan)
    )
    assert (work.flops, work.weights) == (240, 80)
    assert (work.peak, work.kept) == (2 * 120, 120)


@pytest.mark.parametrize("every", [1, 100_000])
def test_a_count_does_not_depend_on_when_garbage_is_collected(every):
    def f(params, x):
        cycle = [x @ params["w"]]
        cycle.append(cycle)
        del cycle
        return x.sum() + len([[] for _ in range(1000)])  # while garbage is collected, where it is

    usual = gc.get_threshold()
    gc.set_threshold(every)
    try:
        work = count_cost(f, {"w": torch.ones(4, 5)}, torch.ones(6, 4))
    finally:
        gc.set_threshold(*usual)
    assert work.kept >= 120
    assert gc.isenabled()


def test_a_curve_is_exact_for_second_degree():
    def at(t):
        return Work(3.0 + t * t, 7.0, 2.0 * t, 10, 5 * t * t, 4 * t)

    curve = Curve(tuple((t, at(t)) for t in (100, 50, 25)))
    for t in (100, 80, 20):
        assert curve(t) == pytest.approx(at(t))
