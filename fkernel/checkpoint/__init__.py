"""From files to what the engine takes: a model, or its skeleton, and an optimizer's state by parameter name."""

from fkernel.checkpoint.conditions import Condition
from fkernel.checkpoint.files import read_json, read_tensors
from fkernel.checkpoint.formats import STATE_PLACES, find_layout
from fkernel.checkpoint.in_shards import ShardedCheckpoint, in_slices, load_shards
from fkernel.checkpoint.loading import Checkpoint, Provenance, load
from fkernel.checkpoint.model import load_adapter, load_model, load_tokenizer
from fkernel.checkpoint.optimizer import adamw_state, load_adamw_state, optimizer_state, stored_optimizer_state
from fkernel.checkpoint.order import ORDERS
from fkernel.checkpoint.skeleton import Skeleton, estimate_model, skeleton_of, workload_of
from fkernel.checkpoint.unread import has_no_optimizer
from fkernel.checkpoint.weights import architecture

__all__ = [
    "ORDERS",
    "STATE_PLACES",
    "Checkpoint",
    "Condition",
    "Provenance",
    "ShardedCheckpoint",
    "Skeleton",
    "adamw_state",
    "architecture",
    "estimate_model",
    "find_layout",
    "has_no_optimizer",
    "in_slices",
    "load",
    "load_adamw_state",
    "load_adapter",
    "load_model",
    "load_shards",
    "load_tokenizer",
    "optimizer_state",
    "read_json",
    "read_tensors",
    "skeleton_of",
    "stored_optimizer_state",
    "workload_of",
]
