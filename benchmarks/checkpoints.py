"""`python -m benchmarks.checkpoints`: what loading a sharded checkpoint takes of memory, and what a damaged one does.

    memory   Qwen2.5-0.5B's shape (494M parameters, tied, random, fp32) and one step of AdamW, sharded over two ranks
             by FSDP2 and saved in rank files (verl's layout) and by torch.distributed.checkpoint; then loaded by
             `fkernel.checkpoint.load` in a process of its own. State: θ, m and v, 12 bytes a parameter. Law: at most
             the state and one shard's file.
    damage   every packed run of tests/formats, one file changed at a time: refused, or the same numbers as before

Results and environment go to benchmarks/results/checkpoints.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment
from benchmarks.models import model_of
from benchmarks.scale import _forget_peak, _status

RESULTS = ROOT / "benchmarks" / "results" / "checkpoints.json"
LAYOUTS = ("rank files", "distributed")
MB = 1e6


def write(layout: str, shape: str, place: str) -> None:
    """One rank: shard a model, step once, save; run under torch.distributed.run."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    model = model_of(shape, "sdpa")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    tokens = torch.randint(model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(rank))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    root = Path(place)
    if layout == "distributed":
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state}, checkpoint_id=root)
    else:
        world = dist.get_world_size()
        torch.save(model.state_dict(), root / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save(optimizer.state_dict(), root / f"optim_world_size_{world}_rank_{rank}.pt")
        if rank == 0:
            (root / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))
            model.config.save_pretrained(root / "huggingface")
    dist.barrier()
    dist.destroy_process_group()


def read(layout: str, shape: str, place: str) -> dict[str, Any]:
    """Load a checkpoint; tell the peak beside the state and the largest file."""
    from fkernel import checkpoint

    model = None if layout == "rank files" else _architecture(shape, place)
    files = [path.stat().st_size for path in Path(place).rglob("*") if path.is_file()]
    _forget_peak()
    before, start = _status("VmRSS"), time.perf_counter()
    loaded = checkpoint.load(place, model=model)
    seconds, peak = time.perf_counter() - start, _status("VmHWM") - before
    state = 12 * sum(leaf.numel() for leaf in loaded.model.parameters()) / MB
    assert loaded.optimizer is not None
    return {
        "parameters": sum(leaf.numel() for leaf in loaded.model.parameters()),
        "state_MB": state,
        "largest_file_MB": max(files) / MB,
        "peak_MB": peak,
        "law_MB": state + max(files) / MB,
        "within": peak <= state + max(files) / MB,
        "seconds": seconds,
    }


def _architecture(shape: str, place: str) -> str:
    """Write a configuration: a model that is given would be memory of its own."""
    from benchmarks.models import config_of

    config_of(shape, "sdpa").save_pretrained(f"{place}/architecture")
    return f"{place}/architecture"


def memory(shape: str) -> dict[str, Any]:
    """Write and load each layout, every part in processes of its own."""
    found: dict[str, Any] = {}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory(dir=RESULTS.parent) as place:
            own = ["-m", "benchmarks.checkpoints", "--layout", layout, "--shape", shape, "--place", place]
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            subprocess.run([sys.executable, *launcher, *own, "--write"], check=True, cwd=ROOT, env=variables)
            done = subprocess.run([sys.executable, *own], check=True, cwd=ROOT, env=variables, capture_output=True)
            found[layout] = json.loads(done.stdout.decode().splitlines()[-1])
        print(layout, json.dumps(found[layout]), flush=True)
    return found


def main() -> None:
    """Run what is asked for, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "damage"))
    parser.add_argument("--count", type=int, default=2000, help="damaged files")
    parser.add_argument("--quick", action="store_true", help="a small model and few files, without saving")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="half-billion", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return write(args.layout, args.shape, args.place)
    if args.place:
        return print(json.dumps(read(args.layout, args.shape, args.place)))
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.only != "damage":
        found["memory"] = {"environment": environment(), **memory("small" if args.quick else "half-billion")}
    if args.only != "memory":
        from tests.formats.damage import damage

        found["damage"] = {"environment": environment(), **damage(40 if args.quick else args.count)}
    if not args.quick:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
