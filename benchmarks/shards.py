"""`python -m benchmarks.shards`: memory of each rank where θ, the optimizer's state and the step are in shards.

A step of AdamW is explained, on one process whole and on 2 and 4 ranks in shards, each in processes of their own, after
one of a tiny model, which loads libraries. Of each rank: the resident memory before θ is there, and its peak until the
effect is there, so that θ, the state, the step and the passes count, and libraries do not. And of a distributed
checkpoint of θ, m and v, loaded whole by one process and in shards by each rank. Results go to stdout as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.environment import environment
from benchmarks.models import SHAPES
from benchmarks.ranks_cost import counting
from fkernel import checkpoint, explain_step, func, precond
from fkernel.checkpoint import skeleton_of, workload_of
from fkernel.distributed import group_of, shard_of
from fkernel.engine.planning import cost_in_shards
from fkernel.engine.recycling import return_memory
from fkernel.shapes import Tree

SHAPE: Any = SHAPES["49M"] | {"num_key_value_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": True}
"""Of Qwen2's architecture, 49M parameters; its largest layer has 7 % of them, its table 9 %."""
WIDE: Any = {**SHAPE, "hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 12, "num_attention_heads": 12}
WIDE["num_key_value_heads"] = 12
TINY: Any = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


class Case(NamedTuple):
    """What is measured: a shape of Qwen2's architecture, sequences of E and of U, and their tokens."""

    shape: dict[str, Any]
    E: int
    U: int
    tokens: int


CASES = {"49M": Case(SHAPE, 8, 16, 64), "93M": Case(WIDE, 4, 8, 48)}


def bytes_resident() -> int:
    """Read the resident memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Read the largest resident memory so far, of this program: `ru_maxrss` also counts what its parent had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def leaves(shapes: dict[str, torch.Size], seed: int, scale: float, group: Any) -> Tree:
    """Draw a vector, this rank's shard of it; each rank draws a parameter at a time."""
    draw, found = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, shape in shapes.items():
        rows = slice(None) if group is None else shard_of(shape[0], group.size, group.rank)
        found[name] = (scale * torch.randn(shape, generator=draw))[rows].clone()
        if "norm" in name and scale == 0.02:
            found[name] += 1.0
    return found


def batch(n: int, seed: int, case: Case) -> func.Sequences:
    """Draw sequences."""
    draw, half = torch.Generator().manual_seed(seed), case.tokens // 2
    rows = torch.randint(case.shape["vocab_size"], (n, case.tokens), generator=draw).tolist()
    return func.pad([row[:half] for row in rows], [row[half:] for row in rows])


def _meta(shape: dict[str, Any]) -> Any:
    """Make the model without weights."""
    with func.without_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape), attn_implementation="eager")


def explained(mesh: Any, case: Case) -> dict[str, Any]:
    """Explain a step, and say what it took."""
    torch.set_num_threads(1)
    group = None if mesh is None else group_of(mesh)
    model = _meta(case.shape)
    E, U = (batch(n, seed, case) for seed, n in enumerate((case.E, case.U)))
    shapes = {name: leaf.shape for name, leaf in model.named_parameters()}
    before = bytes_resident()
    with return_memory():  # else whole leaves, of which this rank keeps its shard, leave holes that count until the end
        params = leaves(shapes, 1, 0.02, group)
        m, root = (leaves(shapes, seed, 1e-3, group) for seed in (2, 3))
        v = {name: leaf.square_() for name, leaf in root.items()}
    if group is None:
        for name, leaf in params.items():
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._parameters[own] = torch.nn.Parameter(leaf)
        model.tie_weights()
    S = func.sequence_logprob(func.make_functional(model)[0])
    state = precond.adamw_init({name: leaf.new_empty(0) for name, leaf in params.items()}, lr=1e-4)
    state = precond.AdamWState(**{**vars(state), "exp_avg": m, "exp_avg_sq": v, "step": dict.fromkeys(params, 7)})
    w = torch.linspace(-1, 2, case.U)
    ranks, rank = (1, 0) if group is None else (group.size, group.rank)
    with counting(ranks, rank) as sent:
        effect, _ = explain_step(S, params, E, U, w, state, max_norm=1.0, mesh=mesh)
    peak = peak_resident()
    return {
        "bytes": peak - before,
        "sent": sum(sent.values()),
        "predicted": effect.predicted.tolist(),
        "parameters": sum(s.numel() for s in shapes.values()),
    }


