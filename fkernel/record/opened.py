"""A step while it is taken: what was tapped, what the optimizers saw, and what is then written of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fkernel.errors import BatchError, ModelError, ModelWarning, NonFiniteError, listing
from fkernel.record.gradients import (
    GradientCheck,
    Repeater,
    compare_gradients,
    dropping,
    leaf_norm,
    mismatch,
    norm_of,
    uneven_factor,
)
from fkernel.record.layout import RecordedMicrobatch
from fkernel.record.ranks import Ranks
from fkernel.record.tapping import Pass, Tap
from fkernel.shapes import Tensor

UNCLIPPED = 1e-6
"""Distance from 1 up to which a clipping factor is rounding."""


class OpenStep:
    """A step that is being taken.

    Attributes:
        number: optimizer steps taken before it.
        taps: micro-batches of this process so far.
        scale: of the loss, GradScaler's.
        passes: micro-batches of all processes, once an optimizer is about to step; in the first process.
        norms: {name: ‖∇L_name‖}, then too.
    """

    def __init__(self, number: int, scaler: Any, facts: dict[str, Any]) -> None:
        self.number, self.scaler, self.taps = number, scaler, list[Tap]()
        self.scale = 1.0
        self.norms, self.settings = dict[str, float](), dict[int, list[dict[str, Any]]]()
        self.passes: tuple[Pass, ...] = ()
        self._facts, self._seen = facts, dict[str, float]()
        self._check: GradientCheck | None = None

    def note(self, *, loss: Any = None, **facts: Any) -> None:
        """Add facts.

        Args:
            loss: of the micro-batch that was tapped last.
            facts: JSON.

        Raises:
            ModelError: a loss was given before anything was tapped.
            BatchError: a fact is no JSON.
        """
        if loss is not None and not self.taps:
            raise ModelError(f"Step {self.number}: a loss was noted before a micro-batch was tapped.")
        if loss is not None:
            self.taps[-1].loss = loss
        try:
            self._facts |= json.loads(json.dumps(facts, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise BatchError(f"Step {self.number}: {', '.join(facts)} is no JSON: {error}.") from error

    @property
    def microbatches(self) -> tuple[RecordedMicrobatch, ...]:
        """What each of the passes was given, and what autograd handed back."""
        return tuple(each.microbatch for each in self.passes)

    def freeze(self, ranks: Ranks) -> list[Pass]:
        """Take what this process's taps kept, just before an optimizer steps.

        Args:
            ranks: the processes; the gradient is the mean of theirs, so that ω is divided by their number.

        Raises:
            ModelError: nothing was tapped, or no backward pass came through.
            BatchError: ω is not finite, or not 0 outside of the response.
        """
        if not self.taps:
            raise ModelError(
                f"Step {self.number}: no log-probabilities with a gradient came through the tap, and an optimizer "
                f"stepped. Does the loss compute them elsewhere?"
            )
        if not any(tap.heard for tap in self.taps):
            raise ModelError(
                f"Step {self.number}: no backward pass came through the tapped log-probabilities. Use what "
                f"recorder.tap returns, or what it was given, in the loss, and call backward() before optimizer.step()."
            )
        where, scale = {"rank": ranks.rank} if ranks.size > 1 else {}, self.scale * ranks.size
        return [Pass(tap.taken(scale), [row | where for row in tap.rows], tap.heard) for tap in self.taps]

    def look(
        self, i: int, settings: list[dict[str, Any]], params: Mapping[str, Tensor], grad_scale: Tensor | None
    ) -> None:
        """Look at an optimizer's settings and gradients just before it steps.

        Args:
            i: which optimizer.
            settings: of its groups.
            params: {name: parameter} of it.
            grad_scale: by which a fused optimizer divides gradients itself; None where they are as they should be.

        Raises:
            ModelError: it has stepped already.
            NonFiniteError: a gradient is not finite.
        """
        if i in self.settings:
            raise ModelError(
                f"Step {self.number}: optimizer {i} stepped twice; expected one optimizer step in each step."
            )
        self.settings[i] = settings
        grads = {name: leaf.grad for name, leaf in params.items() if leaf.grad is not None}
        norms = [leaf_norm(grad).cpu() for grad in grads.values()]
        if infinite := [name for name, norm in zip(grads, norms, strict=True) if not bool(torch.isfinite(norm))]:
            raise NonFiniteError(
                f"Step {self.number}: the gradient of {listing(infinite)} is not finite, and the optimizer was about "
                f"to step. Leave such a step out, as a GradScaler does, or find what overflowed in the backward pass.",
                parameter=infinite[0],
            )
        scale = 1.0 if grad_scale is None else float(grad_scale)
        self._seen |= {name: float(norm) / scale for name, norm in zip(grads, norms, strict=True)}

    def compare(self, repeater: Repeater, params: Mapping[str, Tensor], first: bool) -> None:
        """Compute the record's gradient, and hold the optimizers' against it.

        Args:
            repeater: of the model.
            params: {name: parameter}, with their gradients.
            first: whether it must agree; a later step that does not is a warning.

        Raises:
            ModelError: it is not the same, and must be.
        """
        seen = {name: leaf.grad for name, leaf in params.items() if leaf.grad is not None}
        try:
            recorded = repeater.gradient(self.microbatches)
        except torch.OutOfMemoryError:
            said = f"Step {self.number}: its gradient was not checked: there is no memory for the logits of a sequence."
            warnings.warn(said, ModelWarning, stacklevel=2)
            return
        self._check = compare_gradients(recorded, seen, repeater.tolerance)
        wrong, whole = None, norm_of(self.norms)
        if not self._check.passed:
            wrong = mismatch(self.number, self._check, dropping(repeater.model), repeater.temperature)
        elif abs(self._check.norm - whole) > repeater.tolerance * max(whole, 1e-30):
            wrong = (
                f"Step {self.number}: the recorded token weights give a gradient of norm {self._check.norm:.6g}, and "
                f"backward left one of {whole:.6g}, in the same direction. Is the loss scaled (a GradScaler that "
                f"recorder.step(scaler=…) was not given), or do gradients of an earlier step still add up "
                f"(optimizer.zero_grad())?"
            )
        if wrong is not None and first:
            raise ModelError(wrong)
        if wrong is not None:
            warnings.warn(wrong, ModelWarning, stacklevel=2)

    def losses(self) -> list[float | None]:
        """The losses that were noted with this process's micro-batches.

        Raises:
            ModelError: no optimizer stepped.
        """
        self.check_complete()
        return [None if each.loss is None else float(each.loss) for each in self.taps]

    def check_complete(self) -> None:
        """Check that there is something to write.

        Raises:
            ModelError: no optimizer stepped.
        """
        if not self.settings:
            raise ModelError(f"Step {self.number}: no optimizer stepped; expected optimizer.step() within the step.")

    def contents(
        self, losses: Sequence[Sequence[float | None]], tokenizer: Any = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is written: facts of the step, and of each sequence.

        Args:
            losses: of each process's micro-batches; the step's is the processes' mean.
            tokenizer: for texts that were not given; None to leave them out.
        """
        whole, own = norm_of(self.norms), {name: self.norms.get(name, 0.0) for name in self._seen}
        clip = norm_of(self._seen) / (norm_of(own) or 1.0) if whole else 1.0
        uneven = uneven_factor(own, self._seen)
        if uneven is not None:
            warnings.warn(
                f"Step {self.number}: gradients were not all multiplied by the same clipping factor between backward "
                f"and the optimizer's step; that of {uneven!r} differs most. The record has one factor, {clip:.6g}.",
                ModelWarning,
                stacklevel=2,
            )
        noted = [None if loss is None else loss / len(losses) for own in losses for loss in own]
        passes = [
            {
                "sequences": len(each.microbatch),
                "width": each.microbatch.width,
                "prompt_width": each.microbatch.prompt_width,
                "loss": loss,
                "heard": each.heard,
            }
            for each, loss in zip(self.passes, noted, strict=True)
        ]
        count = max(self.settings) + 1
        facts = {
            "number": self.number,
            "microbatches": passes,
            "loss": sum(each for each in noted if each is not None) if None not in noted else None,
            "optimizers": [self.settings.get(i) for i in range(count)],
            "grad_norm": whole,
            "clip": 1.0 if abs(clip - 1) < UNCLIPPED else clip,
            "uneven": uneven,
            "scale": self.scale,
            "check": None if self._check is None else self._check._asdict(),
            "facts": self._facts,
        }
        return facts, named_rows(self.microbatches, [each.rows for each in self.passes], tokenizer)


