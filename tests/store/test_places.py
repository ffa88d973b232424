"""Places that refuse to hold a store."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fkernel.engine.store import open_store
from fkernel.io import atomic, locks, open_direct
from tests.store.common import GROUPS, IDENTITY, ROOT, fail, handles, on_linux, refused


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with refused(f"Cannot create '{tmp_path / 'file'}': it is a file; name a directory"):
        open_store(tmp_path / "file", IDENTITY, GROUPS).__enter__()
    with refused("Cannot create", "it, or a part of its path, is a file; name a directory"):
        open_store(tmp_path / "file" / "store", IDENTITY, GROUPS).__enter__()
    with refused("Cannot create", "File name too long; choose another directory"):
        open_store(tmp_path / ("x" * 300), IDENTITY, GROUPS).__enter__()
    assert (tmp_path / "file").read_text() == "mine"


@on_linux
def test_a_place_that_refuses_even_root():
    with refused("Cannot create '/proc/fkernel'", "choose another directory"):
        open_store("/proc/fkernel", IDENTITY, GROUPS).__enter__()


@pytest.mark.parametrize(
    ("number", "what"),
    [(errno.EROFS, "its file system is read-only"), (errno.EACCES, "permission is denied"), (errno.EIO, "rror")],
)
def test_a_directory_that_turns_read_only(full, monkeypatch, number, what):
    def no_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return fail(number)() if set(mode) & set("wa+") else open(path, mode, *args, **kwargs)

    @contextmanager
    def no_direct_file(path: Any, flags: int = os.O_RDONLY) -> Iterator[int]:
        if flags & os.O_WRONLY:
            fail(number)()
        with open_direct(path, flags) as file:
            yield file

    with open_store(full.with_name("new"), IDENTITY, GROUPS) as store:
        monkeypatch.setattr(locks, "open", no_file, raising=False)
        monkeypatch.setattr(atomic, "open_direct", no_direct_file)
        with refused(f"Cannot write '{store.directory}/shard-", what, "choose"):
            store.write(0, handles(0))
        assert not store.has(0)
    with refused(f"Cannot lock '{full}'", what, "choose"):
        open_store(full, IDENTITY, GROUPS).__enter__()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from fkernel.errors import StoreError
from fkernel.engine.store import open_store
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for name in ("read-only", "read-only/new"):
    try:
        with open_store(name, {"seed": 0}, [slice(0, 1)]):
            print("opened", name)
    except StoreError as error:
        print(error)
"""


def test_a_read_only_directory_for_those_whom_permissions_bind(tmp_path):
    (tmp_path / "place" / "read-only").mkdir(parents=True)
    (tmp_path / "place" / "read-only").chmod(0o555)
    (tmp_path / "place").chmod(0o755)
    command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "place")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    todo = "permission is denied; choose a directory that you may write to."
    assert out == [f"Cannot lock 'read-only': {todo}", f"Cannot create 'read-only/new': {todo}"]
