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

from tests.mutations import ALL, QUICK, SLOW

ROOT = Path(__file__).parent.parent
TRIED = ALL if os.environ.get("FKERNEL_MUTANTS") == "all" else [*QUICK, *(kind[0] for kind in SLOW)]


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
        tasks, answers = process.stdin, process.stdout
        assert tasks is not None
        assert answers is not None

        def ask(root, test):
            print(json.dumps({"root": str(root), "test": test}), file=tasks, flush=True)
            return json.loads(answers.readline())

        yield ask
        tasks.close()


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_what_is_to_be_changed_stands_once_and_its_test_exists(mutation):
    found = (ROOT / "fkernel" / mutation.file).read_text().count(mutation.old)
    assert found == 1, f"{mutation.old!r} stands {found} times"
    file, _, test = mutation.law.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", TRIED, ids=lambda mutation: mutation.name)
def test_a_changed_line_fails_its_test(mutation, copy, zygote):
    file = copy / "fkernel" / mutation.file
    source = file.read_text()
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
