"""Offline, seeded, and with every shape annotation executed."""

import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - the hook below finds it as an attribute of `tests`
from tests import offline

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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline():
    offline.REACHED.clear()
    yield
    assert offline.REACHED == [], "the test reached for another machine"