def named_rows(
    microbatches: Sequence[RecordedMicrobatch], given: Sequence[Sequence[dict[str, Any]]], tokenizer: Any = None
) -> list[dict[str, Any]]:
    """Name the sequences of a step U-003-05: group, completion; and add their texts.

    Args:
        microbatches: of the step.
        given: what was given with each of their rows; those of one `group`, or else of one prompt, are a group.
        tokenizer: for texts that were not given.
    """
    rows, groups, counts = list[dict[str, Any]](), dict[Any, int](), dict[int, int]()
    for i, (each, own) in enumerate(zip(microbatches, given, strict=True)):
        attended, response = each.attention_mask, each.response_mask
        for j, known in enumerate(own):
            begun = response[j].long().cumsum(0) > 0
            prompt = each.input_ids[j][attended[j] & ~begun].tolist()
            ids = each.input_ids[j][attended[j] & begun].tolist()
            group = groups.setdefault(known.get("group", tuple(prompt)), len(groups))
            counts[group] = counts.get(group, -1) + 1
            texts = {} if tokenizer is None else _texts(tokenizer, prompt, ids)
            name = f"U-{group:03d}-{counts[group]:02d}"
            rows.append({"sequence_id": name, "microbatch": i, "row": j, **texts, **known})
    return rows


def _texts(tokenizer: Any, prompt: list[int], response: list[int]) -> dict[str, Any]:
    ended = bool(response) and response[-1] == getattr(tokenizer, "eos_token_id", None)
    spoken = response[: len(response) - ended]
    return {
        "prompt": str(tokenizer.decode(prompt)),
        "response": str(tokenizer.decode(spoken)),
        "finish": "eos" if ended else "length",
    }
