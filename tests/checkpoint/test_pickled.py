"""Weights that are no safetensors, beside a configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fkernel as fk
from fkernel import checkpoint


class Payload:
    """What a hostile file would run."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_one_pickle_beside_a_configuration(tmp_path, tied):
    """As transformers wrote them before safetensors, and DeepSpeed's zero_to_fp32.py does: they are tensors only."""
    model, optimizer = stepped(tied)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = checkpoint.load(tmp_path)
    assert loaded.model.config.tie_word_embeddings == tied
    for (name, leaf), (other, expected) in zip(loaded.model.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(leaf, expected)
    assert isinstance(loaded.optimizer, fk.precond.AdamWState)
    torch.save({**model.state_dict(), "payload": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(fk.CheckpointError, match="could not be read as tensors only"):
        checkpoint.load(tmp_path)


def test_pickled_shards_are_to_be_converted(tmp_path):
    model, _ = stepped(False)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(fk.ModelError, match=r"pickles, and no safetensors; convert them: .*save_pretrained"):
        checkpoint.load(tmp_path)


def stepped(tied: bool) -> tuple[Any, torch.optim.Optimizer]:
    """A tiny policy that took one step."""
    shape: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    return model, optimizer
