"""Ctrl-C and SIGKILL in the middle of each strategy, and what a store serves afterwards."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fkernel as fk
from fkernel import precond
from fkernel.kernel import recycling

W = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
PARAMS = {"w": W}
P = precond.diagonal({"w": 1 + W.square()})
E, U = (
    torch.linspace(-1, 1, 3 * 8, dtype=torch.float64).reshape(3, 2, 4),
    torch.arange(40.0).double().reshape(5, 2, 4).sin(),
)
STRATEGIES = [
    fk.Strategy("memory", "E", None, 2, 1, True),
    fk.Strategy("factored", "E", None, 2, 1, False),
    fk.Strategy("store", "E", 1, 2, 1, False),
    fk.Strategy("recompute", "E", 1, 2, 1, False),
]


def f(params, x):
    return torch.nn.functional.linear(x, params["w"]).tanh().sum((1, 2))


class Stopping:
    """f that does something else at one of its calls."""

    def __init__(self, at, act):
        self.calls, self.at, self.act = 0, at, act

    def __call__(self, params, x):
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return f(params, x)


def computed(f, strategy, directory):
    return fk.kernel(f, PARAMS, E, U, P, strategy=strategy, store=directory)


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def expected():
    return fk.kernel(f, PARAMS, E, U, P)


@pytest.mark.parametrize("at", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_after_ctrl_c_the_same_call_gives_the_same_kernel(strategy, at, tmp_path, expected):
    with pytest.raises(KeyboardInterrupt):
        computed(Stopping(at, interrupt), strategy, tmp_path)
    assert recycling._depth == [0]  # malloc's thresholds are back
    torch.testing.assert_close(computed(Stopping(0, interrupt), strategy, tmp_path), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_after_sigkill_the_same_call_gives_the_same_kernel(strategy, tmp_path, expected):
    code = (
        "import os, signal; from tests.test_interrupted import *\n"
        "kill = Stopping(6, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        f"computed(kill, STRATEGIES[{STRATEGIES.index(strategy)}], {str(tmp_path)!r})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    counting = Stopping(0, interrupt)
    torch.testing.assert_close(computed(counting, strategy, tmp_path), expected, rtol=1e-12, atol=1e-12)


def test_a_second_call_reads_what_the_first_one_stored(tmp_path, expected):
    """The first makes a plan, E's three gradients and U's five; the second a plan, E's three and one to compare."""
    store = STRATEGIES[2]
    for calls in (1 + 3 + 5, 1 + 3 + 1):
        counting = Stopping(0, interrupt)
        torch.testing.assert_close(computed(counting, store, tmp_path), expected, rtol=1e-12, atol=1e-12)
        assert counting.calls == calls


@pytest.mark.parametrize("other", ["params", "batch", "f"])
def test_a_store_of_something_else_is_refused(other, tmp_path):
    computed(f, STRATEGIES[2], tmp_path)
    params = {"w": W + 1e-6} if other == "params" else PARAMS
    batch = U.flip(0) if other == "batch" else U
    changed = (lambda p, x: 1.01 * f(p, x)) if other == "f" else f
    with pytest.raises(fk.StoreError, match="another function" if other == "f" else "something else"):
        fk.kernel(changed, params, E, batch, P, strategy=STRATEGIES[2], store=tmp_path)
    computed(f, STRATEGIES[2], tmp_path)  # left as it was


def test_a_store_needs_a_place():
    with pytest.raises(fk.BatchError, match='store="directory"'):
        fk.kernel(f, PARAMS, E, U, P, strategy=STRATEGIES[2])


def test_a_flipped_bit_is_never_served(tmp_path):
    computed(f, STRATEGIES[2], tmp_path)
    shard = sorted((tmp_path / "U").glob("shard-*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(fk.StoreError, match="not served"):
        computed(f, STRATEGIES[2], tmp_path)


def test_any_preconditioner_may_stand_over_a_store(tmp_path):
    """What is stored is U's own gradients: P may change from call to call."""
    for scale in (1.0, 2.0):
        any_P = lambda tree, scale=scale: {"w": scale * P(tree)["w"]}  # noqa: E731
        K = fk.kernel(f, PARAMS, E, U, any_P, strategy=STRATEGIES[2], store=tmp_path)
        torch.testing.assert_close(K, scale * fk.kernel(f, PARAMS, E, U, P), rtol=1e-12, atol=1e-12)
