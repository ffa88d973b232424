"""Probes of a training, told while it runs: what a step did to sequences that one asks about, and by what.

    S_e(θ_{t+1}) − S_e(θ_t) = own_e + momentum_e + decay_e + remainder_e                nats

    own         ⟨∇S_e(θ_t + ½Δθ), −lr (1−β1)/bc1 · D g⟩     of the step's own gradient: Σ_u C_eu over its sequences
    momentum    ⟨∇S_e(θ_t + ½Δθ), −lr β1/bc1 · D m⟩         of gradients of earlier steps
    decay       ⟨∇S_e(θ_t + ½Δθ), −lr λ θ_t⟩                of weight decay

These are the columns of an account of this one step, without its sequences apart (`fkernel.engine.adjoint`); Δθ is the
one that happened, and D, m, g those of `fkernel.precond.adaptive`; other optimizers' steps are split as
`fkernel.precond.optimizer_step` does. The remainder is the path's error, rounding, and whatever a training in low
precision did that real numbers would not.

    just before an optimizer steps    θ_t is copied, and the coming Δθ is split: four vectors of the parameters' size
    when the step has ended           probes are evaluated at both ends, with one backward pass in the middle

Everything is computed in float32 (float64 where the training is), with eager attention and nothing dropped out, as an
account computes it: a step moves a log-probability by less than bfloat16 tells apart. A model in half precision is
therefore copied once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fkernel.checkpoint import optimizer_state
from fkernel.engine import effects_along, evaluated
from fkernel.errors import ModelError
from fkernel.func import make_functional, sequence_logprob, true_derivative
from fkernel.func.inputs import is_half, widened
from fkernel.precond import OptimizerState, optimizer_step
from fkernel.record.bound import Bound
from fkernel.record.gradients import plain_copy
from fkernel.record.optimizers import entries_of, settings_of, state_dict_of
from fkernel.rollout import GeneratedBatch, SampleGenerator, probes_of, read_probes
from fkernel.shapes import Tensor, Tree

Probes = GeneratedBatch | Sequence[dict[str, Any]] | str | Path
Log = Callable[[dict[str, float]], Any]
PARTS = ("own", "momentum", "decay")
PREFIX = "fkernel"
"""First word of what is logged: "fkernel/<probe>/own"."""


class LiveProbes:
    """What every k-th step does to probes.

    Args:
        given: a file or directory as `fkernel.rollout.read_probes` takes it, rows of such a file, or a batch.
        every: k.

    Raises:
        ModelError: k is no positive number.
    """

    def __init__(self, given: Probes, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ModelError(f"every is {every!r}; expected a number of steps, 1 for all of them.")
        self.every, self._given = every, given
        self._number, self._before, self._parts = -1, dict[str, Tensor](), dict[str, Tree]()

    def bind(self, bound: Bound, tokenizer: Any, temperature: float) -> None:
        """Take the probes through the tokenizer, and see that the optimizers are known.

        Args:
            bound: what is trained.
            tokenizer: of the policy.
            temperature: of its log-probabilities.

        Raises:
            RolloutError: the probes are none, or cannot be read.
            ModelError: there is no tokenizer.
            OptimizerStateError: the optimizer is not one that is modelled.
        """
        self._bound, net = bound, evaluable(bound.model)
        batch = self._given if isinstance(self._given, GeneratedBatch) else _tokenized(self._given, net, tokenizer)
        apply, _ = make_functional(net, [*bound.trained])
        self._f = sequence_logprob(replace(apply, padding_idx=None), temperature)
        device = next(iter(bound.trained.values())).device
        self._E = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), batch.sequences)
        self.names, self._certified = batch.ids, False
        for i in range(len(bound.optimizers)):
            live_state(bound, i)

    def due(self, number: int) -> bool:
        """Tell whether a step is one of those that are told."""
        return number % self.every == 0

    def split(self, number: int, i: int) -> None:
        """Copy θ and split the step that an optimizer is about to take.

        Args:
            number: of the step.
            i: which of the optimizers.

        Raises:
            TreeError, NonFiniteError, OptimizerStateError: as `fkernel.precond.optimizer_step`.
        """
        if number != self._number:  # forget one that failed
            self._number, self._before, self._parts = number, {}, {}
        own, scale = self._bound.own(i), getattr(self._bound.optimizers[i], "grad_scale", None)
        θ = {name: widened(leaf.detach()) for name, leaf in own.items()}
        g = {name: _gradient(leaf, scale) for name, leaf in own.items()}
        step = optimizer_step(θ, g, live_state(self._bound, i))
        for what, part in zip(PARTS, (step.batch, step.momentum, step.decay), strict=True):
            self._parts.setdefault(what, {}).update(part)
        self._before |= {name: leaf.clone() for name, leaf in θ.items()}

    def told(self, number: int, log: Log | None) -> dict[str, Any]:
        """Tell about a step that has ended, if it is one of those.

        Args:
            number: of the step.
            log: that is told, too; None for none.

        Returns:
            {"probes": what `measure` returns}, or {}.
        """
        if not self.due(number):
            return {}
        measured = self.measure()
        if log is not None:
            log({f"{PREFIX}/{name}/{what}": value for name, own in measured.items() for what, value in own.items()})
        return {"probes": measured}

    def measure(self) -> dict[str, dict[str, float]]:
        """Tell what the step did to each probe, now that it is taken.

        Returns:
            {probe: {"S": after the step, "realised", "own", "momentum", "decay", "remainder"}}, nats.

        Raises:
            NonFiniteError: a log-probability or a gradient is.
        """
        before, parts = self._before, self._parts
        self._before, self._parts = {}, {}
        after = {name: widened(leaf.detach()) for name, leaf in self._bound.trained.items()}
        # An optimizer that did not step moves nothing.
        delta = {name: after[name] - before.setdefault(name, after[name]) for name in after}
        zero = {name: torch.zeros_like(leaf) for name, leaf in delta.items() if name not in parts["own"]}
        vectors = {what: {**zero, **part} for what, part in parts.items()}
        if not self._certified:
            self._f, self._certified = true_derivative(self._f, before, self._E, delta), True
        values = effects_along(self._f, before, self._E, delta, vectors)
        S = evaluated(self._f, after, self._E).cpu()
        values["realised"] = S - evaluated(self._f, before, self._E).cpu()
        values["remainder"] = values["realised"] - sum(values[what] for what in PARTS)
        columns = {"S": S, **{what: values[what] for what in ("realised", *PARTS, "remainder")}}
        return {name: {what: float(each[e]) for what, each in columns.items()} for e, name in enumerate(self.names)}


def live_state(bound: Bound, i: int) -> OptimizerState:
    """Read a living optimizer's state as it is before its next step, in real numbers.

    Args:
        bound: what is trained.
        i: which of the optimizers.

    Raises:
        OptimizerStateError: it is not one that is modelled.
    """
    optimizer, own = bound.optimizers[i], bound.own(i)
    state_dict = state_dict_of(settings_of(optimizer), bound.groups[i], *entries_of(bound.model, [optimizer]))
    return optimizer_state(state_dict, {name: widened(leaf.detach()) for name, leaf in own.items()})


def evaluable(model: nn.Module) -> nn.Module:
    """Copy a model's structure for evaluation: eager attention; tensors shared, or in float32 where they are half.

    Args:
        model: that is trained; it is not changed.
    """
    net = plain_copy(model)
    if is_half(dict(net.named_parameters())):
        net = copy.deepcopy(net).float()
    base: Any = net.get_base_model() if hasattr(net, "get_base_model") else net  # pyright: ignore[reportCallIssue]
    if hasattr(base, "set_attn_implementation"):
        base.set_attn_implementation("eager")
    return net


def _tokenized(given: Any, net: nn.Module, tokenizer: Any) -> GeneratedBatch:
    if tokenizer is None:
        raise ModelError("Probes are given as texts, and there is no tokenizer; give Recorder(…, tokenizer=).")
    generator = SampleGenerator(net, tokenizer, template="bare")
    return read_probes(given, generator) if isinstance(given, str | Path) else probes_of([*given], generator)


def _gradient(leaf: Tensor, scale: Tensor | None) -> Tensor | None:
    if leaf.grad is None:
        return None
    g = widened(leaf.grad.detach())
    return g if scale is None else g / scale
