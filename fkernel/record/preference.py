"""Recording TRL's DPOTrainer: one pass of chosen and rejected responses, and what the reference says of them.

    rows of a pass      pairs 0 … n−1 chosen, then the same pairs rejected: U-<pair>-00 and U-<pair>-01
    ω                   autograd's, at the log-probabilities of TRL's language-model head, whatever the loss

The reference's pass has no gradient; its log-probabilities are kept beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from fkernel.record.supervised import Supervised, listening
from fkernel.record.tapping import Tap
from fkernel.shapes import Tensor

PRECOMPUTED = ("ref_chosen_logps", "ref_rejected_logps")


class Preference(Supervised):
    """A DPOTrainer's methods, with the recorder listening."""

    def __init__(self, recorder: Any, trainer: Any) -> None:
        super().__init__(recorder, trainer)
        self._reference: Tensor | None = None

    def hidden(self) -> dict[str, bool]:
        """What a DPOTrainer refuses, and whether it is there."""
        args = getattr(self.trainer, "args", None)
        return {
            "liger kernels, which compute the loss without log-probabilities (use_liger_kernel=False)": bool(
                getattr(args, "use_liger_kernel", False)
            ),
            "a language-model head without log-probabilities; TRL 1.16 has one that returns them": self.head != "trl",
        }

    def compute_loss(self, before: Any) -> Any:
        """Listen at the model and at its reference while the loss is computed."""

        def compute_loss(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            # Without a model of its own, the reference is the policy's with its adapter off, called without wrapper.
            reference = getattr(self.trainer, "ref_model", None) or self.trainer.model
            step, self._reference = self.recorder.opened, None
            known = 0 if step is None else len(step.taps)
            with ExitStack() as stack:
                stack.enter_context(listening(model, self.passed))
                stack.enter_context(listening(reference, self._referred))
                loss = before(model, inputs, *rest, **others)
            for tap in [] if step is None else step.taps[known:]:
                tap.add(**self._reference_of(inputs))
            return loss

        return compute_loss

    def metadata(self, b: int, taps: list[Tap]) -> dict[str, Any]:
        """What is kept with each row: its pair, numbered within this process's step, and whether it is the chosen one.

        Args:
            b: rows of this pass, chosen and rejected.
            taps: of the step's passes before.
        """
        n, first = b // 2, sum(len(each.rows) // 2 for each in taps)
        pairs = [first + i for i in range(n)] * 2
        return {
            "group": [f"{self.process}-{pair}" for pair in pairs],
            "pair": pairs,
            "chosen": [True] * n + [False] * n,
        }

    def _referred(self, _: Mapping[str, Any], out: Any) -> None:
        log_probs = getattr(out, "log_probs", None)
        if log_probs is not None and not log_probs.requires_grad:
            self._reference = log_probs.detach()

    def _reference_of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """log π of the reference: of each token and sequence, or of the sequence where it was computed beforehand."""
        if all(name in inputs for name in PRECOMPUTED):
            return {"reference_logprob": [value for name in PRECOMPUTED for value in inputs[name].tolist()]}
        if self._reference is None:
            return {}
        return {"reference_logprobs": self._reference, "reference_logprob": self._reference.sum(1)}
