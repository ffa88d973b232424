"""Whoever shows how far a run is hears of every part."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from fkernel.demo import visible
from fkernel.engine import part_done
from fkernel.study.log import doing, shown


def test_parts_are_told_and_what_had_none_ends_too():
    seen = []
    part_done(3)  # nobody listens
    with shown(lambda *how: seen.append(how)):
        with doing("a"):
            part_done(3)
            with doing("b"):
                part_done()
            part_done(3)
        with doing("c"):
            pass
    assert seen == [("a", 0, 0), ("a", 1, 3), ("b", 0, 0), ("b", 1, 0), ("b", 0, 1), ("a", 1, 3), ("a", 0, 2),
                    ("c", 0, 0), ("c", 1, 1)]  # fmt: skip


def test_a_run_tells_of_its_contraction(run, tmp_path):
    from fkernel.study import FisherKernelRunner

    seen = []
    FisherKernelRunner(run.plan(tmp_path / "out"), on_progress=lambda *how: seen.append(how)).run()
    told = {what for what, _, _ in seen}
    assert {"loading the checkpoint", "gradients of U", "held_out: gradients and contraction"} <= told
    parts = [(n, total) for what, n, total in seen if what == "held_out: gradients and contraction"]
    assert sum(n for n, _ in parts) == parts[-1][1]


@pytest.mark.parametrize(("seconds", "lines"), [(2.0, 1), (0.0, 0)])
def test_in_a_file_bars_end_with_their_line_and_nothing_is_no_line(seconds, lines):
    file = io.StringIO()
    with visible(Console(file=file, width=80)) as bars:
        bars.get_time = itertools.count(0.0, seconds).__next__
        bars.update(bars.add_task("gradients", total=2), completed=2)
    assert file.getvalue().count("\n") == lines
    assert ("gradients" in file.getvalue()) == bool(lines)
