"""What is freed within passes stays for the next of them, or goes back to the system over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fkernel.distributed import Group
from fkernel.engine.recycling import kept_or_returned, release_memory, return_memory, reuse_memory

BYTES = 256 << 20
SOME_GROUP: Any = object.__new__(Group)
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, whose malloc is set")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def left_after_a_block() -> int:
    """Bytes that stay in the process of a block that was used and freed."""
    release_memory()
    before = resident()
    torch.ones(BYTES, dtype=torch.uint8)
    return resident() - before


@pytest.mark.parametrize(("group", "kept"), [(None, True), (SOME_GROUP, False)], ids=["one process", "ranks"])
def test_blocks_are_kept_or_returned(group, kept):
    with kept_or_returned(group):
        assert (left_after_a_block() > BYTES / 2) == kept
    release_memory()


def test_contexts_end_in_any_order():
    """Each sets what is open now, not what was before it."""
    reusing, returning = reuse_memory(), return_memory()
    reusing.__enter__()
    returning.__enter__()
    reusing.__exit__(None, None, None)
    assert left_after_a_block() < BYTES / 2
    with reuse_memory():
        returning.__exit__(None, None, None)
        assert left_after_a_block() > BYTES / 2
