"""Lengths of a plan's sequences: counted where the batch exists, assumed where it would be sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from fkernel.checkpoint import Checkpoint
from fkernel.errors import PlanError
from fkernel.record import Recording
from fkernel.rollout import GeneratedBatch, SampleGenerator, custom, load_batch, render
from fkernel.study.config.dump import TrainerDump
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import FromFile, Payload, Recorded, UpdateBatch
from fkernel.study.workspace import selected

FIRST = 64
"""Prompts of a split that are tokenized."""


def lengths_of(plan: FisherKernelPlan, loaded: Checkpoint) -> tuple[dict[str, list[int]], list[str]]:
    """Count the tokens of every sequence of U and of each request, prompt and response together.

    Args:
        plan: the plan.
        loaded: its checkpoint, for the tokenizer.

    Returns:
        ({"U": …, name of a request: …}, what was assumed, a sentence each).

    Raises:
        PlanError: a batch is returned by a callback, so that its lengths are unknown.
    """
    lengths, assumed = dict[str, list[int]](), list[str]()
    generator = cache(lambda: plan.generator(loaded, plan.sources()))

    for name, one in [("U", plan.update), *((str(request.name), request) for request in plan.requests)]:
        if isinstance(one, UpdateBatch) and one.is_own:
            lengths[name] = lengths["U"]
        elif (batch := _given(one, name, generator)) is not None:
            kept = batch.ids if (ids := getattr(one, "sequence_ids", None)) is None else selected(batch.ids, ids, name)
            lengths[name] = [len(batch.by_id(i).prompt_ids) + len(batch.by_id(i).response_ids) for i in kept]
        else:
            longest, size = max(_prompts(plan, one, generator())), one.size
            lengths[name] = [longest + plan.sampling.max_new_tokens] * size
            assumed.append(
                f"{name}: {size} sequences as long as any, {longest} tokens and {plan.sampling.max_new_tokens} drawn; "
                f"the time to draw them is not counted"
            )
    return lengths, assumed


def _given(one: Any, name: str, generator: Callable[[], SampleGenerator]) -> GeneratedBatch | None:
    """The batch, where it need not be sampled; else None."""
    if isinstance(one, FromFile):
        return load_batch(one.path)
    if isinstance(one, Recorded):
        assert one.recording is not None
        assert one.step is not None
        return Recording.open(one.recording).step(one.step).batch
    if isinstance(one, TrainerDump):
        return one.read(generator())
    if isinstance(one, Payload) and one.callback is not None:
        raise PlanError(f"{name} is made by {one.callback}, and nobody knows its sequences before; save it to a file.")
    if isinstance(one, Payload):
        return one.batch if one.batch is not None else one.of_any(generator())
    return one.generate(generator()) if one.kind == "custom_sequence" else None


def _prompts(plan: FisherKernelPlan, one: Any, generator: SampleGenerator) -> list[int]:
    """Token counts of the prompts: of all custom ones, or of the first `FIRST` of a split."""
    if one.kind == "custom_prompts":
        prompts = custom(one.prompts)
    else:
        source = plan.sources()[one.dataset_split]
        prompts = [source[i] for i in range(min(FIRST, len(source)))]
    return [len(generator.tokenizer.encode(render(generator.template, prompt))) for prompt in prompts]
