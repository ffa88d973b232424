"""`python -m benchmarks.ranks --device cuda`: the same numbers over ranks, their data on an accelerator.

    nccl    one rank, NCCL: every exchange runs, with itself
    gloo    two ranks that share the accelerator: gloo moves their tensors

K, influence and a step of AdamW in float64 over a mesh, with θ whole on every rank and in shards, against one
process's. Results go to stdout as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.device import on
from benchmarks.models import build
from fkernel import explain_step, func, influence, kernel, precond
from fkernel.distributed import group_of, shard_tree
from fkernel.func.inputs import Function
from fkernel.shapes import Tensor, Tree


def log_probability(words: int, device: str) -> tuple[Function, Tree]:
    """log π of GPT-2's architecture, which in float64 computes nothing in float32 (Qwen2's norms do)."""
    shape: dict[str, Any] = {
        "n_positions": 80,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=words, **shape)).eval()
    apply, params = func.make_functional(model.to(device, torch.float64))
    return func.sequence_logprob(apply), params


def work(rank: int, ranks: int, backend: str, device: str, queue: Any) -> None:
    """Compute with and without a mesh, and send how far they are apart."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    try:
        if device == "cuda":
            torch.cuda.set_device(0)
        dist.init_process_group(backend, rank=rank, world_size=ranks)
        mesh = init_device_mesh(device, (ranks,))
        subject = build("tiny")
        torch.manual_seed(0)
        f, params = log_probability(subject.params["model.embed_tokens.weight"].shape[0], device)
        E, U = (on(subject.batch(n, 48, seed), device) for n, seed in ((5, 1), (7, 2)))
        P = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in params.items()})
        weights = torch.linspace(-1, 1, 7, dtype=torch.float64, device=device)
        state = precond.adamw_init(params, lr=1e-4)

        def of(params: Tree, state: precond.AdamWState, **over: Any) -> dict[str, Tensor]:
            effect, _ = explain_step(f, params, E, U, weights, state, **over)
            return {
                "kernel": kernel(f, params, E, U, P, **over),
                "influence": influence(f, params, E, U, P, weights, **over),
                "explain_step": effect.predicted,
            }

        def shards(tree: Tree) -> Tree:
            return shard_tree(group_of(mesh), tree)

        own = replace(state, exp_avg=shards(state.exp_avg), exp_avg_sq=shards(state.exp_avg_sq))
        one, whole = of(params, state), of(params, state, mesh=mesh)
        found = {**whole, **{f"{key}, θ in shards": leaf for key, leaf in of(shards(params), own, mesh=mesh).items()}}
        apart = {
            key: float((leaf - one[key.split(",")[0]]).norm() / one[key.split(",")[0]].norm())
            for key, leaf in found.items()
        }
        queue.put((rank, apart))
    except BaseException:
        queue.put((rank, traceback.format_exc()[-1500:]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def compared(ranks: int, backend: str, device: str) -> dict[str, Any]:
    """Run the ranks; what each found."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=work, args=(rank, ranks, backend, device, queue)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=150) for _ in processes)
    for process in processes:
        process.join(20)
        process.kill()
    return {"ranks": ranks, "backend": backend, "apart": found}


def main() -> None:
    """Compare on one rank and on two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    own = "nccl" if device == "cuda" else "gloo"
    print(json.dumps([compared(1, own, device), compared(2, "gloo", device)], indent=2))


if __name__ == "__main__":
    main()
