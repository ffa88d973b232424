"""Recorder: what a training loop did, step by step, written as it goes.

    with recorder.step():                            one optimizer step, of any number of micro-batches
        logp = recorder.tap(logp, …)                 the loop's own log-probabilities; autograd hands ω back there
        loss(logp).backward()
        optimizer.step()                             a hook looks at gradients and settings just before

Nothing of the loop changes: the tap is the identity, and hooks only look. Where several processes train, each makes a
Recorder of the same directory; the first one writes what all of them tapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fkernel.errors import ModelError
from fkernel.io import check_writable, locked, make_directory
from fkernel.record.bound import Bound
from fkernel.record.directory import SNAPSHOTS, STEPS, place_of, remove_partial, write_about, write_step
from fkernel.record.gradients import Norms, Repeater
from fkernel.record.live import LiveProbes, Log, Probes
from fkernel.record.opened import OpenStep
from fkernel.record.optimizers import overflowed, settings_of
from fkernel.record.policy import keep_policy
from fkernel.record.ranks import Ranks
from fkernel.record.resuming import check_empty, step_is_new
from fkernel.record.states import FIRST, check_arguments, snapshot_due, write_state
from fkernel.record.tapping import Tap
from fkernel.record.trainers import attach_to
from fkernel.shapes import Tensor


class Recorder:
    """Records the steps of a training: tokens, masks, ω, η, log-probabilities, settings, and the state at some steps.

    ∇L = Σ_u Σ_t ω_ut ∇log π(u_t) + η_ut ∇H(u_t),     ω = ∂L/∂log π,   η = ∂L/∂H

    Args:
        directory: of the recording; made if it is not there. One that is there is continued.
        model: that is trained; None where `attach` gives it.
        optimizer: one, or a list of those that share the model; None where `attach` gives it.
        snapshots: when θ and the optimizer's state are kept, before a step: "first", "every", or every k-th step and
            the end. Only what is trained is kept: adapters where only adapters train.
        temperature: τ that log-probabilities are divided by.
        autocast: "bfloat16" where the training runs under autocast; for the check of the gradient alone.
        head: "linear", or "trl" for TRL's language-model head; see `fkernel.engine.gradient_in`.
        resume: what happens to a step that is recorded already: "compare" keeps it where it is the same, and is an
            error where it is not; "replace" moves it, and all after it, to `replaced/`.
        tokenizer: for texts, where none are given.
        probes: sequences to tell about while the run trains: a file or directory as `fkernel.rollout.read_probes` takes
            it, rows of such a file, or a batch; `fkernel.record.live` says what is told.
        every: steps from one such time to the next.
        log: called with {"fkernel/<probe>/own": nats, …}, such as `wandb.log`; the trainer's own where one is attached.

    Raises:
        ModelError: an argument is none of these, or several processes train without DistributedDataParallel.
        OptimizerStateError: the optimizer is not this model's, or leaves a trained parameter out.
        StoreError: the directory cannot be written, is in use, or holds another run.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
        >>> model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
        >>> with tempfile.TemporaryDirectory() as directory, Recorder(directory, model, optimizer) as recorder:
        ...     with recorder.step():
        ...         log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        ...         response = torch.tensor([[0, 0, 1]])
        ...         log_p = recorder.tap(log_p, input_ids=ids, attention_mask=mask, response_mask=response)
        ...         (-log_p[:, 1:].sum()).backward()
        ...         optimizer.step()
        ...     recorder.last["number"], recorder.last["check"]["relative_error"] < 1e-5
        (0, True)
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module | None = None,
        optimizer: Any = None,
        snapshots: str | int = FIRST,
        *,
        temperature: float = 1.0,
        autocast: str | None = None,
        head: str = "linear",
        resume: str = "compare",
        tokenizer: Any = None,
        probes: Probes | None = None,
        every: int = 1,
        log: Log | None = None,
    ) -> None:
        check_arguments(snapshots, resume)
        self.directory, self.tokenizer, self.resume, self.log = Path(directory), tokenizer, resume, log
        self.last: dict[str, Any] = {}
        """Facts of the step that was written last, as in its step.json."""
        self._snapshots, self._precision = snapshots, {"temperature": temperature, "autocast": autocast, "head": head}
        self._open: OpenStep | None = None
        self._next: int | None = None
        self._checked, self._closed = False, False
        self._repeater: Repeater | None = None
        self._live = None if probes is None else LiveProbes(probes, every)
        self._bound: Bound | None = None
        self._handles, self._resources, self._ranks = list[Any](), ExitStack(), Ranks()
        if self._ranks.first:
            check_writable(make_directory(self.directory))
            self._resources.enter_context(locked(self.directory, "lock"))
            remove_partial(self.directory)
        try:
            if model is not None and optimizer is not None:
                self.bind(model, optimizer)
            elif model is not None or optimizer is not None:
                raise ModelError(
                    "Recorder needs the model and its optimizer, or neither where attach(trainer) follows."
                )
        except BaseException:
            self.close(end=False)
            raise

    # ------------------------------------------------------------------------------------------------- what is trained

    def bind(self, model: nn.Module, optimizer: Any, **about: Any) -> None:
        """Say what is trained; `attach` and the constructor do.

        Args:
            model: wrapped by DDP or torch.compile, or bare.
            optimizer: one, or a list.
            about: JSON for recording.json; temperature, autocast and head replace the constructor's.

        Raises:
            ModelError, OptimizerStateError, StoreError: as the constructor.
        """
        if self._closed or self._bound is not None:
            state = "is closed" if self._closed else "has its model already"
            raise ModelError(f"This recorder {state}; make another one: of the same directory, to record more steps.")
        self._ranks.join(model)
        bound = Bound.of(model, optimizer)
        self._precision |= {key: about.pop(key) for key in [*self._precision] if key in about}
        self._ranks.agree(lambda: self._write_about(bound, about))
        self._bound, self._norms = bound, Norms(bound.trained, averaged=self._ranks.size > 1)
        self._handles += [self._norms]
        self._handles += [
            each.register_step_pre_hook(lambda optimizer, *_: self._before_optimizer(optimizer))
            for each in bound.optimizers
        ]

    def _write_about(self, bound: Bound, about: dict[str, Any]) -> None:
        if self._live is not None:
            self._live.bind(bound, self.tokenizer, self._precision["temperature"])
        write_about(self.directory, {**bound.about(), **self._precision, **about})
        keep_policy(self.directory, bound.model, bound.trained, self.tokenizer)

    def attach(self, trainer: Any) -> Recorder:
        """Record a trainer, before `trainer.train()`: TRL's GRPO, RLOO, SFT or DPO, or transformers' with a causal LM.

        Args:
            trainer: made, not yet training.

        Returns:
            The recorder itself.

        Raises:
            ModelError: it is no such trainer, or hides its log-probabilities: a fused loss, packing, label smoothing,
                an auxiliary loss of the routers, FSDP, DeepSpeed.
        """
        attach_to(self, trainer)
        return self

    # --------------------------------------------------------------------------------------------------------- a step

    def tap(
        self,
        logp: Tensor,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        **metadata: Any,
    ) -> Any:
        """Listen at the log-probabilities of one micro-batch; they are returned as they are.

        Args:
            logp: [b k] log π of the last k tokens of each row, at the trainer's temperature: column j belongs to column
                t − k + j of input_ids. [b t−1] is what comes of shifting by one, [b t_c] of completions alone.
            input_ids: [b t] prompts and responses, padded as the pass was.
            attention_mask: [b t], 1 for a token.
            response_mask: [b t] or [b k], 1 for each token that the loss is about.
            entropy: [b k] H, where the loss has it.
            metadata: of each sequence: b numbers or texts (`prompt`, `response`, `reward`, `advantage`, `group`,
                `prompt_id`, or any other name), {name: b numbers} (`rewards`, `reward_weights`); or [b k] numbers, one
                a token.

        Returns:
            logp; (logp, entropy) where an entropy was given.

        Raises:
            BatchError: shapes do not fit, rows are packed, or metadata is not of b sequences.
            ModelError: no step is open.
        """
        if logp.requires_grad:
            step = self._need_open("tap")
            step.taps.append(Tap(logp, input_ids, attention_mask, response_mask, entropy, metadata))
        return logp if entropy is None else (logp, entropy)

    @property
    def opened(self) -> OpenStep | None:
        """The step that is being taken, if any."""
        return self._open

    @contextmanager
    def step(self, number: int | None = None, *, scaler: Any = None, **facts: Any) -> Iterator[OpenStep]:
        """Record one optimizer step: all its micro-batches, and `optimizer.step()`.

        An exception inside of the block leaves nothing behind, and neither does a step that a GradScaler skips.

        Args:
            number: optimizer steps taken before it; None to count on. Needed for the first step of a resumed run.
            scaler: the GradScaler, whose scale is divided out of ω and η.
            facts: JSON, kept with the step: a seed, an epoch.

        Yields:
            The step; `note(loss=…)` adds to its facts.

        Raises:
            ModelError: no optimizer stepped, nothing was tapped, or the gradient is not that of the record (at the
                first step that this recorder writes; later ones warn).
            StoreError: the step is recorded already, and differs.
        """
        self.begin(number, scaler, facts)
        try:
            yield self._need_open("step")
        except BaseException:
            self._open = None
            raise
        self.end()

    def begin(self, number: int | None = None, scaler: Any = None, facts: Any = None) -> None:
        """Begin a step, for callbacks; `step` does it for loops."""
        self._need_bound()
        if self._open is not None:
            raise ModelError(f"Step {self._open.number} is still open; steps do not nest.")
        if number is None and self._next is None:
            self._ranks.agree(lambda: check_empty(self.directory))
        number = (self._next or 0) if number is None else number
        self._norms.clear()
        self._open = OpenStep(number, scaler, dict(facts or {}))

    def end(self) -> None:
        """Write the open step, for callbacks; `step` does it for loops."""
        step, self._open = self._need_open("end"), None
        if not step.settings and step.scaler is not None:
            return  # skipped: the loss overflowed
        losses = self._ranks.collect(step.losses)
        self.last, self._next = self._ranks.agree(lambda: self._write(step, losses)), step.number + 1

    def _write(self, step: OpenStep, losses: list[list[float | None]]) -> dict[str, Any]:
        if self._live is not None:
            step.note(**self._live.told(step.number, self.log))
        facts, rows = step.contents(losses, self.tokenizer)
        if step_is_new(self.directory, step.number, facts, step.microbatches, self.resume):
            write_step(place_of(self.directory, STEPS, step.number), facts, step.microbatches, rows)
        return facts

    def _before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Just before an optimizer steps: gradients and settings are there, and θ is what it was."""
        step, bound = self._need_open("the optimizer's step"), self._need_bound()
        if overflowed(optimizer):
            return
        i, first = bound.position(optimizer), not step.settings
        step.look(i, settings_of(optimizer), bound.own(i), getattr(optimizer, "grad_scale", None))
        if first:
            step.scale = 1.0 if step.scaler is None else float(step.scaler.get_scale())
            every = self._ranks.collect(lambda: step.freeze(self._ranks))
            step.passes, step.norms = tuple(each for own in every for each in own), self._norms.taken(step.scale)
            self._ranks.agree(lambda: self._look(step, bound))
        if (live := self._live) is not None and live.due(step.number):
            self._ranks.agree(lambda: live.split(step.number, i))

    def _look(self, step: OpenStep, bound: Bound) -> None:
        """Check the gradient at the first step and at snapshots; keep the state where it is due."""
        due = snapshot_due(self.directory, self._snapshots, step.number)
        half = step.scaler is not None and self._precision["autocast"] is None  # float16 is not repeated
        if (due or not self._checked) and not half:
            self._repeater = self._repeater or Repeater(bound.model, **self._precision)
            step.compare(self._repeater, bound.trained, first=not self._checked)
            self._checked = True
        if due:
            self.snapshot(step.number)

    # ------------------------------------------------------------------------------------------------------ the state

    def snapshot(self, number: int | None = None) -> Path:
        """Keep θ and the optimizers' state as they are now, before step `number`; the first process does.

        Args:
            number: None for the step that comes next.

        Raises:
            StoreError: there is a snapshot of that step with other weights.
        """
        bound, number = self._need_bound(), (self._next or 0) if number is None else number
        if not self._ranks.first:
            return place_of(self.directory, SNAPSHOTS, number)
        return write_state(self.directory, number, bound.model, bound.optimizers, bound.trained, self.resume)

    def close(self, end: bool = True) -> None:
        """Take all hooks off, and release the directory.

        Args:
            end: whether the state after the last step is kept, where snapshots are "every" or every k-th.
        """
        if end and self._next is not None and self._snapshots != FIRST:
            self.snapshot(self._next)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._resources.close()
        self._closed = True

    def __enter__(self) -> Recorder:
        """Record within a block."""
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close; without a last snapshot where the block failed."""
        self.close(end=kind is None)

    def _need_bound(self) -> Bound:
        if self._bound is None:
            raise ModelError(
                "This recorder knows no model yet: give Recorder(…, model=, optimizer=), or attach(trainer)."
            )
        return self._bound

    def _need_open(self, what: str) -> OpenStep:
        if self._open is None:
            raise ModelError(
                f"No step is open for {what}; expected it inside of `with recorder.step():`. A recorder sees every "
                f"step of its optimizer: make it where recording is to begin."
            )
        return self._open
