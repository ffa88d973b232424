"""Public functions say what they were given when it does not fit, each by its own name and its arguments'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input import unannotated
from tests.torture.examples import example_calls, public_functions


@pytest.mark.parametrize("name", public_functions())
def test_every_public_function_has_an_example_that_calls_it(name):
    """What the torture of arguments spoils are those of the example: a new function without one fails here."""
    assert example_calls(name)


@pytest.mark.turns(6)
def test_what_is_refused_where_annotations_are_not_executed():
    """As users run it: a process without the checks that the suite adds; nor is a function without its boundary."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bad_input.unannotated"]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    assert out.stdout.splitlines() == [f"{name}: as expected" for name in unannotated.CASES] + ["without: []"]
