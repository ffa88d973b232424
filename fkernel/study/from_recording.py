"""A plan about a recorded step: what the recording knows of it is filled in where the plan is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel.errors import PlanError
from fkernel.record import Recording
from fkernel.study.config.loss import TokenWeightsLoss
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import Recorded
from fkernel.study.config.step import MicrobatchPlan
from fkernel.study.from_dump import as_dumped


def as_recorded(plan: FisherKernelPlan) -> FisherKernelPlan:
    """Fill in the step of a plan whose update batch is a recorded one, or one that a trainer dumped.

    Any other plan is returned as it is; of a dumped batch see `fkernel.study.from_dump`.

    The loss is the batch's token weights, c the recorded factor; micro-batches, autocast, attention and head are the
    training's; `step.after` is the snapshot after the step, where there is one. What the plan says is left as it is.

    Args:
        plan: any.

    Raises:
        PlanError: neither the update batch nor the checkpoint names a recording and a step, or they are not there; or
            the plan does not say what a dump does not.
    """
    update = plan.update
    if not isinstance(update, Recorded):
        return as_dumped(plan)
    place, number = update.recording or plan.checkpoint.recording, update.step
    number = plan.checkpoint.step if number is None else number
    if place is None or number is None:
        raise PlanError(
            "update: {kind: recorded} needs a recording and a step; name them there, or as checkpoint: {recording: "
            "DIR, step: 12}."
        )
    if not Path(place).is_dir():
        raise PlanError(f"update.recording: there is nothing at {place}; expected a recording's directory.")
    recording = Recording.open(place)
    step, about = recording.step(number), recording.about
    own, fills = plan.step, dict[str, Any]()
    if own.loss is None:
        fills["loss"] = TokenWeightsLoss(kind="token_weights")
    if own.max_norm is None and own.clip is None and step.clip < 1:
        fills["clip"] = step.clip
    if own.autocast is None:
        fills["autocast"] = about["autocast"]
    if own.microbatches is None:
        ids = [record.sequence_id for record in step.records]
        fills["microbatches"] = tuple(
            MicrobatchPlan(
                sequence_ids=tuple(ids[row] for row in each.rows), prompt_width=each.prompt_width, width=each.width
            )
            for each in step.passes
        )
    given = own.model_fields_set
    if "head" not in given:
        fills["head"] = about["head"]
    if "attention" not in given and recording.attention is not None:
        fills["attention"] = recording.attention
    if own.after is None and number + 1 in recording.snapshots and plan.checkpoint.recording == place:
        fills["after"] = plan.checkpoint.model_copy(update={"step": number + 1})
    return plan.model_copy(
        update={
            "update": update.model_copy(update={"recording": place, "step": number}),
            "step": own.model_copy(update=fills),
        }
    )
