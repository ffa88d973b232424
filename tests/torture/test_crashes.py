"""A small instance of `make torture`: some crash points of what is quick to call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Path]:
    """A file system whose times are whole seconds, as of many a network: ext2 with inodes of 128 bytes."""
    image, place = tmp_path / "image", tmp_path / "coarse"
    place.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 64 << 20)
    for command in (["mkfs.ext2", "-q", "-I", "128", str(image)], ["mount", "-o", "loop", str(image), str(place)]):
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("making a file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize(
    "names", [("sample",), pytest.param(("store", "record, another run"), marks=pytest.mark.turns(6))]
)
def test_what_is_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, names):
    stopped(tmp_path, tmp_path, names, every=24)


@pytest.mark.turns(6)
def test_where_file_times_are_whole_seconds(coarse, tmp_path):
    """Files that are written within one second are told apart by no time."""
    stopped(coarse, tmp_path, ("store",), every=30)
    assert all(path.stat().st_mtime_ns % 10**9 == 0 for path in coarse.iterdir())


def stopped(disk: Path, tmp_path: Path, names: tuple[str, ...], every: int) -> None:
    """Stop some scenarios at every so many places, on a disk."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture.crashes", "--out", str(tmp_path / "found.json")]
    command += ["--every", str(every), "--random", "1", "--seconds", "30", *(f"--only={name}" for name in names)]
    environment = {**os.environ, "TMPDIR": str(disk)}
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert out.returncode == 0, out.stdout + out.stderr
    found = json.loads((tmp_path / "found.json").read_text())["scenarios"]
    assert tuple(found) == names
    for each in found.values():
        assert not each["wrong"]
        assert not each["a power cut could lose"]
        assert each["killed"] > 0
        assert each["killed at random moments"] > 0
