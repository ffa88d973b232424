"""Explain a step of a sharded run from its checkpoint, on GPUs that hold a shard of θ and of the state each.

torchrun --nproc-per-node 8 explain_sharded.py run/step-300 E.jsonl U.jsonl out.json --model base-model

A line of E.jsonl and U.jsonl is {"prompt": [ids], "response": [ids]}, in U with "weight": w·A of the sequence's loss.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fkernel as fk
from fkernel import checkpoint


def read(path: Path, device: str) -> tuple[Any, list[dict[str, Any]]]:
    """Read sequences: (the batch, its lines)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    batch = fk.func.pad([row["prompt"] for row in rows], [row["response"] for row in rows])
    return type(batch)(*(leaf.to(device) for leaf in batch)), rows


def main() -> None:
    """Load this rank's shards, explain the step together with the others, and write the effect from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("step", "E", "U", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--model", type=Path, help="where config.json is, if the checkpoint has none")
    parser.add_argument("--max-norm", type=float, help="of gradient clipping")
    parser.add_argument("--memory", help="of each rank, such as 40GiB")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))  # with NCCL: one GPU a rank

    loaded = checkpoint.load_shards(given.step, mesh, model=given.model, dtype=getattr(torch, given.dtype))
    for part in loaded.model.modules():  # the model has no weights, but buffers: rotary frequencies
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    params, state = ({name: leaf.to(device) for name, leaf in loaded.params.items()}, loaded.optimizer)
    assert state is not None, "the checkpoint holds no optimizer state"
    moments = ("exp_avg", "exp_avg_sq")
    state = replace(state, **{m: {n: leaf.to(device) for n, leaf in getattr(state, m).items()} for m in moments})
    (E, _), (U, rows) = read(given.E, device), read(given.U, device)
    weights = torch.tensor([row["weight"] for row in rows], dtype=getattr(torch, given.dtype), device=device)

    S = fk.func.sequence_logprob(fk.func.make_functional(loaded.model)[0])
    effect, _ = fk.explain_step(
        S, params, E, U, weights, state, max_norm=given.max_norm, memory=given.memory, mesh=mesh
    )  # of Δθ each rank has its shard
    if dist.get_rank() == 0:
        parts = {"contributions": effect.contributions, "momentum": effect.momentum, "decay": effect.decay}
        given.out.write_text(json.dumps({name: part.tolist() for name, part in parts.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
