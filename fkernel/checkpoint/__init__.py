"""From files to what the engine takes: a model, or its skeleton, and AdamW's state keyed by parameter name."""

from fkernel.checkpoint.model import load_model
from fkernel.checkpoint.optimizer import adamw_state, load_adamw_state
from fkernel.checkpoint.skeleton import Skeleton, estimate_model, skeleton_of, workload_of

__all__ = [
    "Skeleton",
    "adamw_state",
    "estimate_model",
    "load_adamw_state",
    "load_model",
    "skeleton_of",
    "workload_of",
]
