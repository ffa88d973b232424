"""What a loss makes of U beside its weights: constants of its tokens, and a penalty; kept with the workspace.

The ascent is Σ_u w_u A_u ∇f_u + penalty, with f_u = Σ_t ρ_ut ℓ_ut; ρ = 1, so f = S, where there is no ratio.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fkernel import func
from fkernel.func import Weighted, weighted_logprob
from fkernel.func.inputs import Objective
from fkernel.shapes import Tensor, Tree

PENALTY = "penalty."


class LossTerms(NamedTuple):
    """What a loss makes of U.

    Attributes:
        ratio: ρ, [n_U t]: r_ut, 0 where it is clipped and where A_u = 0; None where U's columns are ∇S.
        penalty: what the KL term adds to the ascent, before clipping, {name: [*shape]}; None where there is none.
        facts: JSON: kind, and how far the policies are apart.
    """

    ratio: Tensor | None
    penalty: Tree | None
    facts: dict[str, Any]

    def tensors(self) -> Tree:
        """Lay them out for a file."""
        ratio = {} if self.ratio is None else {"ratio": self.ratio.cpu().contiguous()}
        return ratio | {PENALTY + name: leaf.cpu().contiguous() for name, leaf in (self.penalty or {}).items()}

    @classmethod
    def of(cls, tensors: Tree, facts: dict[str, Any]) -> LossTerms:
        """Read what `tensors` laid out."""
        penalty = {k.removeprefix(PENALTY): leaf for k, leaf in tensors.items() if k.startswith(PENALTY)}
        return cls(tensors.get("ratio"), penalty or None, facts)

    def beside(self, params: Tree) -> LossTerms:
        """Put them where the parameters are, in their order: a file has another."""
        ratio = None if self.ratio is None else self.ratio.to(next(iter(params.values())).device)
        penalty = self.penalty and {name: self.penalty[name].to(leaf.device) for name, leaf in params.items()}
        return self._replace(ratio=ratio, penalty=penalty)


class Columns(NamedTuple):
    """What U's passes are about.

    Attributes:
        f: S, or the weighted sum of a response's token log-probabilities.
        batch: what it takes.
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
        >>> terms = LossTerms(torch.tensor([[0.0, 1.0, 0.5]]), None, {})
        >>> f, batch = columns_of(S, logits, 1.0, U, terms)
        >>> f({"w": torch.ones(())}, batch)  # (1 + ½) log ¼
        tensor([-2.0794])
        >>> columns_of(S, logits, 1.0, U, None).f is S
        True
    """
    if terms is None or terms.ratio is None:
        return Columns(S, U)
    return Columns(weighted_logprob(apply, temperature), Weighted(U, terms.ratio))
