"""CONTRIBUTING's drawing of the files that U passes, from `fkernel run` to the contributions, is true and short."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fkernel
from fkernel.func.handles.forms import Concat, Factored, SparseRows, Sum
from fkernel.study import FisherKernelRunner
from tests.study.conftest import Run

PACKAGE = Path(fkernel.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
REWARD = "tests.study.conftest.brevity"
FORMS = ("GeneratedBatch", "Sequences", "SortedBatch", "Handles", "KernelBlock")


def drawing() -> Iterator[tuple[list[str], list[str]]]:
    """(files, forms) of each line of the drawing."""
    text = CONTRIBUTING.read_text(encoding="utf-8").split("who follows U from")[1]
    lines = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("    ")]
    for line in lines:
        files = re.findall(r"[\w/]+\.py", line)
        yield files, [word for word in line.split() if word not in (*files, "→")]


def form_of(value: Any) -> str | None:
    """The form of the batch that a value is."""
    first = next(iter(value.values()), None) if isinstance(value, dict) else None
    if isinstance(first, Concat | Factored | SparseRows | Sum):
        return "Handles"
    return name if (name := type(value).__name__) in FORMS else None


@pytest.fixture(scope="module")
def met(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """{file: the forms of a batch that one of its functions held}, of a study that samples U."""
    plan = run.plan(tmp_path_factory.mktemp("path") / "out")
    plan["update"] = {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": REWARD}
    forms = defaultdict[str, set[str]](set)

    def look(frame: FrameType, event: str, returned: Any) -> None:
        place = frame.f_code.co_filename
        if event == "return" and place.startswith(str(PACKAGE)):
            held = {form for value in (returned, *frame.f_locals.values()) if (form := form_of(value))}
            forms[str(Path(place).relative_to(PACKAGE))] |= held

    runner = FisherKernelRunner(plan)
    sys.setprofile(look)
    try:
        runner.run()
    finally:
        sys.setprofile(None)
    return forms


def test_u_is_met_in_every_file_of_the_drawing_in_the_form_that_it_names(met):
    for files, forms in drawing():
        assert [file for file in files if not met.get(file)] == []
        assert {*forms} <= set[str]().union(*(met[file] for file in files))


def test_the_drawing_has_at_most_fifteen_files_and_five_forms():
    lines = [*drawing()]
    files, forms = [file for files, _ in lines for file in files], [form for _, forms in lines for form in forms]
    assert len(files) == len({*files}) <= 15
    assert sorted(forms) == sorted(FORMS)
