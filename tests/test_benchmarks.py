"""The benchmarks cannot rot: both sides of every ratio compute the same thing, and the ratios are right."""

import itertools
import json
import statistics

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    memory,
    scale,
    test_adam,
    test_command,
    test_contract,
    test_gradient,
    test_kernel,
    test_logprob,
    test_rollout,
)
from benchmarks.environment import environment
from benchmarks.limits import concatenated, plain_backward
from benchmarks.models import build
from benchmarks.ratios import interleaved
from fkernel import func, tree


@pytest.fixture(scope="module")
def tiny():
    return build("tiny")


def close(x, y):
    x, y = ({"": t} if isinstance(t, torch.Tensor) else t for t in (x, y))
    tree.check_names(x, y)
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4 * float(y[name].abs().max()))


def summed(rows):
    return {name: leaf.sum(0) for name, leaf in rows.items()}


def test_rows_and_the_plain_backward_are_the_same_gradient(tiny):
    limit, ours, loop = (side() for side in test_gradient.row_sides(tiny, T=12, n=5).values())
    close(ours, loop)
    close(summed(ours), limit)


def test_vjp_and_the_plain_backward_are_the_same_gradient(tiny):
    limit, ours = (side() for side in test_gradient.reverse_sides(tiny, T=12, n=11).values())
    close(ours, limit)


def test_forward_mode_follows_the_plain_forward(tiny):
    forward, slope, bend = test_gradient.forward_sides(tiny, T=12, n=3).values()
    h, v = 1.0, tiny.vector(1, 1e-3)
    batch = tiny.batch(3, 12)
    there, back = (tiny.f(tree.axpy(sign * h, v, tiny.params), batch) for sign in (1, -1))
    torch.testing.assert_close(slope(), (there - back) / (2 * h), rtol=0.05, atol=1e-3)
    close(forward(), tiny.f(tiny.params, batch))
    assert bend().shape == (3,)


def test_contract_is_the_gemm():
    limit, eager, *jitted = test_contract.sides(test_contract.Aspect(6, 4, 1_000)).values()
    close(eager(), limit())
    assert len(jitted) <= 1  # takes seconds to compile, and only where there is a compiler: left to the benchmark


def test_the_plain_pass_is_adam(tiny):
    limit, frozen, *others = (side() for side in test_adam.diagonal_sides(tiny).values())
    close(frozen, limit)
    assert len(others) == 2


def test_the_optimizer_and_adamw_step_move_alike(tiny):
    optimizer = test_adam.torch_optimizer(tiny, tiny.adamw_state(), tiny.vector(1, 0.1))
    leaves = optimizer.param_groups[0]["params"]
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer.step()
    moved = {name: leaf.detach() - old for name, leaf, old in zip(tiny.params, leaves, before, strict=True)}
    close(test_adam.step_sides(tiny)["adamw_step"]().total, moved)


def test_kernel_holds_what_its_limit_sums(tiny):
    (towards_E, towards_U, gemm), K = (side() for side in test_kernel.kernel_sides(tiny, 3, 2, T=12).values())
    assert gemm.shape == K.shape == (3, 2)
    P = test_kernel.response(tiny)
    torch.testing.assert_close(K.sum().double(), tree.dot(towards_E, P(towards_U)), rtol=1e-3, atol=1e-6)


def test_influence_is_the_kernel_times_weights(tiny):
    _, ours, through_K = (side() for side in test_kernel.influence_sides(tiny, 3, 2, T=12).values())
    close(ours, through_K)


def test_logprob_reads_the_bare_forward(tiny):
    logits, S, H = (side() for side in test_logprob.sides(tiny, T=12, n=2).values())
    batch = tiny.batch(2, 12)
    log_p = logits[:, :-1].log_softmax(-1)
    scored = batch.response_mask[:, 1:]
    picked = log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    close(S, (picked * scored).sum(1))
    close(H[:, 1:], -(log_p.exp() * log_p).sum(-1) * scored)


def test_scoring_and_drawing_run_on_a_frozen_model(tiny):
    """Padding of neighbours changes no statistic beyond rounding."""
    as_they_come, ours = (side() for side in test_rollout.scoring_sides(tiny, 32).values())
    for one, other in zip((x for part in as_they_come for x in part), ours, strict=True):
        close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))
    drawn = test_rollout.drawing_sides(tiny, 32)["draw"]()
    assert all(1 <= len(one.response_ids) <= test_rollout.NEW for one in drawn)


def test_concatenated_rows_are_the_rows(tiny):
    J = func.per_sequence_grad(tiny.f)(tiny.params, tiny.batch(2, 8))
    assert concatenated(J).shape == (2, tiny.size)
    close(concatenated(J).sum(1), sum(leaf.flatten(1).sum(1) for leaf in J.values()))


def test_padding_changes_no_entry_of_a_ragged_kernel():
    padded, ragged = (side() for side in test_kernel.ragged_sides(build("tiny"), 3, 2, T=40).values())
    close(ragged, padded)


