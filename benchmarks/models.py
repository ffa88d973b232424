"""The models under test: Qwen2's shape, built from a configuration with seeded random weights, fp32, eager, offline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fkernel import func, precond
from fkernel.shapes import Tree

THREADS = 2
"""torch's threads in every measurement; recorded beside the results."""

SHAPES: dict[str, dict[str, int]] = {
    # 13.8M parameters, of which 3.1M are the tied table
    "base": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab_size": 8192,
    },
    # 0.8M parameters, the demo's policy
    "small": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 64,
    },
    "49M": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 14,
        "num_attention_heads": 8,
        "vocab_size": 8192,
    },
    # 494M parameters: Qwen2.5-0.5B
    "half-billion": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    # 0.2M to 10M parameters: one shape at four widths
    **{
        f"width {d}": {
            "hidden_size": d,
            "intermediate_size": 3 * d,
            "num_hidden_layers": 3,
            "num_attention_heads": d // 32,
            "vocab_size": 512,
        }
        for d in (64, 128, 256, 512)
    },
    # 25k parameters: for finding out whether a benchmark runs at all
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    },
}


@dataclass(frozen=True)
class Subject:
    """A model as the library sees it.

    Attributes:
        shape: its name in `SHAPES`.
        apply: (params, input_ids, attention_mask) -> logits.
        params: {name: tensor}.
        f: S, (params, Sequences) -> [n]; `f.fn` is the same function without the library's checks.
        vocab_size: ids are drawn below it.
    """

    shape: str
    apply: func.Apply
    params: Tree
    f: func.Objective
    vocab_size: int

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.numel() for leaf in self.params.values())

    def batch(self, n: int, T: int, seed: int = 0) -> func.Sequences:
        """Draw n sequences of exactly T tokens, the first quarter of them prompt; nothing is padding."""
        ids = torch.randint(self.vocab_size, (n, T), generator=torch.Generator().manual_seed(seed))
        scored = torch.zeros(n, T, dtype=torch.bool)
        scored[:, max(1, T // 4) :] = True
        return func.Sequences(ids, torch.ones(n, T, dtype=torch.bool), scored)

    def vector(self, seed: int, scale: float = 1.0) -> Tree:
        """Draw a vector of parameter space."""
        generator = torch.Generator().manual_seed(seed)
        return {k: scale * torch.randn(leaf.shape, generator=generator) for k, leaf in self.params.items()}

    def adamw_state(self, step: int = 10) -> precond.AdamWState:
        """Make an AdamW state with a past: every coordinate has seen gradients."""

        def each(value: Any) -> dict[str, Any]:
            return dict.fromkeys(self.params, value)

        return precond.AdamWState(
            step=each(step),
            exp_avg=self.vector(11, 0.1),
            exp_avg_sq={k: 0.01 * (leaf.abs() + 0.1) ** 2 for k, leaf in self.vector(12).items()},
            lr=each(1e-3),
            beta1=each(0.9),
            beta2=each(0.999),
            eps=each(1e-8),
            weight_decay=each(0.01),
        )


@cache
def build(shape: str) -> Subject:
    """Build a model of `SHAPES`; a second call returns the same one."""
    apply, params = func.make_functional(model_of(shape, "eager"))
    return Subject(shape, apply, params, func.sequence_logprob(apply), SHAPES[shape]["vocab_size"])


def model_of(shape: str, attention: str) -> Any:
    """Build the module of a shape."""
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config_of(shape, attention)).float().eval()


def config_of(shape: str, attention: str) -> Any:
    """Make the configuration of a shape."""
    from transformers import Qwen2Config

    sizes = SHAPES[shape]
    config = Qwen2Config(
        **{"num_key_value_heads": sizes["num_attention_heads"], "tie_word_embeddings": True, **sizes},  # pyright: ignore[reportArgumentType]
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = attention
    return config


def rows(widths: dict[str, int], n: int, seed: int) -> dict[str, Tensor]:
    """Draw n rows of per-sequence gradients, {name: [n, width]}."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, width, generator=generator) for name, width in widths.items()}
