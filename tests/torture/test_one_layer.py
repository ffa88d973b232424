"""Everything that is written goes through `fkernel.io`: whole or absent, flushed, swept where its writer died."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fkernel

ROOT = Path(fkernel.__file__).parent
WRITING = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "touch", "savefig", "save_file", "symlink_to"),
    *("unlink", "rmdir", "rmtree", "removedirs"),
}
WITHIN = {
    ("report/style.py", "savefig"): "to the temporary path of atomic_file",
    ("study/results.py", "write_text"): "to the temporary path of atomic_file",
    ("record/policy.py", "unlink"): "in the folder of atomic_directory",
    ("demo/export.py", "write_text"): "into the folder of atomic_directory",
}
"""What writes within a block of `fkernel.io`."""


def writes(source: str) -> set[str]:
    """Names of methods and functions called in a source that write past `fkernel.io`."""
    return calls(source) & WRITING


def calls(source: str) -> set[str]:
    """Names of methods and functions that are called in a source."""
    called = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in called}


@pytest.mark.turns(6)
def test_nothing_is_written_past_the_layer() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.rglob("*.py")
        if path.parent != ROOT / "io"
        for name in writes(path.read_text(encoding="utf-8"))
    }
    assert found <= {*WITHIN}


def test_nothing_needs_hard_links() -> None:
    """Many a network's file system has none."""
    for path in ROOT.rglob("*.py"):
        assert not calls(path.read_text(encoding="utf-8")) & {"link", "hardlink_to"}, path


def test_the_check_sees_a_breach() -> None:
    assert writes("from pathlib import Path\nPath('x').write_text('y')\n") == {"write_text"}
    assert writes("import shutil\nshutil.rmtree('x')") == {"rmtree"}
    assert "link" in calls("import os\nos.link('x', 'y')")
