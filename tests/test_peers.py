"""The comparisons with peers cannot rot: the research method is the kernel, shares and ratios are right, no bergson."""

import ast
import doctest
import importlib
import json
import math
import mmap
import subprocess
import sys
import time

import pytest
import torch

import fkernel
from benchmarks.limits import plain_backward
from benchmarks.models import build
from benchmarks.peers import __main__ as command
from benchmarks.peers import against_bergson, case, comparison, left_out, our_side, research, turns
from benchmarks.peers.against_bergson import compared
from benchmarks.peers.comparison import Comparison, relative_difference
from benchmarks.peers.left_out import LeftOut
from benchmarks.ratios import Ratio
from fkernel import func, precond, tree
from tests import oracle
from tests.models import MODELS

SIZES = case.Sizes(width=16, T=8, n_U=3, n_E=2, layers=1, vocab_size=11)


# ---------------------------------------------------------------------------------------------- the research method


@pytest.fixture(scope="module", params=MODELS)
def situation(request):
    """A float64 model, ragged batches and a positive diagonal of very unequal entries."""
    model = MODELS[request.param](seed=3)
    E = [([1, 2], [3, 4, 5]), ([6], [7, 8])]
    U = [([1], [2, 3]), ([9, 10, 11], [12]), ([4, 4], [4, 1, 2])]
    generator = torch.Generator().manual_seed(0)
    P = {k: torch.rand(p.shape, generator=generator).double() ** 3 + 1e-3 for k, p in model.named_parameters()}
    return model, E, U, P


def padded(pairs):
    return func.pad([prompt for prompt, _ in pairs], [response for _, response in pairs])


def test_the_research_method_is_the_kernel(situation):
    model, E, U, P = situation
    apply, params = func.make_functional(model)
    f = func.sequence_logprob(apply)
    rows, columns = padded(E), padded(U)
    theirs = research.kernel(f.fn, params, rows, columns, P)
    assert theirs.dtype == torch.float64
    assert relative_difference(fkernel.kernel(f, params, rows, columns, precond.diagonal(P)), theirs) <= 1e-10


