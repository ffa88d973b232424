"""The plan of one explanation: a checkpoint, the batch of its next step, and probes written by hand.

Nothing is sampled, and nothing is guessed: what the batch does not say is asked for by the plan's keys, and every
default that was taken is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from fkernel.errors import PlanError
from fkernel.record import Recording
from fkernel.study.config.io import explained
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.from_recording import as_recorded

CLIPPING = (
    "step.max_norm: to which the training clipped its gradient (max_grad_norm of transformers and TRL), or none where "
    "it did not clip"
)
DEFAULTS = {
    "step.after": "no checkpoint after the step is given (step.after), so changes are of the step executed here",
    "step.path": "gradients of the probes are evaluated halfway along the step (step.path: midpoint)",
    "template": "a probe's prompt is the whole text that the policy reads (template: chat puts it into the chat "
    "template)",
    "ended": "a probe's response ends with the end-of-sequence token",
    "parameters": "all parameters that were trained (parameters)",
    "numerics.dtype": "float32 (numerics.dtype)",
    "numerics.device": "on the CPU (numerics.device)",
    "numerics.memory": "no limit for activations and gradients (numerics.memory)",
}
"""What is said where a key is not given."""
AS_EXECUTED = {
    "step.microbatches": "all of the batch in one backward pass (step.microbatches)",
    "step.autocast": "no autocast (step.autocast)",
    "step.attention": "sdpa attention (step.attention)",
}
"""The same, of a batch whose recording does not say how it was executed."""


class Explanation(NamedTuple):
    """A plan, and how it came to be.

    Attributes:
        plan: complete, as `FisherKernelRunner` takes it.
        given: the keys of the plan that are not defaults.
        defaults: a sentence for each default that was taken.
    """

    plan: FisherKernelPlan
    given: dict[str, Any]
    defaults: tuple[str, ...]

    def yaml(self) -> str:
        """The plan as a file that `fkernel run` takes, with the defaults as comments."""
        lines = ["# Made by `fkernel explain`. Defaults that it took:", *(f"#   {line}" for line in self.defaults)]
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.given, sort_keys=False, allow_unicode=True)


def explanation(
    checkpoint: str | Path,
    batch: str | Path,
    probes: Sequence[tuple[str, str] | Mapping[str, Any]],
    out: str | Path = "explained",
    settings: Mapping[str, Any] | None = None,
) -> Explanation:
    """Make the plan that explains what a step did to some probes.

    Args:
        checkpoint: before the step, with its optimizer's state; or a recording.
        batch: of the step: what a trainer dumped, a recording, or what `save_batch` wrote; `PATH:STEP` where there are
            several.
        probes: (prompt, response) each, or the keys of a payload's sample: prompt, response, name, raw, ended, reward.
        out: directory of the results.
        settings: other keys of the plan, {"step.max_norm": 1.0, "update.weights": "dapo"}.

    Raises:
        PlanError: there is no such batch, the plan is not valid, or the batch does not say everything; the message
            lists what to give.
    """
    changes = dict(settings or {})
    if not probes:
        raise PlanError('There is no probe; give at least one prompt and response (--probe "PROMPT" "RESPONSE").')
    update, place = _update(str(batch), str(checkpoint))
    raw = changes.get("template", "bare") == "bare"
    samples = [_sample(probe, raw) for probe in probes]
    given: dict[str, Any] = {
        "checkpoint": place,
        "template": "bare",
        "update": update,
        "requests": [{"kind": "payload", "name": "probes", "samples": samples}],
        "self_kernel": False,
        "capture": {"kernel": True},
        "analyses": {"ledger": True, "uncertainty": True, "tokens": not changes.get("numerics.shards")},
        "out": str(out),
    }
    for key, value in changes.items():
        _set(given, key, value)
    return Explanation(_checked(given, changes), given, _defaults(given, changes, samples))


def _checked(given: dict[str, Any], changes: Mapping[str, Any]) -> FisherKernelPlan:
    """The plan with what recordings and dumps say of the step, or everything that is to be given, at once."""
    try:
        plan = FisherKernelPlan.model_validate(given)
    except ValidationError as error:
        raise PlanError("\n".join(explained(error, FisherKernelPlan))) from None
    says_clipping = given["update"]["kind"] == "recorded" or {"step", "step.max_norm", "step.clip"} & {*changes}
    asked = "" if says_clipping else f"\n  {CLIPPING}"
    try:
        filled = as_recorded(plan)
    except PlanError as error:
        more = "\nGive each as --set KEY=VALUE (settings, from Python)." if "; give\n" in str(error) else ""
        raise PlanError(f"{error}{asked}{more}") from error
    if asked:
        raise PlanError(f"The batch does not say everything; give{asked}\nas --max-norm (settings, from Python).")
    return filled


def _update(batch: str, checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan's `update` and `checkpoint`."""
    path, step = _split(batch)
    place = Path(path)
    recorded, at = _recording(place), {} if step is None else {"step": step}
    if recorded is None:
        if _recording(Path(checkpoint)) is not None:
            raise PlanError(
                f"{checkpoint} is a recording, and the batch {path} is not of one; give {checkpoint}:STEP, or a "
                f"checkpoint's directory."
            )
        if (place / "manifest.json").is_file() and step is None:
            return {"kind": "from_file", "path": path}, {"path": checkpoint}
        return {"kind": "trainer_dump", "path": path, **at}, {"path": checkpoint}
    steps = recorded.steps
    if step is None and len(steps) != 1:
        numbers = f"{steps[0]} to {steps[-1]}" if steps else "none"
        raise PlanError(f"{path} is a recording of {len(steps)} steps, {numbers}; say which: --batch {path}:STEP.")
    number = steps[0] if step is None else step
    if number not in steps:
        raise PlanError(f"{path} holds no step {number}; it holds {steps[0]} to {steps[-1]}.")
    if _recording(Path(checkpoint)) is not None:
        if Path(checkpoint).resolve() != place.resolve():
            raise PlanError(f"{checkpoint} and {path} are two recordings; give one of them as both.")
        return {"kind": "recorded"}, {"recording": path, "step": number}
    return {"kind": "recorded", "recording": path, "step": number}, {"path": checkpoint}


