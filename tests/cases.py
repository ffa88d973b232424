"""Random but reproducible situations for the laws: a model, two batches, weights, an optimizer with a past."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import CONTEXT, MODELS, VOCABULARY
from tests.oracle import Pair


@dataclass(frozen=True)
class Case:
    """One situation; everything in it follows from these few numbers."""

    model_name: str
    seed: int
    lengths_U: tuple[tuple[int, int], ...]
    lengths_E: tuple[tuple[int, int], ...]
    temperature: float
    microbatch: int

    @cached_property
    def model(self) -> nn.Module:
        return MODELS[self.model_name](self.seed)

    @cached_property
    def U(self) -> list[Pair]:
        return self._pairs(self.lengths_U, 1)

    @cached_property
    def E(self) -> list[Pair]:
        return self._pairs(self.lengths_E, 2)

    @cached_property
    def others(self) -> list[Pair]:
        """Eight more, for what has to hold of a batch and need not of any single sequence."""
        return self._pairs(((2, 4), (3, 5)) * 4, 9)

    @cached_property
    def weights(self) -> Tensor:
        """[n_U]: loss weight times advantage, of both signs."""
        return torch.randn(len(self.U), generator=self._generator(3), dtype=torch.float64) / len(self.U)

    def tree(self, salt: int, scale: float = 1.0) -> dict[str, Tensor]:
        """A random vector of parameter space."""
        generator = self._generator(salt)
        return {
            name: scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in self.model.named_parameters()
        }

    def state(self, fk: Any, step: int = 7, lr: float = 1e-3, beta2: float = 0.95, weight_decay: float = 0.1) -> Any:
        """An AdamW state with a past: moments of the size that the gradients have."""
        names = list(dict(self.model.named_parameters()))
        g = {name: leaf.abs() + 0.1 for name, leaf in self.tree(5).items()}

        def each(value: float) -> dict[str, float]:
            return dict.fromkeys(names, value)

        return fk.precond.AdamWState(
            step=dict.fromkeys(names, step),
            exp_avg=self.tree(4, 0.3),
            exp_avg_sq={name: leaf**2 * (1 - beta2**step) for name, leaf in g.items()},
            lr=each(lr),
            beta1=each(0.9),
            beta2=each(beta2),
            eps=each(1e-8),
            weight_decay=each(weight_decay),
        )

    def engine(self, fk: Any) -> tuple[Any, dict[str, Tensor], Any, Any]:
        """(S, params, E, U) as the library wants them."""
        apply, params = fk.func.make_functional(self.model)
        S = fk.func.sequence_logprob(apply, self.temperature)
        return S, params, self.batch(fk, self.E), self.batch(fk, self.U)

    def batch(self, fk: Any, pairs: list[Pair]) -> Any:
        prompts, responses = zip(*pairs, strict=True)
        return fk.func.pad(prompts, responses)

    def _pairs(self, lengths: tuple[tuple[int, int], ...], salt: int) -> list[Pair]:
        generator = self._generator(salt)

        def draw(k: int) -> list[int]:
            return torch.randint(VOCABULARY, (k,), generator=generator).tolist()

        return [(draw(prompt), draw(response)) for prompt, response in lengths]

    def _generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + salt)


_length = st.tuples(st.integers(1, CONTEXT // 2), st.integers(1, CONTEXT // 2))
_lengths = st.lists(_length, min_size=1, max_size=4).map(tuple)

cases = st.builds(
    Case,
    model_name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10_000),
    lengths_U=_lengths,
    lengths_E=_lengths,
    temperature=st.sampled_from([0.5, 0.7, 1.0, 1.3]),
    microbatch=st.integers(1, 5),
)

EXAMPLES = [
    Case("own", 1, ((3, 4), (1, 6), (5, 2)), ((2, 3), (4, 4)), 0.7, 2),
    Case("gpt2", 2, ((2, 2), (4, 5), (3, 3)), ((6, 1), (1, 5), (2, 2), (3, 1)), 1.3, 2),
]
"""Fixed cases, ragged and tempered, under which every mutation must show."""
