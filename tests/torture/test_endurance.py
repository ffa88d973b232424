"""A small instance of the endurance of `make torture`; of time, which others on the machine take, nothing is asked."""

from __future__ import annotations

import pytest

from tests.study.conftest import run  # noqa: F401 - a fixture
from tests.torture.endurance import requests, series, steps, wrong_with


@pytest.mark.turns(6)
def test_requests_and_recorded_steps_leave_memory_and_files_as_they_were(run, tmp_path):  # noqa: F811
    for found in (steps(tmp_path / "recording", 40), requests(run, tmp_path / "out", 12)):
        assert {*wrong_with(found)} <= {"calls get slower"}


def test_what_grows_is_seen(tmp_path):
    kept = list[object]()

    def leaking(i):
        kept.extend((bytearray(10**7), (tmp_path / str(i)).open("w")))

    found = series((lambda i=i: leaking(i)) for i in range(40))
    assert {*wrong_with(found)} >= {"memory grows", "files stay open"}
