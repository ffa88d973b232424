"""A loss evaluated on U: weights of its tokens, constant at θ, and the parts that it is a sum of.

The ascent direction is −∇L = Σ_u a_u ∇f_u + Σ_p v_p, with columns f_u = Σ_t ρ_ut ℓ_ut + κ_ut H_ut:

    ρ = 1, a = w A           the policy gradient: f = S
    ρ of the ratio, a = w A  a clipped ratio, evaluated for the sign of A; a KL penalty is a vector v_p beside it
    ρ = −ω, κ = −η, a = 1    token weights: the whole loss is in the columns, and parts are vectors v_p of their sum
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fkernel import func
from fkernel.func import Weighted, weighted_logprob
from fkernel.func.inputs import Objective
from fkernel.shapes import Tensor, Tree

PART = "part."
"""What names of a part's arrays and tensors begin with: part.kl."""
CONSTANTS = ("ratio", "entropy", "log_ratio")
"""What is kept of U's tokens, [n_U t] each."""
OWN = "advantage"
"""The part that columns are of, where others stand beside them."""


class LossTerms(NamedTuple):
    """A loss evaluated on U.

    Attributes:
        ratio: ρ, [n_U t]; None where U's columns are ∇S.
        facts: JSON: kind, statistics of the ratios, KL, pairs.
        parts: {part: v_p, {name: [*shape]}}: their shares of the ascent direction, before clipping.
        entropy: κ, [n_U t]; None where no entropy has a weight.
        log_ratio: ℓ − ℓ_old, [n_U t] nats, where the columns are of a clipped ratio: under another clipping range they
            are others.
        within: the parts that columns hold, and that add up to their weighted sum; the others stand beside them.
        whole: whether the columns are the whole loss, a = 1.
    """

    ratio: Tensor | None
    facts: dict[str, Any]
    parts: Mapping[str, Tree] = {}
    entropy: Tensor | None = None
    log_ratio: Tensor | None = None
    within: tuple[str, ...] = ()
    whole: bool = False

    @property
    def beside_columns(self) -> Mapping[str, Tree]:
        """The parts that no column has."""
        return {part: v for part, v in self.parts.items() if part not in self.within}

    def tensors(self) -> Tree:
        """Flatten to named tensors, for safetensors."""
        constants = {name: leaf for name in CONSTANTS if (leaf := getattr(self, name)) is not None}
        parts = {f"{PART}{part}/{name}": leaf for part, v in self.parts.items() for name, leaf in v.items()}
        return {name: leaf.cpu().contiguous() for name, leaf in {**constants, **parts}.items()}

    def record(self) -> dict[str, Any]:
        """What `tensors` does not hold, JSON."""
        return {"facts": self.facts, "whole": self.whole, "parts": [*self.parts], "within": [*self.within]}

    @classmethod
    def of(cls, tensors: Tree, record: Mapping[str, Any]) -> LossTerms:
        """Invert `tensors` and `record`."""
        parts: dict[str, Tree] = {part: {} for part in record["parts"]}
        for place, leaf in tensors.items():
            if place.startswith(PART):
                part, _, name = place.removeprefix(PART).partition("/")
                parts[part][name] = leaf
        constants = {name: tensors.get(name) for name in CONSTANTS}
        return cls(
            facts=record["facts"], parts=parts, within=tuple(record["within"]), whole=record["whole"], **constants
        )

    def beside(self, params: Tree) -> LossTerms:
        """Move to the parameters' devices, in the parameters' order."""
        device = next(iter(params.values())).device
        constants = {name: leaf.to(device) for name in CONSTANTS if (leaf := getattr(self, name)) is not None}
        parts = {
            part: {name: v[name].to(leaf.device) for name, leaf in params.items()} for part, v in self.parts.items()
        }
        return self._replace(parts=parts, **constants)


def with_parts(effects: Mapping[str, Tensor], loss: LossTerms | None) -> dict[str, Tensor]:
    """Give the batch's effect with what no column has, and what the columns did as a part beside the others.

    Args:
        effects: {"batch": Σ_u C_eu, "part.kl": …, …}, [n_E] each.
        loss: of U.

    Example:
        >>> import torch
        >>> loss = LossTerms(None, {}, {"kl": {"w": torch.ones(1)}})
        >>> with_parts({"batch": torch.tensor([1.0]), "part.kl": torch.tensor([0.5])}, loss)
        {'part.advantage': tensor([1.]), 'batch': tensor([1.5000])}
    """
    beside = [] if loss is None else [effects[PART + part] for part in loss.beside_columns if PART + part in effects]
    if not beside:
        return {}
    own = {} if loss is None or loss.within else {PART + OWN: effects["batch"]}
    return {**own, "batch": effects["batch"] + sum(part.to(effects["batch"]) for part in beside)}


def parts_of(effects: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the parts of the loss out of effects, {part: …}, that of the columns first.

    Example:
        >>> parts_of({"part.kl": 1, "part.advantage": 2, "momentum": 3})
        {'advantage': 2, 'kl': 1}
    """
    parts = {name.removeprefix(PART): value for name, value in effects.items() if name.startswith(PART)}
    return dict(sorted(parts.items(), key=lambda part: part[0] != OWN))


class Columns(NamedTuple):
    """The function and inputs whose gradients are U's columns.

    Attributes:
        f: S, or the weighted sum of a response's token log-probabilities and entropies.
        batch: f's inputs.
    """

    f: Objective
    batch: Any


def columns_of(S: Objective, apply: Any, temperature: float, U: func.Sequences, terms: LossTerms | None) -> Columns:
    """Find the function whose gradients are U's columns.

    Example:
        >>> import torch
        >>> U = func.pad([[0]], [[1, 2]])
        >>> logits = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> S = func.sequence_logprob(logits)
        >>> terms = LossTerms(torch.tensor([[0.0, 1.0, 0.5]]), {})
        >>> f, batch = columns_of(S, logits, 1.0, U, terms)
        >>> f({"w": torch.ones(())}, batch)  # (1 + ½) log ¼
        tensor([-2.0794])
        >>> columns_of(S, logits, 1.0, U, None).f is S
        True
    """
    if terms is None or terms.ratio is None:
        return Columns(S, U)
    return Columns(weighted_logprob(apply, temperature), Weighted(U, terms.ratio, terms.entropy))
