"""Two causal language models in float64: one of the tests' own, and GPT-2's architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 13
CONTEXT = 16


class Block(nn.Module):
    """Pre-norm attention and MLP, every operation in the parameters' own dtype."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5 + bias).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A tied causal transformer: module(input_ids [n t], attention_mask [n t]) -> logits [n t v]."""

    def __init__(self, width: int = 8, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        t = input_ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        seen = causal & attention_mask.bool()[:, None, None, :]
        x = self.embed(input_ids) + self.position(torch.arange(t))
        bias = torch.where(seen, 0.0, -1e30).to(x.dtype)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))


def own(seed: int) -> nn.Module:
    """The tests' own transformer, wide enough in its weights that derivatives are far from zero."""
    torch.manual_seed(seed)
    model = Transformer().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def gpt2(seed: int) -> nn.Module:
    """A two-layer GPT-2 of Hugging Face's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {"own": own, "gpt2": gpt2}
