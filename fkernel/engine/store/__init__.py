"""Gradient handles on disk: a directory of checksummed shards, complete or absent, for one process at a time."""

from fkernel.engine.store.directory import Store, open_store

__all__ = ["Store", "open_store"]