def test_the_research_method_is_the_oracles_double_loop(situation):
    model, E, U, P = situation
    apply, params = func.make_functional(model)
    f = func.sequence_logprob(apply)
    rows, columns = padded(E), padded(U)
    theirs = research.kernel(f.fn, params, rows, columns, P)
    towards_E, towards_U = ([oracle.gradient(model, pair) for pair in side] for side in (E, U))
    truth = oracle.kernel(towards_E, towards_U, P)
    torch.testing.assert_close(theirs, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


def test_the_research_comparison_runs_and_both_sides_agree():
    before = torch.get_num_threads()
    try:
        one = research.compare("tiny", n_E=2, n_U=3, T=8, rounds=1, target=1e6)
    finally:
        torch.set_num_threads(before)
    assert one.agrees
    assert one.met
    assert one.theirs.ratio == 1
    assert one.ours.ratio == pytest.approx(one.ours.seconds / one.theirs.seconds)
    assert one.sizes == {"shape": "tiny", "n_E": 2, "n_U": 3, "T": 8, "P": build("tiny").size, "threads": 2}


def test_the_research_comparison_sees_another_kernel(monkeypatch):
    true = fkernel.kernel
    monkeypatch.setattr(fkernel, "kernel", lambda *given: 1.001 * true(*given))
    monkeypatch.setattr(research, "THREADS", torch.get_num_threads())
    one = research.compare("tiny", n_E=2, n_U=3, T=8, rounds=1, target=1e6)
    assert one.difference == pytest.approx(1e-3, rel=0.01)
    assert not one.met


# ------------------------------------------------------------------------------------------------------ the case


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("case")
    case.write(SIZES, path)
    return path


def covered(folder):
    """What bergson covers: the linear layers below the head."""
    names = [name for name, _ in case.read(folder)[0].named_parameters()]
    return [name for name in names if name.endswith("_proj.weight")]


def test_a_case_is_what_adamw_left(folder, tmp_path):
    model, given = case.read(folder)
    assert given.E.shape == (2, 8)
    assert given.U.shape == (3, 8)
    assert given.prompt == 2
    assert {name: v.shape for name, v in given.exp_avg_sq.items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    assert all(bool((v > 0).all()) for v in given.exp_avg_sq.values())
    torch.manual_seed(99)  # a case depends on its own seed alone, and disturbs nobody's
    case.write(SIZES, tmp_path)
    drawn = torch.rand(())
    torch.manual_seed(99)
    assert drawn == torch.rand(())
    again, same = case.read(tmp_path)
    assert torch.equal(given.U, same.U)
    assert not torch.equal(given.U[:2], given.E)
    tree.check_names(dict(again.named_parameters()), given.exp_avg_sq)
    for (name, x), (_, y) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_moments_belong_to_the_names_that_they_are_read_under(folder):
    """A v by another name of the same shape would pass every check of shapes; the first step's v tells them apart."""
    torch.manual_seed(0)
    model = case.LlamaForCausalLM(case.configuration(SIZES)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(case.STEPS):
        case.summed_loss(model, case.drawn(SIZES, case.STEP_BATCH), 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = case.read(folder)[1].exp_avg_sq
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moments[name], optimizer.state[parameter]["exp_avg_sq"], msg=name)


def test_the_loss_of_a_case_is_minus_the_score(folder):
    model, given = case.read(folder)
    with torch.no_grad():
        loss = case.summed_loss(model, given.U, given.prompt)
    ours = our_side.load(folder)
    torch.testing.assert_close(loss, -ours.subject.f(ours.subject.params, ours.U).sum())


# ------------------------------------------------------------------------------------------------- our side of it


def test_our_side_divides_by_the_raw_second_moments_as_bergson_does(folder):
    model, given = case.read(folder)
    names = covered(folder)
    P = {name: (1 / (v.sqrt() + 1e-8)) for name, v in given.exp_avg_sq.items()}
    kept = {name: P[name] if name in names else torch.zeros_like(P[name]) for name in P}
    rows, columns = ([oracle.gradient(model, (x[:2], x[2:])) for x in side.tolist()] for side in (given.E, given.U))
    assert relative_difference(our_side.load(folder, names).kernel(), oracle.kernel(rows, columns, kept)) <= 1e-5


def test_the_limit_of_our_side_is_one_backward_pass_over_each_batch(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(our_side, "plain_backward", lambda *given: seen.append(given) or plain_backward(*given))
    ours = our_side.load(folder, covered(folder))
    ours.limit()
    assert [(id(subject), len(batch.input_ids), microbatch) for subject, batch, microbatch in seen] == [
        (id(ours.subject), 2, 256),  # 2048 tokens of 8
        (id(ours.subject), 3, 256),
    ]


@pytest.mark.turns(6)
def test_our_side_answers_in_a_process_of_its_own(folder):
    names = covered(folder)
    with turns.Side("fkernel", [sys.executable, "-m", "benchmarks.peers.our_side", str(folder), *names]) as side:
        answers = [side.ask(), side.ask()]
    K = our_side.load(folder, names).kernel()
    for answer in answers:
        assert relative_difference(torch.tensor(answer["K"]), K) <= 1e-5
        assert 0 < answer["user"] <= answer["cpu"] < 60
        assert 0 < answer["limit"] < 60


# ------------------------------------------------------------------------------------------------------ turns


def child(code):
    return turns.Side("a peer", [sys.executable, "-c", code])


def test_a_side_is_asked_and_not_run_ahead():
    code = (
        "from benchmarks.peers.turns import serve; import itertools, sys; print('noise'); n = itertools.count();"
        "serve(lambda: lambda: (print('chatter', end='', flush=True), {'round': next(n)})[1])"
    )
    with child(code) as side:
        assert [side.ask() for _ in range(3)] == [{"round": i} for i in range(3)]
    assert side.process.returncode == 0


def test_a_side_runs_on_one_thread_and_offline():
    code = (
        "import os, json; from benchmarks.peers.turns import serve;"
        "serve(lambda: lambda: {k: os.environ[k] for k in ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE')})"
    )
    with child(code) as side:
        assert side.ask() == {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_a_side_that_fails_says_why():
    with (
        pytest.raises(turns.PeerError, match=r"(?s)a peer ended with status 1.*no such thing"),
        child("raise SystemExit('no such thing')") as side,
    ):
        side.ask()


def test_a_side_that_is_abandoned_is_ended():
    with pytest.raises(KeyboardInterrupt), child("import time; time.sleep(600)") as side:
        raise KeyboardInterrupt
    assert side.process.returncode is not None


def test_time_is_the_processes_own():
    def sleep_then_work():
        time.sleep(0.3)
        return sum(range(200_000))

    cpu, value = turns.timed(sleep_then_work)
    assert value == sum(range(200_000))
    assert 0 < cpu.total < 0.2


def test_user_time_is_without_the_systems():
    assert turns.Cpu(total=3.0, system=1.0).user == 2.0

    def touch_fresh_memory():
        for _ in range(20):
            mmap.mmap(-1, 1 << 23).write(bytes(1 << 23))

    cpu, _ = turns.timed(touch_fresh_memory)
    assert 0 < cpu.system <= cpu.total + 0.02  # the system's own clock ticks coarsely
    assert cpu.user < cpu.total


# ------------------------------------------------------------------------------------------------ what is left out


def test_left_out_is_what_the_other_parameters_hold(folder):
    model, given = case.read(folder)
    names = covered(folder)
    gradients = [[oracle.gradient(model, (x[:2], x[2:])) for x in side.tolist()] for side in (given.E, given.U)]
    squares = [(k, float(g.double().square().sum())) for side in gradients for row in side for k, g in row.items()]
    outside = sum(square for name, square in squares if name not in names) / sum(square for _, square in squares)
    P = {name: 1 / (v.sqrt() + 1e-8) for name, v in given.exp_avg_sq.items()}
    none = {name: P[name] if name in names else torch.zeros_like(P[name]) for name in P}
    K, part = (oracle.kernel(gradients[0], gradients[1], diagonal) for diagonal in (P, none))
    count = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = left_out.left_out(folder, names)
    assert found.gradient == pytest.approx(outside, rel=1e-4)
    assert found.kernel == pytest.approx(float((K - part).norm() / K.norm()), rel=1e-4)
    assert found.parameters == pytest.approx(1 - sum(count[name] for name in names) / sum(count.values()))
    assert 0 < found.parameters < 1


def test_nothing_is_left_out_by_a_peer_that_covers_everything(folder):
    everything = [name for name, _ in case.read(folder)[0].named_parameters()]
    assert left_out.left_out(folder, everything) == pytest.approx((0, 0, 0), abs=1e-12)


def test_a_share_of_unknown_names_is_an_error():
    with pytest.raises(ValueError, match="head"):
        left_out.share_outside({"table": 1.0}, ["table", "head"])


# ---------------------------------------------------------------------------------------------------- arithmetic


def answers(cpu, limit, scale=1.0):
    """Rounds of (theirs, ours) with known times, half of theirs and a tenth of ours the system's; K off by a factor."""
    their_rest = {"K": [[1.0, 2.0]], "version": "2.5.1", "token_batch_size": 2048}
    K = [[scale, 2.0 * scale]]
    return [
        (
            {"cpu": a, "user": 0.5 * a, "build": 0.25 * a, "score": 0.75 * a, **their_rest},
            {"cpu": b, "user": 0.9 * b, "limit": least, "K": K},
        )
        for (a, b), least in zip(cpu, limit, strict=True)
    ]


def test_ratios_are_taken_within_rounds_and_divide_by_the_peer():
    rounds = answers([(1.0, 0.5), (10.0, 7.0), (4.0, 1.0)], limit=[0.4, 4.0, 2.0])  # ½, 0.7 and ¼; 0.4, 0.4 and ½
    one = compared(SIZES, rounds, LeftOut(0.1, 0.2, 0.3), target=0.8)
    assert one.ours.ratio == 0.5
    assert (one.ours.least, one.ours.most) == (0.25, 0.7)
    assert (one.theirs.seconds, one.ours.seconds) == (4.0, 1.0)
    assert one.rounds == 3
    assert one.met
    record = one.as_record()
    assert (record["ratio"], record["times_faster"], record["ratio_range"]) == (0.5, 2.0, [0.25, 0.7])
    assert (record["their_seconds"], record["their_build_seconds"], record["their_score_seconds"]) == (4.0, 1.0, 3.0)
    assert (record["their_user_seconds"], record["our_user_seconds"], record["user_ratio"]) == (2.0, 0.9, 0.9)
    assert (record["limit_seconds"], record["limit_ratio"], record["limit_user_ratio"]) == (2.0, 0.4, 0.8)
    assert record["left_out"] == {"parameters": 0.1, "gradient": 0.2, "kernel": 0.3}
    assert record["sizes"]["width"] == 16
    json.dumps(record)


def test_tables_show_ratios_and_shares():
    one = compared(SIZES, answers([(1.0, 0.5)], [0.4]), LeftOut(0.1, 0.2, 0.3), target=0.8)
    row = command.speed(one)
    assert row[2:7] == ["1", "0.5", "0.500", "≤ 0.8", "[green]met[/]"]
    assert row[7:] == ["0.900", "0.400", "0.0e+00"]
    assert command.speed_table([one]).row_count == command.share_table([one]).row_count == 1
    assert [[*column.cells] for column in command.share_table([one]).columns][2:] == [["10.0%"], ["20.0%"], ["30.0%"]]


@pytest.mark.parametrize(("seconds", "scale", "met", "agrees"), [(0.9, 1, False, True), (0.1, 1.001, False, False)])
def test_a_missed_target_or_another_kernel_is_not_met(seconds, scale, met, agrees):
    one = compared(SIZES, answers([(1.0, seconds)], [0.1], scale), LeftOut(0, 0, 0), target=0.8)
    assert (one.met, one.agrees) == (met, agrees)
    text = " ".join(command.speed(one))
    assert "missed" in text
    assert ("[red]1.0e-03" in text) is not agrees


def test_kernels_agree_up_to_1e_5():
    for error, agrees in ((0.9e-5, True), (1.1e-5, False)):
        assert compared(SIZES, answers([(1, 1)], [1], 1 + error), LeftOut(0, 0, 0), None).agrees is agrees


@pytest.mark.parametrize("bad", [torch.tensor([[math.nan]]), torch.tensor([[math.inf]]), torch.ones(1, 2)])
def test_kernels_that_cannot_be_compared_are_an_error(bad):
    with pytest.raises(ValueError, match="kernel"):
        relative_difference(bad, torch.ones(1, 1))


def test_a_zero_reference_is_an_error():
    with pytest.raises(ValueError, match="zero"):
        relative_difference(torch.zeros(1, 1), torch.zeros(1, 1))


# ------------------------------------------------------------------------------------------------------ command


def one(peer, difference=0.0):
    ratio = Ratio(1.0, 0.5, 0.4, 0.6)
    return Comparison(peer, {"n_E": 2}, ratio, ratio, 3, 0.8, difference, {})


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """The command with its measurements replaced: it returns where the file goes, and may be told more."""

    def run(arguments=(), bergson=True, difference=0.0):
        monkeypatch.setattr(sys, "argv", ["peers", *arguments])
        monkeypatch.setattr(command, "RESULTS", command.ROOT / "benchmarks" / "results" / "peers.json")
        saved = []
        monkeypatch.setattr(command, "save", saved.append)
        monkeypatch.setattr(command, "against_research", lambda quick: [one(research.NAME, difference)])
        monkeypatch.setattr(command, "against_the_other", lambda quick: [one(against_bergson.NAME)])
        monkeypatch.setattr(against_bergson, "available", lambda: bergson)
        command.main()
        return saved

    return run


def test_a_full_run_saves_every_comparison_with_the_environment(stubbed, capsys):
    (found,) = stubbed()
    assert [record["peer"] for record in found["comparisons"]] == [research.NAME, against_bergson.NAME]
    assert found["environment"]["torch"] == torch.__version__
    assert "met" in capsys.readouterr().out


def test_a_missing_peer_is_announced_and_nothing_is_saved(stubbed, capsys):
    assert stubbed(bergson=False) == []
    said = " ".join(capsys.readouterr().out.split())
    assert "bergson is not measured" in said
    assert "make peers" in said
    assert "Nothing was saved" in said


def test_a_quick_run_saves_nothing(stubbed, capsys):
    assert stubbed(["--quick"]) == []
    assert "Nothing was saved" in capsys.readouterr().out


def test_kernels_that_disagree_fail_the_command(stubbed):
    with pytest.raises(SystemExit, match="different kernels"):
        stubbed(difference=1e-3)


def test_availability_is_the_environments_interpreter(tmp_path):
    python = tmp_path / "python"
    assert not against_bergson.available(python)
    python.touch()
    assert against_bergson.available(python)


PRETENCE = """
import sys
from unittest.mock import MagicMock
sys.modules["fkernel"] = None  # not installed where bergson is
for name in ("bergson", "bergson.data", "bergson.score.score_writer", "bergson.utils.worker_utils", "datasets"):
    sys.modules[name] = MagicMock()
import torch
from benchmarks.peers import bergson_side
bergson_side.Dataset.from_dict = dict
print(bergson_side.dataset(torch.tensor([[5, 6, 7], [8, 9, 1]]), prompt=2))
"""


@pytest.mark.turns(6)
def test_the_side_of_bergson_needs_no_fkernel_and_keeps_prompts_out_of_the_loss():
    done = subprocess.run([sys.executable, "-c", PRETENCE], cwd=turns.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == {
        "input_ids": [[5, 6, 7], [8, 9, 1]],
        "labels": [[-100, -100, 7], [-100, -100, 1]],
        "length": [3, 3],
    }


@pytest.mark.parametrize("module", [comparison, left_out, research, turns])
def test_examples_run(module):
    assert doctest.testmod(importlib.import_module(module.__name__)).failed == 0
