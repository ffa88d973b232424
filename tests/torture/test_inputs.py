"""A small instance of `python -m tests.torture.inputs`: bad inputs are refused, or taken and right."""

from __future__ import annotations

import pytest

from tests.torture.families import FAMILIES
from tests.torture.inputs import tortured, trial
from tests.torture.rightness import NotRightError


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("hostile files", "commands")])
def test_bad_inputs(name, tmp_path):
    """Hostile files and commands have tests of their own in `tests/bad_input/` and `tests/study/test_cli.py`.

    Here annotations are executed; `tests/bad_input/unannotated.py` is without them, as is the whole torture.
    """
    found = {"tried": 0, "outcomes": {}, "wrong": []}
    tortured(name, FAMILIES[name][1], 12, 1, found, lambda: None)
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == 12


def test_what_is_wrong_is_seen():
    def raw(_):
        return "a raw error", lambda: {}["x"]

    def not_right(_):
        def call():
            raise NotRightError("NOT FINITE", "a NaN")

        return "a NaN", call

    assert trial(raw, "raw", 0, 0)[1] == "RAW KeyError"
    assert trial(not_right, "nan", 0, 0)[1] == "NOT FINITE"
