"""The policy of the examples: it adds two numbers, character by character, and is right now and then."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fkernel.demo.tokenizer import build_tokenizer

tokenizer = build_tokenizer()
problems = [(f"{a}+{b}=", str(a + b)) for a in range(10, 50) for b in range(10, 50)]


def pretrained(steps: int) -> Qwen2ForCausalLM:
    """Train a policy of 0.1 million parameters on answers half of which are random, so that it tries many others."""
    torch.set_num_threads(1)  # the model is too small for more
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=15, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.05, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    rows = torch.tensor([[*tokenizer.encode(prompt + answer), tokenizer.eos_token_id] for prompt, answer in problems])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (128,))]
        wrong = torch.rand(128) < 0.5
        ids[wrong, 6:8] = torch.randint(2, 12, (int(wrong.sum()), 2))  # two random digits
        logits = model(ids).logits[:, 5:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
