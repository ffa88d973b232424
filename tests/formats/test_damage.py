"""One file of a checkpoint is changed, over all packed runs: it is refused, or loads to the same numbers."""

from __future__ import annotations

import copy
import warnings

import pytest

from tests.formats import damage
from tests.formats.archives import unpack
from tests.formats.places import load, readable

READABLE = readable()


@pytest.mark.turns(6)
@pytest.mark.parametrize("begin", sorted({run.split("_")[0] for run in READABLE}))
def test_a_changed_file_is_refused_or_the_same(begin):
    """`python -m benchmarks.checkpoints --only damage` tries 2,000; each run of a family has its turn here."""
    runs = [run for run in READABLE if run.startswith(begin)]
    found = damage.damage(3 * len(runs), seed=11, runs=runs)
    assert found["wrong"] == []
    assert found["files"] == 3 * len(runs)


@pytest.mark.parametrize("run", READABLE)
def test_what_is_loaded_stays_when_the_files_change(run, tmp_path):
    """Files are mapped while they are read: nothing of them is kept."""
    root = unpack(run, tmp_path) / "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dict(damage.numbers_of(load(run, root)))
    before = {key: copy.deepcopy(value) for key, value in loaded.items()}
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                file.write(b"\x55" * path.stat().st_size)
    assert [key for key, value in loaded.items() if not damage._same(value, before[key])] == []


@pytest.mark.turns(6)
def test_what_passes_is_seen(monkeypatch):
    """Were sums not checked, a flipped bit would be another number, and this would say so."""
    from fkernel.checkpoint import files

    monkeypatch.setattr(files, "check_sums", lambda file, path: None)
    monkeypatch.setattr(damage, "BYTES", ("flip",))
    monkeypatch.setattr(damage, "FILES", ())
    monkeypatch.setattr(damage, "EDITS", ())
    found = damage.damage(60, seed=0, runs=["deepspeed_zero2_fp32"])
    assert any(trial["outcome"] == "OTHER NUMBERS" for trial in found["wrong"])
    assert load  # the runs are loaded as a user would
