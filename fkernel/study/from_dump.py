"""A plan about a batch that a trainer dumped: what its files do not say is asked for at once, by the plan's keys."""

from __future__ import annotations

from fkernel.checkpoint import Checkpoint
from fkernel.errors import PlanError, RolloutError
from fkernel.record.dumps import Dump, locate
from fkernel.study.config.dump import TrainerDump
from fkernel.study.config.loss import TokenWeightsLoss
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import Recorded

TITLES = {
    "trl": "TRL",
    "nemo_rl": "NeMo-RL",
    "prime_rl": "prime-rl",
    "open_instruct": "open-instruct",
    "slime": "slime",
    "verl": "verl",
}
ASKED = {
    "loss": "update.loss: the loss of the step: {kind: policy_gradient} where it was the first on its batch, so that "
    "all ratios are 1, and nothing stands beside them; else such as {kind: clipped_ratio, low: 0.2, high: 0.2%s}",
    "old": "update.loss.old: the checkpoint before the first step on this batch, {path: …}; or "
    "{kind: policy_gradient}, where that is the plan's own",
    "weights": "update.weights: what the loss divides by: dapo (tokens of the step), grpo (tokens of the response, "
    "then responses), sequence, dr_grpo, group_token, or a token's weight, a number",
    "batch_size": "update.batch_size: sequences of one optimizer step",
    "advantage": "update.advantage: the rule that made advantages of rewards: grpo, group_mean, rloo, raw, or "
    "module.function",
    "temperature": "sampling.temperature: at which the run sampled, and its loss is",
    "max_new_tokens": "sampling.max_new_tokens: the most tokens of a response; a shorter one ended by itself",
    "prompts": "prompts: the run's data set, with template: chat",
    "mask_truncated": "update.mask_truncated: whether the loss left responses out that were cut off, where any were",
}
"""What may be lacking, and the key that says it."""
OWN_NAMES = {
    ("trl", "batch_size"): "per_device_train_batch_size · gradient_accumulation_steps · processes",
    ("trl", "weights"): "TRL's loss_type",
    ("trl", "max_new_tokens"): "TRL's max_completion_length",
    ("trl", "mask_truncated"): "TRL's mask_truncated_completions, true or false",
    ("nemo_rl", "batch_size"): "policy.train_global_batch_size",
    ("nemo_rl", "weights"): "dapo with token_level_loss, else grpo",
    ("prime_rl", "loss"): "{kind: dppo} is prime-rl's default, {kind: ipo} the other",
    ("open_instruct", "batch_size"): "all rows of a step with num_mini_batches 1",
    ("open_instruct", "weights"): "dapo with loss_denominator token, else 1/loss_denominator",
    ("slime", "weights"): "dapo with --calculate-per-token-loss, else grpo",
    ("slime", "batch_size"): "--global-batch-size",
    ("slime", "advantage"): "grpo with --grpo-std-normalization",
    ("verl", "batch_size"): "actor.ppo_mini_batch_size · rollout.n",
    ("verl", "weights"): "loss_agg_mode: dapo for token-mean, grpo for seq-mean-token-mean, sequence for "
    "seq-mean-token-sum",
    ("verl", "advantage"): "algorithm.adv_estimator",
    ("verl", "max_new_tokens"): "data.max_response_length",
}
"""What the trainer calls it."""


def as_dumped(plan: FisherKernelPlan) -> FisherKernelPlan:
    """Fill in whose dump the plan's update batch is, and its step; any other plan is returned as it is.

    Args:
        plan: any.

    Raises:
        PlanError: there is no such dump, or the plan does not say what its files do not; every key is named.
    """
    update = plan.update
    if not isinstance(update, TrainerDump):
        return plan
    try:
        dump = locate(update.path, update.step, update.trainer)
        missing = [_asked(dump, key) for key in _missing(plan, update, dump)]
    except RolloutError as error:
        raise PlanError(f"update: {error}") from error
    if missing:
        raise PlanError(
            f"update: {TITLES[dump.source.name]}'s dump of step {dump.step} does not say everything; give\n  "
            + "\n  ".join(missing)
        )
    if plan.step.loss is not None and plan.step.loss.kind != "token_weights":
        raise PlanError(
            "step.loss: the token weights of a dumped batch are made of update.loss; name the loss there, and leave "
            "step.loss out."
        )
    known = update.model_copy(update={"step": dump.step, "trainer": dump.source.name})
    loss = TokenWeightsLoss(kind="token_weights")
    return plan.model_copy(update={"update": known, "step": plan.step.model_copy(update={"loss": loss})})


def check_step(plan: FisherKernelPlan, checkpoint: Checkpoint) -> None:
    """Check that a dumped or recorded batch is of the step that follows the checkpoint.

    Args:
        plan: any, as `as_dumped` returns it.
        checkpoint: the plan's.

    Raises:
        PlanError: it is another's.
    """
    update = plan.update
    if isinstance(update, Recorded) and plan.checkpoint.path and checkpoint.step not in (None, update.step):
        raise PlanError(
            f"update.step: the recorded step {update.step} was taken after as many optimizer steps, and the plan's "
            f"checkpoint is after {checkpoint.step}; name the checkpoint before the step, or the recording itself."
        )
    if not isinstance(update, TrainerDump) or checkpoint.step is None:
        return
    dump = locate(update.path, update.step, update.trainer)
    if dump.source.name == "slime":  # its number is of a rollout, on which several steps may be taken
        return
    if checkpoint.step != dump.steps_before:
        raise PlanError(
            f"update.step: {TITLES[dump.source.name]}'s step {dump.step} was taken after {dump.steps_before} optimizer "
            f"steps, and the plan's checkpoint is after {checkpoint.step}; name the checkpoint before the step."
        )


def _missing(plan: FisherKernelPlan, update: TrainerDump, dump: Dump) -> list[str]:
    """Keys of ASKED that the files lack and the plan does not give, in that order."""
    lacks = dump.lacks
    given = {
        "loss": update.loss is not None,
        "old": _has_old(update, dump),
        "weights": update.weights is not None,
        "batch_size": update.batch_size is not None,
        "advantage": update.advantage is not None,
        "temperature": "temperature" in plan.sampling.model_fields_set,
        "max_new_tokens": "max_new_tokens" in plan.sampling.model_fields_set,
        "prompts": bool(plan.prompts),
    }
    always = {"loss", "old"}
    missing = [key for key in given if key in lacks | always and not given[key]]
    # Whether any response was cut off is known once they are tokens: it is asked for with the rest, never alone.
    masked = dump.source.name == "trl" and update.mask_truncated is None
    return [*missing, "mask_truncated"] if missing and masked else missing


def _has_old(update: TrainerDump, dump: Dump) -> bool:
    """Whether ratios have a denominator: none is needed, the files have it, or the plan names it."""
    if update.loss is None or update.loss.kind in ("policy_gradient", "dppo", "ipo"):
        return True
    return update.loss.old is not None or update.old is not None or "old" not in dump.lacks


def _asked(dump: Dump, key: str) -> str:
    """The line that asks for a key, with what the trainer calls it."""
    name = OWN_NAMES.get((dump.source.name, key))
    line = ASKED[key]
    if key == "loss":
        line %= ", old: {path: the checkpoint before the first step on this batch}" if "old" in dump.lacks else ""
    return line if name is None else f"{line} ({name})"