def _split(batch: str) -> tuple[str, int | None]:
    """Path and step of `PATH[:STEP]`."""
    if Path(batch).exists():
        return batch, None
    path, colon, step = batch.rpartition(":")
    if colon and step.isdecimal() and Path(path).exists():
        return path, int(step)
    where = path if colon and step.isdecimal() else batch
    raise PlanError(
        f"--batch: there is nothing at {where}; expected a recording, what a trainer dumped, or a saved batch, and "
        f"perhaps :STEP."
    )


def _recording(place: Path) -> Recording | None:
    return Recording.open(place) if (place / "recording.json").is_file() else None


def _sample(probe: tuple[str, str] | Mapping[str, Any], raw: bool) -> dict[str, Any]:
    row = dict(probe) if isinstance(probe, Mapping) else {"prompt": probe[0], "response": probe[1]}
    return {**({"raw": True} if raw else {}), **row}


def _set(given: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a plan by its dotted name."""
    *outer, last = key.split(".")
    inner = given
    for name in outer:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise PlanError(f"{key}: {name} has no keys; give all of {name} at once.")
    inner[last] = value


def _defaults(
    given: Mapping[str, Any], changes: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    kind = given["update"]["kind"]
    known = {**changes, **({"ended": False} if any("ended" in sample for sample in samples) else {})}
    silent = dict(DEFAULTS)
    if kind == "recorded":
        lines = ["clipping, micro-batches, precision and attention are those of the recording"]
        silent.pop("step.after")
    else:
        lines, silent = [], {**AS_EXECUTED, **silent}
    if kind == "from_file" and "step.loss" not in known:
        lines.append("the loss is the policy gradient −Σ w A S of the batch's advantages and weights (step.loss)")
    outer = {key.partition(".")[0] for key in known if "." not in key}
    return (*lines, *(line for key, line in silent.items() if key not in known and key.partition(".")[0] not in outer))
