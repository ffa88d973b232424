"""Offline, seeded, and with annotations executed."""

import gc
import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

from tests import offline, turns, typecheck

os.environ["HF_HUB_OFFLINE"] = "1"
# The tensors here are small: a second thread gains nothing, and beside another process it costs ten times the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
if "FKERNEL_UNCHECKED" not in os.environ:  # a changed copy has a single test to run, and checks take longest to compile
    install_import_hook("fkernel", "tests.typecheck.check")

hypothesis.settings.register_profile(
    "laws",
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("laws"), max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


offline.watch()


def pytest_configure(config):
    given = getattr(config, "workerinput", None)  # a worker is told by the process that it works for
    config.stash[turns.TURN] = turns.turn_of(config) if given is None else given["turn"]
    typecheck.turn = config.stash[turns.TURN]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["turn"] = node.config.stash[turns.TURN]


def pytest_collection_modifyitems(config, items):
    left = {*turns.waiting(items, config.stash[turns.TURN])}
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=[*left])


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # torch, transformers and thousands of tests, which every collection of garbage would walk through


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[turns.TURN] is not None:
        terminalreporter.write_line("Slow tests take turns, which change with every commit; `make test-all` runs all.")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline():
    offline.REACHED.clear()
    yield
    assert offline.REACHED == [], "the test reached for another machine"
