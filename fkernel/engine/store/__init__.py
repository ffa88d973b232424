"""Gradient handles on disk: a directory of checksummed shards, written atomically, by one process at a time."""

from fkernel.engine.store.directory import MANIFEST, Store, open_store, read_store
from fkernel.engine.store.manifest import differences

__all__ = ["MANIFEST", "Store", "differences", "open_store", "read_store"]
