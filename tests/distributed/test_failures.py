"""A rank that fails, is killed or hangs stops all ranks, with one error that names it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from fkernel.distributed import agree, agreement, all_sum, from_first, group_of, together
from fkernel.errors import BatchError
from tests.distributed.ranks import on_ranks, results


def fail_between_sums(mesh, failing, how):
    group, total = group_of(mesh), None
    with together(group, "sums"):
        all_sum(group, [torch.ones(3)])
        if group.rank in failing:
            how(group.rank)
        for _ in range(3):
            (total,) = all_sum(group, [torch.ones(3)])
    return total


def raise_error(rank):
    raise BatchError(f"sequence 7 of rank {rank} is empty")


def raise_same(rank):
    raise BatchError("sequence 7 is empty")


def be_killed(rank):
    os.kill(os.getpid(), signal.SIGKILL)


def be_stopped(rank):
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(rank):
    time.sleep(600)


def compute(rank):
    until, x = time.monotonic() + 5, torch.randn(100, 100)
    while time.monotonic() < until:
        x = (x @ x).clamp(-1, 1)


def test_an_error_on_one_rank_is_one_error_on_all():
    for outcome in on_ranks(4, fail_between_sums, [2], raise_error, seconds=30):
        assert outcome is not None
        assert outcome.error == ("ProcessError: Rank 2 of 4 failed: sums: BatchError: sequence 7 of rank 2 is empty")
        assert outcome.seconds < 5


def test_several_ranks_that_fail_are_counted():
    for outcome in on_ranks(4, fail_between_sums, [1, 3], raise_error, seconds=30):
        assert outcome is not None
        assert "Rank 1 of 4 failed (1 more failed)" in str(outcome.error)


def test_an_error_that_every_rank_has_stays_what_it_is():
    for outcome in on_ranks(2, fail_between_sums, [0, 1], raise_same, seconds=30):
        assert outcome is not None
        assert str(outcome.error).startswith("BatchError: sequence 7 is empty")


@pytest.mark.turns(6)
def test_a_rank_that_is_killed_stops_all():
    first, *others = on_ranks(4, fail_between_sums, [2], be_killed, seconds=30, lost=[2])
    assert others[1] is None
    for outcome in (first, others[0], others[2]):
        assert outcome is not None
        assert str(outcome.error).startswith("ProcessError: Rank 2 of 4 stopped")
        assert outcome.seconds < 30


@pytest.mark.turns(6)
@pytest.mark.parametrize(("how", "reason"), [(sleep, "hangs"), (be_stopped, "stopped")])
def test_a_rank_that_hangs_stops_all(how, reason):
    outcomes = on_ranks(4, fail_between_sums, [1], how, seconds=30, lost=[1], FKERNEL_PATIENCE="6")
    assert outcomes[1] is None
    for rank in (0, 2, 3):
        outcome = outcomes[rank]
        assert outcome is not None
        assert f"Rank 1 of 4 {reason}" in str(outcome.error)


@pytest.mark.turns(6)
def test_a_rank_that_computes_for_long_is_waited_for():
    for outcome in on_ranks(2, fail_between_sums, [1], compute, FKERNEL_PATIENCE="3"):
        assert outcome is not None
        assert outcome.error is None
        assert outcome.result.tolist() == [2, 2, 2]


def fail_and_be_heard_late(mesh):
    """All fail alike, and the store gets to what rank 0 told it only after they met."""
    group = group_of(mesh)
    if group.rank == 0:
        agreement._tell = lambda _, key, text: threading.Timer(1.0, group.store.set, (key, text)).start() or text
    with together(group, "sums"):
        raise_same(group.rank)


def test_what_a_rank_failed_of_is_waited_for():
    for outcome in on_ranks(2, fail_and_be_heard_late, seconds=30):
        assert outcome is not None
        assert str(outcome.error).startswith("BatchError: sequence 7 is empty")


def disagree(mesh):
    group = group_of(mesh)
    with together(group, "kernel"):
        agree(group, "the version of torch", "2.13")
        agree(group, "the batch U", f"digest {group.rank // 3}")


def test_ranks_that_disagree_raise_before_anything_is_exchanged():
    for outcome in on_ranks(4, disagree, seconds=30):
        assert outcome is not None
        assert str(outcome.error).startswith(
            "ProcessError: The ranks disagree about the batch U: rank 3 has digest 1, rank 0 has digest 0."
        )


def drawn(mesh, seconds, fails):
    group = group_of(mesh)

    def make():
        time.sleep(seconds)
        if fails:
            raise BatchError("no prompts")
        return {"drawn by": group.rank, "x": torch.arange(3)}

    return [from_first(group, "drawing U", make) for _ in range(2)]


def test_what_rank_0_makes_is_on_every_rank():
    for first, second in results(2, drawn, 0, False):
        assert first["drawn by"] == second["drawn by"] == 0
        assert first["x"].tolist() == [0, 1, 2]


def test_an_error_of_rank_0_alone_is_everyones():
    for outcome in on_ranks(2, drawn, 0, True, seconds=30):
        assert outcome is not None
        assert outcome.error == "ProcessError: Rank 0 of 2 failed: drawing U: BatchError: no prompts"


def use_again(mesh):
    """After an error that all ranks know of, the group goes on."""
    group, seen = group_of(mesh), 0
    for attempt in range(3):
        try:
            with together(group, f"attempt {attempt}"):
                if group.rank == attempt:
                    raise BatchError("once")
                all_sum(group, [torch.ones(1)])
        except Exception:
            seen += 1
    return seen


def test_a_group_survives_errors_that_all_know_of():
    assert results(2, use_again) == [2, 2]
