"""The demo: a small model, trained here, and REINFORCE steps whose last one is saved and explained.

Training does not use the engine: only torch and transformers, on batches that `fkernel.rollout` samples.
"""

from fkernel.demo.cache import DemoConfig, cache_key, default_cache_root, prepare, seeded
from fkernel.demo.explain import demo_plan
from fkernel.demo.policy import PolicyConfig, SupervisionConfig
from fkernel.demo.progress import visible
from fkernel.demo.task import TaskConfig
from fkernel.demo.training import ReinforceConfig

__all__ = [
    "DemoConfig",
    "PolicyConfig",
    "ReinforceConfig",
    "SupervisionConfig",
    "TaskConfig",
    "cache_key",
    "default_cache_root",
    "demo_plan",
    "prepare",
    "seeded",
    "visible",
]
