"""A recording as the engine takes a run: its steps from the last to the first, one loaded at a time.

Where the training ran under autocast, or kept weights or moments in half precision, each step is also executed as it
was, so that `arithmetic` and `unexplained` are apart; in float32 they are one, and its size is rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fkernel import tree
from fkernel.engine import Executed, RunStep
from fkernel.errors import OptimizerStateError, StoreError
from fkernel.func import make_functional, weighted_logprob, with_masked_padding_grad
from fkernel.precond import AdamWState, exact_state
from fkernel.record.gradients import passes_of, weighted
from fkernel.record.layout import Row
from fkernel.record.reading import PARTS, RecordedStep
from fkernel.record.replaying import State, advanced, scaled, settled
from fkernel.record.restored import States
from fkernel.shapes import Tree


class RunSteps:
    """The steps of a recording, last first; iterated as often as one likes.

    Args:
        states: of the run.
        model: its policy, to be differentiated: eager attention, in the account's dtype and on its device.
        skip: of this many steps, the last ones, only θ and m are wanted the first time: what the training executed is
            not computed.
        ages: of gradients, in steps, whose share of momentum is told; the state before every step has to be recorded.

    Raises:
        StoreError: ages are asked for, and snapshots of some steps were not kept.
    """

    def __init__(self, states: States, model: nn.Module, skip: int = 0, ages: Sequence[int] = ()) -> None:
        leaf = next(iter(model.parameters()))
        self.states, self.skip, self.dtype, self.device = states, skip, leaf.dtype, leaf.device
        self.recording, self.training, self.ages = states.training.recording, states.training, tuple(ages)
        lacking = sorted({*states.steps} - {*self.recording.snapshots}) if ages else []
        if lacking:
            raise StoreError(
                f"Ages need the state before every step, and {len(lacking)} of {len(states.steps)} were not kept, the "
                f"first before step {lacking[0]}; record with snapshots='every'."
            )
        about = self.recording.about
        apply, _ = make_functional(model, [*about["shapes"]])
        self.f = weighted_logprob(with_masked_padding_grad(apply), about["temperature"])

    def __len__(self) -> int:
        """Count the steps."""
        return len(self.states.steps)

    def __iter__(self) -> Iterator[RunStep]:
        """Walk backwards."""
        skip, self.skip = self.skip, 0
        walk = iter(self.states)
        after = next(walk)
        for i, state in enumerate(walk):
            yield self._step(state, after, wanted=i >= skip)
            after = state

    def params_before(self) -> Tree:
        """θ before the first step."""
        return self._own(self.states.first().params)

    def _own(self, tensors: Tree) -> Tree:
        return {name: leaf.to(self.device, self.dtype) for name, leaf in tensors.items()}

    def _step(self, state: State, after: State, wanted: bool) -> RunStep:
        step = self.recording.step(state.number)
        rows, _ = passes_of(step.microbatches)
        rows = rows if len(step.parts) == 1 else [row.weighed(only(part)) for part in step.parts for row in rows]
        batch = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(self.device), weighted(rows or [unheard(step)]))
        exact = adamw_of(exact_state(settled(state, self.recording, step), state.params), step)
        moments = {key: self._own(getattr(exact, key)) for key in exact.MOMENTS}
        # Where a loss has several parts, its sequences come once for each of them: [parts · n].
        return RunStep(
            f=self.f,
            params=self._own(state.params),
            U=batch,
            weights=-torch.ones(len(rows) or 1, dtype=torch.float64),
            state=replace(exact, **moments),  # pyright: ignore[reportArgumentType]
            clip=step.clip,
            delta=self._own(difference(after.params, state.params)),
            executed=self._executed(state, step) if wanted else None,
            older={age: self._older(exact, state.number - age + 1) for age in self.ages},
        )

    def _older(self, state: AdamWState, number: int) -> Tree:
        """What of m was there before an earlier step: β1^(steps since) m; what was there before the run is as old."""
        kept = self.recording.snapshot(max(number, self.states.steps.start)).optimizer
        assert isinstance(kept, AdamWState)
        since = {name: state.step[name] - kept.step[name] for name in state.step}
        return self._own({name: state.beta1[name] ** since[name] * leaf for name, leaf in kept.exp_avg.items()})

    def _executed(self, state: State, step: RecordedStep) -> Executed | None:
        """The step in the training's own arithmetic; None where that is float32 throughout."""
        entries = [leaf for entry in state.stored.entries.values() for leaf in entry.values()]
        leaves = [*state.params.values(), *(leaf for leaf in entries if isinstance(leaf, torch.Tensor))]
        if self.recording.about["autocast"] is None and all(
            leaf.dtype in (torch.float32, torch.float64) for leaf in leaves
        ):
            return None
        g = scaled(self.training.gradient(state.params, step), step.clip)
        later = advanced(self.recording, state, step, g)
        moments = adamw_of(exact_state(later.stored, state.params), step).exp_avg
        return Executed(self._own(difference(later.params, state.params)), self._own(moments))


def adamw_of(state: Any, step: RecordedStep) -> AdamWState:
    """The state, where it is AdamW's.

    Raises:
        OptimizerStateError: it is another optimizer's, or one of several did not step.
    """
    if not isinstance(state, AdamWState) or None in step.settings:
        what = type(state).__name__.removesuffix("State")
        idle = " and one of its optimizers did not step" if None in step.settings else ""
        raise OptimizerStateError(
            f"Step {step.number} was taken by {what}{idle}; a run is accounted for where AdamW took its steps. Single "
            f"steps of other optimizers are explained by fkernel.explain_step, and a replay takes any."
        )
    return state


def only(part: str) -> dict[str, float]:
    """Weights of a loss's parts that leave one."""
    return {name: float(name == part) for name in PARTS}


def difference(after: Tree, before: Tree) -> Tree:
    """Compute Δθ of what is stored, exactly: in float64."""
    return tree.map(lambda a, b: a.double() - b.double(), after, before)


def unheard(step: RecordedStep) -> Row:
    """A sequence of weight 0, for a step all of whose responses were masked: the optimizer stepped on no gradient."""
    each = step.microbatches[0]
    ids = each.input_ids[0][each.attention_mask[0]].tolist()
    return Row((*ids[:-1],), (*ids[-1:],), (0.0,), (), (0.0,), (), {})
