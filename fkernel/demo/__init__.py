"""The demo's policy: a small real model, trained here, and real REINFORCE steps whose last one is kept.

Nothing in this room knows the engine: the policy is trained, and its steps are taken, with torch and transformers
alone, on batches that `fkernel.rollout` samples.
"""

from fkernel.demo.cache import DemoConfig, cache_key, default_cache_root, prepare, seeded
from fkernel.demo.policy import PolicyConfig, SupervisionConfig
from fkernel.demo.reinforce import ReinforceConfig
from fkernel.demo.task import TaskConfig

__all__ = [
    "DemoConfig",
    "PolicyConfig",
    "ReinforceConfig",
    "SupervisionConfig",
    "TaskConfig",
    "cache_key",
    "default_cache_root",
    "prepare",
    "seeded",
]
