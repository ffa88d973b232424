"""Recording TRL's SFTTrainer, and a Trainer of transformers with a causal language model: its pass is listened to.

    compute_loss       while it runs, a hook on the model's forward pass sees inputs, labels and outputs
    training_step      the loss as it was differentiated

TRL's language-model head returns log π of the labels, and the loss is a function of them (nll, DFT): they are tapped,
and autograd gives ω. The model of a plain Trainer returns the loss itself,

    ℓ = −1/N Σ_t log π(y_t)        over labels y_t ≠ −100;  N their number, in this pass or in the whole batch

whose ω is −1/N, times what autograd hands back at ℓ: a gradient accumulation, a scale, a mean over processes. That the
loss is this one is checked in every pass, from its own logits: another one (smoothed, weighted, with a term) is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fkernel.errors import ModelError
from fkernel.record.tapping import Tap
from fkernel.shapes import Tensor

IGNORED = -100
SAME = 1e-4
"""Relative difference between the model's loss and the mean of −log π, up to which it is rounding."""
VIRTUAL = "Virtual tokens before a prompt (prompt tuning) are not recorded."
IMAGES = ("pixel_values", "pixel_values_videos", "input_features")
PACKED = ("shift_labels", "cu_seq_lens_q", "seq_idx")
"""Inputs that only batches of several sequences a row, or parts of a sequence, have."""


