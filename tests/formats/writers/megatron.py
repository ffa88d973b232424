"""Megatron-Core's distributed checkpoints, as verl, NeMo-RL's Megatron workers and slime leave them.

    megatron_qwen2            bfloat16 with float32 masters, 2 data-parallel ranks, "fully_reshardable", laid out as
                              Megatron-LM and slime do: iter_0000002/ with args and iteration in common.pt
    megatron_qwen3            float32, 2 tensor-parallel ranks, grouped queries, laid out as verl does:
                              global_step_2/actor/{dist_ckpt,huggingface}
    megatron_dp_reshardable   the default form: flat buffers without names

A real GPTModel, Megatron's DistributedOptimizer and `dist_checkpointing.save` write them, on a CPU (`_megatron`). The
model begins with a Qwen's weights, and its gradients are held against that Qwen's before anything is saved.

Source: megatron-core 0.16.1.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.checkpoint.writers import TOKENIZER
from tests.formats.policy import loss_of, rows, tiny
from tests.formats.truth import Truth, save_truth
from tests.formats.writers import _megatron as mcore

RUNS = {"megatron_qwen2": 2, "megatron_qwen3": 2, "megatron_dp_reshardable": 2}


def qwen3() -> Any:
    """Four query heads in two groups, norms of queries and keys, a tied head."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=10,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def write(name: str, directory: Path) -> None:
    """Write a run."""
    policy = qwen3() if name == "megatron_qwen3" else tiny(tied=False)
    dtype = torch.float32 if name == "megatron_qwen3" else torch.bfloat16
    parallel = 2 if name == "megatron_qwen3" else 1
    mcore.start(parallel)
    with mcore.OnCpu():
        _train(name, directory, policy, dtype, parallel)
    dist.barrier()
    dist.destroy_process_group()


def _train(name: str, directory: Path, policy: Any, dtype: torch.dtype, parallel: int) -> None:
    config, weights = policy.config, policy.to(dtype).state_dict()
    model, transformer = mcore.gpt(config, dtype, parallel)
    with torch.no_grad():
        for key, leaf in model.named_parameters():
            leaf.copy_(mcore.split(key, mcore.from_hf(weights, key, config), dist.get_rank() % parallel, parallel))
    wrapped, optimizer, scheduler = mcore.trainer(model, transformer, dtype)

    def tree(what: str) -> dict[str, torch.Tensor]:
        return {key: leaf.clone() for key, leaf in mcore.whole(model, optimizer, what, config).items()}

    for number in (0, 1):
        mcore.backward(wrapped, number)
        if number == 0:
            _check_gradients(policy, tree("grad"), dtype)
        optimizer.step()
        scheduler.step(1)
    _save(name, directory, model, optimizer, scheduler, config)
    if name == "megatron_dp_reshardable":  # which is refused
        rounded = tree("weight")
        if dist.get_rank() == 0:
            save_truth(directory, Truth({}, {}, {}, {}, {}, rounded, {"step": 2}))
        return
    theta, rounded = tree("param"), tree("weight") if dtype == torch.bfloat16 else {}
    exp_avg, exp_avg_sq = tree("exp_avg"), tree("exp_avg_sq")
    mcore.backward(wrapped, 2)
    grads = tree("grad")
    groups = optimizer.param_groups
    meta: dict[str, Any] = {"step": 2, "lr": groups[0]["lr"], "decays": [group["weight_decay"] for group in groups]}
    meta["versions"] = {"torch": torch.__version__, "megatron-core": version("megatron-core")}
    optimizer.step()
    after = tree("param")
    if dist.get_rank() == 0:
        save_truth(directory, Truth(theta, exp_avg, exp_avg_sq, grads, after, rounded, meta))


def _check_gradients(policy: Any, grads: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Hold Megatron's gradients, under Hugging Face's names, against the model's own: names and rows are right."""
    policy.zero_grad()
    loss_of(policy, rows(0)).backward()
    for name, leaf in policy.named_parameters():
        assert leaf.grad is not None
        apart = (grads[name] - leaf.grad.float()).norm() / leaf.grad.float().norm()
        assert apart < (1e-4 if dtype == torch.float32 else 0.1), (name, float(apart))


def _save(name: str, directory: Path, model: Any, optimizer: Any, scheduler: Any, config: Any) -> None:
    from megatron.core import dist_checkpointing  # pyright: ignore[reportMissingImports]

    form = "dp_reshardable" if name == "megatron_dp_reshardable" else "fully_reshardable"
    metadata = {"distrib_optim_sharding_type": form}
    weights = model.sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata)}
    if name == "megatron_qwen3":
        actor = directory / "checkpoint" / "global_step_2" / "actor"
        place = actor / "dist_ckpt"
        state["lr_scheduler"] = scheduler.state_dict()
    else:
        place = directory / "checkpoint" / "iter_0000002"
        state |= {"opt_param_scheduler": scheduler.state_dict(), "iteration": 2, "checkpoint_version": 3.0}
        state["args"] = argparse.Namespace(lr=1e-3, bf16=True, params_dtype=torch.bfloat16, ckpt_format="torch_dist")
    if dist.get_rank() == 0:
        place.mkdir(parents=True)
        if name == "megatron_qwen3":
            config.save_pretrained(place.parent / "huggingface")
            TOKENIZER.save_pretrained(place.parent / "huggingface")
        else:
            (place.parent / "latest_checkpointed_iteration.txt").write_text("2")
    dist.barrier()
    dist_checkpointing.save(state, str(place))
