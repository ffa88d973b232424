"""A complete store."""

from __future__ import annotations

from pathlib import Path

import pytest

from fkernel.engine.store import open_store
from tests.store.common import GROUPS, IDENTITY, fill


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A complete store."""
    with open_store(tmp_path / "store", IDENTITY, GROUPS) as store:
        fill(store)
    return tmp_path / "store"
