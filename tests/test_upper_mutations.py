"""What the upper floors promise is broken by one changed line too: a mutated copy of the project must fail its test.

The laws of the engine run inside a mutant (`tests/mutants.py`). Rooms that sample, keep, analyse and report are tested
as a user meets them, so that here the test itself is run again, in a process of its own, on a copy that is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    place = tmp_path_factory.mktemp("copy")
    for name in ("fkernel", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


@pytest.fixture(scope="module")
def zygote():
    """What runs a test of a copy in a forked child: (root, test) -> {"code", "output"}."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "zygote.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(root, test):
            print(json.dumps({"root": str(root), "test": test}), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_changed_line_fails_its_test(mutation, copy, zygote):
    file = copy / "fkernel" / mutation.file
    source = file.read_text()
    assert source.count(mutation.old) == 1, f"{mutation.old!r} stands {source.count(mutation.old)} times"
    try:
        file.write_text(source.replace(mutation.old, mutation.new))
        done = zygote(copy, mutation.law)
    finally:
        file.write_text(source)
    assert done["code"] == 1, done["output"][-3000:]
    assert f"FAILED {mutation.law}" in done["output"], done["output"][-3000:]  # and not an error in setting it up


@pytest.mark.slow
def test_an_unchanged_copy_passes(copy, zygote):
    """Or a mutation might fail for want of anything at all."""
    done = zygote(copy, "tests/analysis/test_tokens.py")
    assert done["code"] == 0, done["output"][-3000:]