class Supervised:
    """A trainer's methods, with the recorder listening; `compute_loss` and `training_step` each make one of its own."""

    methods: tuple[str, ...] = ("compute_loss", "training_step")

    def __init__(self, recorder: Any, trainer: Any) -> None:
        self.recorder, self.trainer = recorder, trainer
        self.head = "trl" if has_fused_head(getattr(trainer, "model", None)) else "linear"

    def hidden(self) -> dict[str, bool]:
        """What this kind of trainer refuses, and whether it is there."""
        args = getattr(self.trainer, "args", None)
        return {
            "liger kernels, which compute the loss without log-probabilities (use_liger_kernel=False)": bool(
                getattr(args, "use_liger_kernel", False)
            ),
            "label smoothing, which is no function of the labels' log-probabilities (label_smoothing_factor=0)": bool(
                getattr(args, "label_smoothing_factor", 0)
            ),
            "a loss function of its own, on logits (compute_loss_func=None); recorder.tap takes one in a loop of your "
            "own": getattr(self.trainer, "compute_loss_func", None) is not None,
        }

    def compute_loss(self, before: Any) -> Any:
        """Listen at the model while its loss is computed."""

        def compute_loss(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            with listening(model, self.passed):
                return before(model, inputs, *rest, **others)

        return compute_loss

    def training_step(self, before: Any) -> Any:
        """Note the loss, by then divided by the number of micro-batches where the trainer does so."""

        def training_step(*rest: Any, **others: Any) -> Any:
            loss = before(*rest, **others)
            step = self.recorder.opened
            if step is not None and step.taps:
                step.note(loss=loss.detach())
            return loss

        return training_step

    def passed(self, inputs: Mapping[str, Any], out: Any) -> None:
        """Tap a pass that the loss is of: one with labels, and with a gradient.

        Args:
            inputs: of the model, by name.
            out: what it returned.
        """
        log_probs, loss = getattr(out, "log_probs", None), getattr(out, "loss", None)
        if inputs.get("labels") is None:
            return
        if log_probs is not None and log_probs.requires_grad:
            self._tap_log_probs(inputs, log_probs)
        elif log_probs is None and loss is not None and loss.requires_grad:
            self._tap_cross_entropy(inputs, loss, out.logits)

    def tap(self, inputs: Mapping[str, Any], log_probs: Tensor) -> Tap:
        """Begin the record of one pass.

        Args:
            inputs: of the model; labels that are −100 are not of the loss.
            log_probs: [b t−1] of all tokens but the first; their values.

        Returns:
            The tap, which is yet to hear ω.
        """
        ids, attention, step = inputs["input_ids"], attention_of(inputs), self.recorder.opened
        response = inputs["labels"].ne(IGNORED)
        response[:, 0] = False  # of the first token there is no log-probability
        self.recorder.tap(
            log_probs.detach().requires_grad_(),
            input_ids=ids,
            attention_mask=attention,
            response_mask=response,
            **self.metadata(len(ids), [] if step is None else step.taps),
        )
        return self.recorder.opened.taps[-1]

    def metadata(self, b: int, taps: list[Tap]) -> dict[str, Any]:
        """What is kept with each row: it is a group of its own, since no two rows answer one prompt.

        Args:
            b: rows of this pass.
            taps: of the step's passes before.
        """
        first = sum(len(each.rows) for each in taps)
        return {"group": [f"{self.process}-{first + i}" for i in range(b)]}

    @property
    def process(self) -> int:
        """Number of this process."""
        return int(getattr(self.trainer.accelerator, "process_index", 0))

    def _tap_log_probs(self, inputs: Mapping[str, Any], log_probs: Tensor) -> None:
        refuse_rows(inputs)
        if log_probs.shape != inputs["labels"][:, 1:].shape:
            raise ModelError(
                f"The model returned log-probabilities {list(log_probs.shape)} for tokens "
                f"{list(inputs['input_ids'].shape)}; expected one for each token but the first. {VIRTUAL}"
            )
        tap, mask = self.tap(inputs, log_probs), inputs["labels"][:, 1:].ne(IGNORED).to(log_probs.device)
        # Where a label is −100 the head returns a constant 0: a loss that adds up everything has a gradient there too.
        log_probs.register_hook(lambda grad: tap.hear(grad * mask))

    def _tap_cross_entropy(self, inputs: Mapping[str, Any], loss: Tensor, logits: Tensor) -> None:
        refuse_rows(inputs)
        log_p = label_logprobs(logits.detach(), inputs["input_ids"], attention_of(inputs))
        mask = inputs["labels"][:, 1:].ne(IGNORED).to(log_p.device)
        given = inputs.get("num_items_in_batch")
        n = mask.sum() if given is None else given
        refuse_other_loss(loss, (log_p * mask).sum() / -n, self.trainer)
        tap = self.tap(inputs, log_p)
        # The loss is scaled in place later: a hook that hangs by then hears the gradient of what is here.
        loss.register_hook(lambda grad: tap.hear(-(grad / n) * mask))


@contextmanager
def listening(model: nn.Module, heard: Any) -> Iterator[None]:
    """Call `heard(inputs, outputs)` after each pass of a model that is differentiated or not, within a block.

    Args:
        model: wrapped as it is called.
        heard: a function of the pass's keyword arguments and its outputs.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> with listening(linear, lambda inputs, out: print([*inputs], out.shape)):
        ...     _ = linear(input=torch.zeros(3, 2))
        ['input'] torch.Size([3, 1])
    """
    handle = model.register_forward_hook(lambda _, __, kwargs, out: heard(kwargs, out), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def label_logprobs(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """log π of each token but the first, [b t−1], from logits [b t v]; 0 for padding. One row at a time, in float32.

    Args:
        logits: of the pass.
        input_ids: [b t].
        attention_mask: [b t].

    Raises:
        ModelError: there are not as many logits as tokens.

    Example:
        >>> label_logprobs(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]), torch.ones(1, 3))
        tensor([[-0.6931, -0.6931]])
    """
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ModelError(
            f"The model returned logits {list(logits.shape)} for tokens {list(input_ids.shape)}; expected logits "
            f"[b, t, vocabulary] of every token. {VIRTUAL}"
        )
    rows = []
    for z, ids in zip(logits, input_ids.to(logits.device), strict=True):
        z = z[:-1].float()
        rows.append(z.gather(-1, ids[1:, None])[:, 0] - z.logsumexp(-1))
    return torch.stack(rows) * attention_mask[:, 1:].to(logits.device)


def refuse_other_loss(loss: Tensor, expected: Tensor, trainer: Any) -> None:
    """Refuse a loss that is not the mean of −log π over the labels.

    Args:
        loss: that the model returned.
        expected: the mean, from the model's logits.
        trainer: whose model it is.

    Raises:
        ModelError: they differ.

    Example:
        >>> refuse_other_loss(torch.tensor(2.0), torch.tensor(2.0), object())
    """
    apart = abs(float(loss) - float(expected))
    if apart > SAME * max(abs(float(expected)), 1.0):
        raise ModelError(
            f"{type(trainer).__name__}: the model returned the loss {float(loss):.6g}, and the mean of −log π over its "
            f"labels is {float(expected):.6g}. Its loss is another function (of other labels, smoothed, weighted, or "
            f"with an auxiliary loss), whose token weights are not known. In a loop of your own, recorder.tap takes "
            f"the log-probabilities that a loss is computed from."
        )


def refuse_rows(inputs: Mapping[str, Any]) -> None:
    """Refuse a pass whose rows are not one sequence of text each.

    Args:
        inputs: of the model.

    Raises:
        ModelError: images, packed sequences, labels that are not the tokens, or a first token that is predicted from
            padding.

    Example:
        >>> ids = torch.tensor([[1, 2]])
        >>> refuse_rows({"input_ids": ids, "labels": torch.tensor([[-100, 3]])})
        Traceback (most recent call last):
        fkernel.errors.ModelError: Row 0: label 3 stands at token 2 (column 1). ...
    """
    ids, labels = inputs.get("input_ids"), inputs["labels"]
    if any(inputs.get(name) is not None for name in IMAGES):
        raise ModelError("The micro-batch holds images, which a recording does not keep; only texts are recorded.")
    if ids is None or ids.ndim != 2 or labels.shape != ids.shape or attention_of(inputs).shape != ids.shape:
        shapes = {name: [*leaf.shape] for name, leaf in inputs.items() if isinstance(leaf, torch.Tensor)}
        raise ModelError(f"The model was given {shapes}; expected input_ids, labels and attention_mask, each [b t].")
    attended = attention_of(inputs).bool()
    if any(inputs.get(name) is not None for name in PACKED) or _restarts(inputs.get("position_ids"), attended):
        raise ModelError(
            "The micro-batch has position ids of its own, or marks of packed sequences: a row is not one sequence that "
            "begins at position 0. Packed batches are not recorded (packing=False, padding_free=False)."
        )
    other = labels.ne(IGNORED) & labels.ne(ids)
    if bool(other.any()):
        row, column = other.nonzero()[0].tolist()
        raise ModelError(
            f"Row {row}: label {int(labels[row, column])} stands at token {int(ids[row, column])} (column {column}). "
            f"Expected labels that are the tokens themselves, or −100."
        )
    first = attended.long().argmax(1)
    unseen = (first > 0) & labels.gather(1, first[:, None])[:, 0].ne(IGNORED)
    if bool(unseen.any()):
        raise ModelError(
            f"Row {int(unseen.nonzero()[0])} is padded on its left, and its first token has a label, which is "
            f"predicted from padding. Pad on the right (tokenizer.padding_side = 'right'), or give the first token the "
            f"label −100."
        )


def attention_of(inputs: Mapping[str, Any]) -> Tensor:
    """The attention mask of a pass; ones where none was given."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def has_fused_head(model: Any) -> bool:
    """Tell whether a model has TRL's language-model head, which returns log-probabilities in place of logits.

    Args:
        model: bare, or with adapters.

    Example:
        >>> has_fused_head(nn.Linear(1, 1))
        False
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = getattr(base, "forward", None)
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return "fused_lm_head" in getattr(code, "co_varnames", ())


def _restarts(position_ids: Any, attended: Tensor) -> bool:
    """Whether position ids are others than 0, 1, 2, … of each row's tokens."""
    if position_ids is None:
        return False
    counted = attended.long().cumsum(1) - 1
    return position_ids.shape != counted.shape or bool(((position_ids != counted) & attended).any())
