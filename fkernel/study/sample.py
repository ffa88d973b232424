"""`fkernel sample PLAN`: sample one batch from a checkpoint and prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from fkernel.errors import RolloutError
from fkernel.io import check_writable
from fkernel.rollout import GeneratedBatch, save_batch
from fkernel.study.config.base import SourcePlan
from fkernel.study.config.values import Place
from fkernel.study.draws import AnyDraw


class SamplePlan(SourcePlan):
    """One batch: of which checkpoint, from which prompts, how many, and where it is saved."""

    microbatch: int = Field(32, gt=0)
    request: AnyDraw
    out: Place = Field(description="directory that the batch is saved to; it must not exist")


def sampled(plan: SamplePlan, on_progress: Callable[[int], Any] = lambda n: None) -> GeneratedBatch:
    """Sample and save a plan's batch.

    Raises:
        FKernelError: the checkpoint, the prompts or `out` is invalid, or `out` cannot be written.
    """
    if Path(plan.out).exists():  # checked before sampling
        raise RolloutError(f"There is something at {plan.out} already; choose another directory (out:), or delete it.")
    check_writable(Path(plan.out).parent)
    sources = plan.sources()  # read before the checkpoint is loaded
    generator = plan.generator(plan.checkpoint.load(), sources, plan.microbatch, on_progress)
    batch = plan.request.generate(generator)
    save_batch(batch, plan.out)
    return batch