def predicted(ranks: int, case: Case) -> dict[str, Any]:
    """Predict memory and bytes on the wire as `fkernel estimate --sharded` does."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    bones = skeleton_of(",".join(f"{key}={case.shape[key]}" for key in keys) + ",tie_word_embeddings=1", case.tokens)
    cost = cost_in_shards(workload_of(bones, case.U, case.E, whole=False), ranks)
    return {"bytes": sum(cost.memory.values()), "sent": sum(cost.sent.values()), "of what": cost.memory}


def write(folder: Path) -> None:
    """Write θ, m and v as torch.distributed.checkpoint does, from one process, and the configuration beside it."""
    model = _meta(SHAPE)
    shapes = {name: leaf.shape for name, leaf in model.named_parameters()}
    entries = {name: {"step": torch.tensor(7.0)} for name in shapes}
    for seed, moment in enumerate(("exp_avg", "exp_avg_sq")):
        for name, leaf in leaves(shapes, seed + 2, 1e-3, None).items():
            entries[name][moment] = leaf.square()
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}
    group |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None, "params": [*shapes]}
    optimizer = {"state": entries, "param_groups": [{**group, "decoupled_weight_decay": True}]}
    save({"model": leaves(shapes, 1, 0.02, None), "optimizer": optimizer}, checkpoint_id=folder / "dcp", no_dist=True)
    model.config.save_pretrained(folder)


def loaded(mesh: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint, whole or this rank's shards, and say what it took."""
    torch.set_num_threads(1)
    before = bytes_resident()
    if mesh is None:
        kept = checkpoint.load(folder / "dcp", model=folder).optimizer
    else:
        kept = checkpoint.load_shards(folder / "dcp", mesh, model=folder).optimizer
    assert kept is not None
    return {
        "bytes": peak_resident() - before,
        "kept": bytes_resident() - before,
    }


def work(rank: int, ranks: int, of: Path | Case, queue: Any) -> None:
    """Run on one rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    mesh = None
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    if isinstance(of, Case):
        explained(mesh, of._replace(shape=TINY))
    queue.put((rank, explained(mesh, of) if isinstance(of, Case) else loaded(mesh, of)))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def measured(ranks: int, of: Path | Case) -> list[dict[str, Any]]:
    """Run on some ranks, in new processes."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=work, args=(rank, ranks, of, queue)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=900) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(ranks)]


def compared(case: Case, several: list[int]) -> dict[str, Any]:
    """Measure one process, then each number of ranks."""
    (alone,) = measured(1, case)
    P = alone["parameters"]
    result: dict[str, Any] = {"parameters": P, "tokens": case.tokens, "sequences": {"E": case.E, "U": case.U}}
    result["ranks"] = {"1": {"bytes": [alone["bytes"]], "vectors of θ": alone["bytes"] / 4 / P, "relative": 1.0}}
    for ranks in several:
        every, cost = measured(ranks, case), predicted(ranks, case)
        most = max(each["bytes"] for each in every)
        apart = max(abs(a - b) for each in every for a, b in zip(each["predicted"], alone["predicted"], strict=True))
        size = max(abs(value) for value in alone["predicted"])
        result["ranks"][str(ranks)] = {
            "bytes": [each["bytes"] for each in every],
            "sent": [each["sent"] for each in every],
            "cost model": cost,
            "cost model, relative": cost["bytes"] / most,
            "vectors of θ": most / 4 / P,
            "relative": most / alone["bytes"],
            "predicted change, largest difference": apart / size,
        }
    return result


def main() -> None:
    """Measure each case, and loading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--cases", nargs="*", default=[*CASES], choices=CASES)
    options = parser.parse_args()
    result: dict[str, Any] = {"environment": environment()}
    result["cases"] = {name: compared(CASES[name], options.ranks) for name in options.cases}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        every = {ranks: measured(ranks, Path(folder)) for ranks in (1, *options.ranks)}
    whole = every[1][0]["bytes"]
    P = sum(leaf.numel() for leaf in _meta(SHAPE).parameters())
    result["loading θ, m and v"] = {"bytes of them": 12 * P} | {
        str(ranks): {"bytes": [one["bytes"] for one in each], "relative": max(one["bytes"] for one in each) / whole}
        for ranks, each in every.items()
    }
    json.dump(result, sys.stdout, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    main()
