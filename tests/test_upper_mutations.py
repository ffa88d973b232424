"""What the upper floors promise is broken by one changed line too: a mutated copy of the project must fail its test.

The laws of the engine run inside a mutant (`tests/mutants.py`). Rooms that sample, keep, analyse and report are tested
as a user meets them, so that here the test itself is run again, in a process of its own, on a copy that is changed.
`make mutants` tries all of them, two copies at once; of those in `make test` see `tests/turns.py`.
"""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutants import Mutation
from tests.mutations import ALL

ROOT = Path(__file__).parent.parent
UNCHANGED = Mutation("nothing", "tests/analysis/test_tokens.py", "analysis/tokens.py", "", "")
AT_ONCE = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


class Bench(NamedTuple):
    """A copy of the project, and what runs its tests in forked children."""

    copy: Path
    zygote: subprocess.Popen[str]

    def tried(self, mutation: Mutation) -> tuple[int, str]:
        """Run a test of the copy with one line changed: pytest's exit status, and what it printed."""
        file = self.copy / "fkernel" / mutation.file
        source = file.read_text()
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        try:
            file.write_text(source.replace(mutation.old, mutation.new) if mutation.old else source)
            print(json.dumps({"root": str(self.copy), "test": mutation.law}), file=self.zygote.stdin, flush=True)
            done = json.loads(self.zygote.stdout.readline())
        finally:
            file.write_text(source)
        return done["code"], done["output"]


def bench(place: Path) -> Bench:
    for name in ("fkernel", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", place)
    # Compiled once: what is valid is told by a file's hash, so that a changed line is always seen.
    compileall.compile_dir(place, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "FKERNEL_UNCHECKED": "1"}
    command, pipe = [sys.executable, str(ROOT / "tests" / "zygote.py")], subprocess.PIPE
    return Bench(place, subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True))


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """{mutation: its outcome, or the promise of it}, of those whose tests were selected."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = [*dict.fromkeys(item.callspec.params["mutation"] for item in items if "outcomes" in item.fixturenames)]
    free: queue.Queue[Bench] = queue.Queue()
    benches = [bench(tmp_path_factory.mktemp("copy")) for _ in range(AT_ONCE)]
    for one in benches:
        free.put(one)

    def tried(mutation):
        one = free.get()
        try:
            return one.tried(mutation)
        finally:
            free.put(one)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {mutation: pool.submit(tried, mutation) for mutation in (UNCHANGED, *chosen)}
        pool.shutdown(cancel_futures=True)
    for one in benches:
        one.zygote.communicate()


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_what_is_to_be_changed_stands_once_and_its_test_exists(mutation):
    found = (ROOT / "fkernel" / mutation.file).read_text().count(mutation.old)
    assert found == 1, f"{mutation.old!r} stands {found} times"
    file, _, test = mutation.law.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()


@pytest.mark.turns(30)
@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_a_changed_line_fails_its_test(mutation, outcomes):
    code, output = outcomes[mutation].result()
    assert code == 1, output[-3000:]
    assert f"FAILED {mutation.law}" in output, output[-3000:]  # and not an error in setting it up


def test_an_unchanged_copy_passes(outcomes):
    """Or a mutation might fail for want of anything at all."""
    code, output = outcomes[UNCHANGED].result()
    assert code == 0, output[-3000:]
