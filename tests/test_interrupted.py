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
from fkernel.engine import recycling
from fkernel.engine.store import Store
from fkernel.func.trust.comparisons import NAMES

W = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
PARAMS = {"w": W}
P = precond.diagonal({"w": 1 + W.square()})
E, U = (
    torch.linspace(-1, 1, 3 * 8, dtype=torch.float64).reshape(3, 2, 4),
    torch.arange(40.0).double().reshape(5, 2, 4).sin(),
)
STRATEGIES = [
    fk.Strategy("sequences", "E", None, 2, 1),
    fk.Strategy("sequences", "E", None, 2, 1),
    fk.Strategy("store", "E", 1, 2, 1),
    fk.Strategy("sequences", "E", 1, 2, 1),
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
    assert recycling._reusing == recycling._returning == [0]  # malloc's thresholds are back
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
    """The first makes a plan of three probes, E's three gradients and U's five; the second a plan, and one of each."""
    store = STRATEGIES[2]
    for calls in (3 + 3 + 5, 3 + 1 + 1):
        counting = Stopping(0, interrupt)
        with fk.func.skip_certificates(*NAMES):
            torch.testing.assert_close(computed(counting, store, tmp_path), expected, rtol=1e-12, atol=1e-12)
        assert counting.calls == calls


@pytest.mark.parametrize("other", ["params", "U", "E", "microbatch"])
def test_a_store_keeps_what_is_different_apart(other, tmp_path, expected):
    computed(f, STRATEGIES[2], tmp_path)
    params = {"w": W + 1e-6} if other == "params" else PARAMS
    E_, U_ = E.flip(0) if other == "E" else E, U.flip(0) if other == "U" else U
    strategy = STRATEGIES[2]._replace(tokens=2) if other == "microbatch" else STRATEGIES[2]
    K = fk.kernel(f, params, E_, U_, P, strategy=strategy, store=tmp_path)
    torch.testing.assert_close(K, fk.kernel(f, params, E_, U_, P), rtol=1e-12, atol=1e-12)
    new = {"params": 2, "U": 1, "E": 1, "microbatch": 2}[other]
    assert len([*tmp_path.iterdir()]) == 2 + new
    torch.testing.assert_close(computed(f, STRATEGIES[2], tmp_path), expected, rtol=1e-12, atol=1e-12)


def test_a_store_of_another_function_is_refused(tmp_path):
    def g(scale):
        return lambda p, x: scale * f(p, x)

    fk.kernel(g(1.0), PARAMS, E, U, P, strategy=STRATEGIES[2], store=tmp_path)
    with pytest.raises(fk.StoreError, match="another function"):
        fk.kernel(g(1.01), PARAMS, E, U, P, strategy=STRATEGIES[2], store=tmp_path)
    fk.kernel(g(1.0), PARAMS, E, U, P, strategy=STRATEGIES[2], store=tmp_path)  # left as it was


@pytest.mark.parametrize("tile", [None, 1, 2])
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("held", ["E", "U"])
def test_a_store_is_contracted_in_any_parts(held, tile, block, tmp_path, expected):
    strategy = fk.Strategy("store", held, tile, block, 2)
    torch.testing.assert_close(computed(f, strategy, tmp_path), expected, rtol=1e-12, atol=1e-12)
    K = fk.kernel(f, PARAMS, U, U, P, strategy=strategy, store=tmp_path)
    torch.testing.assert_close(K, fk.kernel(f, PARAMS, U, U, P), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_written_is_an_error_of_the_call_that_wrote_it(tmp_path, monkeypatch):
    """Writing goes on beside the next pass, in a thread of its own."""

    def full(self, i, handles):
        raise fk.StoreError(f"No room for shard {i}")

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(fk.StoreError, match="No room for shard 0"):
        computed(f, STRATEGIES[2], tmp_path)


def test_a_store_needs_a_place():
    with pytest.raises(fk.BatchError, match='store="directory"'):
        fk.kernel(f, PARAMS, E, U, P, strategy=STRATEGIES[2])


def test_a_flipped_bit_is_never_served(tmp_path):
    computed(f, STRATEGIES[2], tmp_path)
    shard = sorted(tmp_path.glob("U-*/shard-*.safetensors"))[2]
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