def test_the_main_command_accounts_for_a_step_and_the_limit_does_as_much_work(tmp_path):
    limit, ours = test_command.command_sides(tmp_path, quick=True).values()
    _, forwards = limit()
    result = ours()
    assert sum(map(len, forwards)) == 2 * len(result.evaluation)
    ledger = result.analysis("ledger")
    assert (abs(ledger["remainder"]) < 10 * ledger["floor"]).all()  # of a tiny model most of a change is rounding


def test_an_explained_step_is_held_against_what_it_does(tiny):
    limit, ours = test_command.step_sides(tiny, 3, 4, 12).values()
    assert sum(map(len, limit())) == 2 * len(ours())


GRANTED = (
    "kernel within a grant",
    "influence within a grant",
    "explain_step within a grant",
    "kernel of long sequences",
)


@pytest.mark.turns(6)
def test_memory_callables_run():
    subject = build("tiny")
    for name, make in memory.MEASURED.items():
        named = {"influence": {"n_U": 3}, **{granted: {"n_E": 2, "n_U": 3} for granted in GRANTED}}
        named["kernel of long sequences"] = {"n_E": 2, "n_U": 3}
        sizes = named.get(name, {"n": 2}) | {"T": 8}
        result = make(shape="tiny", **sizes)()
        if name == "plain batched backward":
            close(result, plain_backward(subject, subject.batch(2, 8)))
        if name == "influence":
            assert result.shape == (memory.MICROBATCH,)


@pytest.mark.turns(6)
def test_peak_memory_is_read_in_a_process_of_its_own():
    peak = memory.in_own_process("plain batched backward", {"shape": "tiny", "n": 8, "T": 128})
    logits = 8 * 128 * 64 * 4 / memory.MB
    assert peak.before > 50
    assert logits < peak.grown < 500


def test_slope_is_the_least_squares_line():
    peaks = [memory.Peak("influence", {"n_U": n}, 100.0, 300.0 + 0.25 * n) for n in (64, 256, 1024)]
    assert memory.slope(peaks) == pytest.approx(0.25)


class Clock:
    """A clock that each side moves by its own, known, amount."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def side(self, name, seconds, order):
        ticks = itertools.cycle(seconds)

        def call():
            order.append(name)
            self.now += next(ticks)

        return call


def test_ratios_are_medians_over_rounds_of_ratios_within_a_round():
    clock, order = Clock(), []
    limit, ours = [1.0, 10.0, 2.0], [3.0, 20.0, 8.0]  # within the rounds 3, 2 and 4
    found = interleaved(
        {"limit": clock.side("limit", limit, order), "ours": clock.side("ours", ours, order)}, 3, 0, clock
    )
    assert found["limit"].ratio == 1.0
    assert found["ours"].ratio == 3.0
    assert (found["ours"].least, found["ours"].most) == (2.0, 4.0)
    assert found["ours"].seconds == statistics.median(ours)
    assert order == ["limit", "ours"] * 3


def test_warmup_rounds_are_not_timed():
    clock, order = Clock(), []
    found = interleaved({"limit": clock.side("limit", [100.0, 1.0, 1.0], order)}, 2, 1, clock)
    assert found["limit"].seconds == 1.0
    assert len(order) == 3


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="at least one of each"):
        interleaved({}, 3)


def test_the_environment_names_versions_and_no_host():
    import platform

    found = environment()
    assert found["torch"] == torch.__version__
    assert platform.node() not in json.dumps(found)


def test_a_missed_target_is_called_missed():
    extra = {"side": "ours", "limit": "limit", "target": 1.5, "sizes": {}, "rounds": 5}
    extra |= {"seconds": 2.0, "ratio": 1.6, "least": 1.4, "most": 1.9}
    row = command.as_row({"group": "g", "extra_info": extra, "stats": {"median": 2.1}})
    assert row["met"] is False
    assert "missed" in command.verdict(row["met"])
    assert command.speed_table([row]).row_count == 1


@pytest.mark.turns(6)
@pytest.mark.parametrize("measure", [scale.measure_curves, scale.measure_planner])
def test_curves_and_planner_run_small(measure):
    found = measure(True)
    if measure is scale.measure_curves:
        assert found["exponents"]["n_U"]["seconds"] == found["exponents"]["n_U"]["seconds, upper half"]
    else:
        assert found["cases"] == 1
        assert all(option["measured_s"] > 0 for option in found["rows"][0]["options"] if option["feasible"])


@pytest.mark.turns(6)
def test_long_sequences_run_small_within_what_is_forecast():
    found = scale.measure_long(True)
    assert found["strategy"]["name"] == "layers"
    assert found["kernel_MB"] < 2 * found["predicted_MB"]
    assert found["ratio"] > 0


def test_scale_runs_small_and_its_numbers_hold():
    """The large part on a small model: within its grant, entries equal to autograd's, C equal to influence."""
    found = scale.in_own_process("large", **scale.QUICK)
    assert found["checked"] == scale.QUICK["checked"]
    assert found["worst_entry"] < 1e-5
    assert found["influence_against_C"] < 1e-4
    assert found["kernel_MB"] <= 1.1 * found["grant_MB"]
