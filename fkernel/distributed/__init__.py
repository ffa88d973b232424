"""Several processes that compute together: agreement before work, one error for all, exchange of rows and sums.

Floor 0: nothing here knows models, gradients or files. A room of its own, since the engine, the study and the command
line all compute over the same group of ranks.
"""

from fkernel.distributed.agreement import agree, from_first, together
from fkernel.distributed.exchange import (
    BUCKET,
    all_sum,
    buckets,
    exchange_rows,
    fetch_rows,
    gather_numbers,
    gather_shards,
    shard_of,
    shard_tree,
    share_of,
)
from fkernel.distributed.group import Group, group_of
from fkernel.distributed.launcher import join, launch, launched
from fkernel.distributed.sharded import ShardedTree, gather_tree, is_distributed, local_tree

__all__ = [
    "BUCKET",
    "Group",
    "ShardedTree",
    "agree",
    "all_sum",
    "buckets",
    "exchange_rows",
    "fetch_rows",
    "from_first",
    "gather_numbers",
    "gather_shards",
    "gather_tree",
    "group_of",
    "is_distributed",
    "join",
    "launch",
    "launched",
    "local_tree",
    "shard_of",
    "shard_tree",
    "share_of",
    "together",
]
