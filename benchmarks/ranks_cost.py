"""`python -m benchmarks.ranks_cost`: a step on 1, 2 and 4 ranks, what is predicted of it and what each rank takes.

Each rank is a process of its own with one thread, joined by gloo. Its shard of AdamW's state is made before, and a step
is explained layer by layer, as `fkernel estimate --processes` predicts it. Counted are the bytes that it hands to
collectives for other ranks, and by how much its peak memory exceeds what it held before, θ and moments added. Results
go to stdout as JSON, and with --out to a file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.environment import environment
from benchmarks.memory import _status
from benchmarks.models import build
from fkernel import Strategy, explain_step, precond, tree
from fkernel.distributed import group_of, shard_tree
from fkernel.engine.planning import RanksCost, Workload, cost_in_shards, cost_on_ranks, walk_of
from fkernel.func.layers import cut_of

LAYERS = Strategy("layers", "E", None, None, 0)
ROOT = Path(__file__).parents[1]


@contextmanager
def counting(ranks: int, rank: int) -> Iterator[dict[str, float]]:
    """Count the bytes that this rank sends to others, by what they are; sums count as in a ring."""
    sent = {"rows": 0.0, "vectors": 0.0}
    exchange, total = dist.all_to_all_single, dist.all_reduce
    names = [name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)]
    gather = getattr(dist, names[0])

    def exchanged(out: Any, rows: Any, received: Any, parts: Any, **more: Any) -> Any:
        sent["rows"] += (sum(parts) - parts[rank]) * rows.element_size()
        return exchange(out, rows, received, parts, **more)

    def summed(x: Any, *args: Any, **more: Any) -> Any:
        sent["vectors"] += 2 * x.numel() * x.element_size() * (ranks - 1) / ranks
        return total(x, *args, **more)

    def gathered(every: Any, own: Any, *args: Any, **more: Any) -> Any:
        sent["vectors"] += own.numel() * own.element_size() * (ranks - 1)
        return gather(every, own, *args, **more)

    with (
        patch.object(dist, "all_to_all_single", exchanged),
        patch.object(dist, "all_reduce", summed),
        patch.object(dist, names[0], gathered),
    ):
        yield sent


def prepared(
    shape: str, n_U: int, n_E: int, T: int, mesh: Any, in_shards: bool = False
) -> tuple[Callable[[], Any], RanksCost]:
    """A step on this rank's shards of the state, and of θ, ready to be explained, and what is predicted of it."""
    ranks, subject = 1 if mesh is None else mesh.size(), build.__wrapped__(shape)  # of which nothing is certified
    E, U = subject.batch(n_E, T, 1), subject.batch(n_U, T, 2)
    state = precond.adamw_init(subject.params, lr=1e-4)
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": {name: leaf**2 + 1e-4 for name, leaf in subject.params.items()}}
    if mesh is not None:
        group = group_of(mesh)
        moments = {
            each: {n: leaf.clone() for n, leaf in shard_tree(group, whole).items()} for each, whole in moments.items()
        }
    state = replace(state, **moments)
    cut = cut_of(build(shape).f, subject.params, U)
    assert not isinstance(cut, str), cut
    tokens = {"E": [T] * n_E, "U": [T] * n_U}
    size, walk = tree.size(subject.params), walk_of(cut, subject.params, tokens)
    cost = (cost_in_shards if in_shards else cost_on_ranks)(Workload(tokens, size, 4, 0.0, None, walk=walk), ranks)
    params = shard_tree(group_of(mesh), subject.params) if in_shards else subject.params
    weights = torch.linspace(-1, 1, n_U)

    def explain() -> None:
        explain_step(subject.f, params, E, U, weights, state, max_norm=1.0, mesh=mesh)

    return explain, cost


def measured(shape: str, n_U: int, n_E: int, T: int) -> dict[str, Any]:
    """What this rank took, and what was predicted."""
    torch.set_num_threads(1)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    mesh = None
    if ranks > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (ranks,))
    with patch("fkernel.engine.step.choose", lambda *args: LAYERS):
        small, _ = prepared("tiny", 2 * ranks, 2 * ranks, 8, mesh)
        small()  # libraries are loaded, threads started
        explain, cost = prepared(shape, n_U, n_E, T, mesh)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS") or 0.0
        with counting(ranks, rank) as sent:
            explain()
    held = cost.memory["parameters"] + 2 * cost.memory["parameters"] / ranks  # θ, and moments in shards
    return {
        "ranks": ranks,
        "rank": rank,
        "memory": 1e6 * ((_status("VmHWM") or 0.0) - before) + held,
        "sent": sent,
        "predicted": {"memory": cost.memory, "sent": cost.sent},
    }


def of_ranks(ranks: int, *sizes: Any) -> list[dict[str, Any]]:
    """Start the ranks, and return what each took."""
    port = str(29500 + os.getpid() % 1000 + ranks)
    own = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.ranks_cost", "--rank", *map(str, sizes)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | own | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(ranks)
    ]
    out = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(each.splitlines()[-1]) for each in out]


def compared(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the ranks: the largest memory, the mean of the bytes sent, and what was predicted of both."""
    memory, sent = (
        max(each["memory"] for each in every),
        {what: sum(each["sent"][what] for each in every) / len(every) for what in ("rows", "vectors")},
    )
    said, expected = sum(every[0]["predicted"]["memory"].values()), every[0]["predicted"]["sent"]
    return {
        "ranks": len(every),
        "memory": memory,
        "memory_predicted": said,
        "memory_ratio": said / memory,
        "sent": sent,
        "sent_predicted": expected,
        "sent_ratio": sum(expected.values()) / sum(sent.values()) if len(every) > 1 else None,
    }


def main() -> None:
    """Measure on 1, 2 and 4 ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="base")
    parser.add_argument("--sizes", default="16,4,48", help="n_U,n_E,T")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        print(json.dumps(measured(given.rank[0], *map(int, given.rank[1:]))))
        return
    sizes = [int(each) for each in given.sizes.split(",")]
    rows = [compared(of_ranks(int(ranks), given.shape, *sizes)) for ranks in given.ranks.split(",")]
    made = {"shape": given.shape, "sizes": dict(zip(("n_U", "n_E", "T"), sizes, strict=True)), "rows": rows}
    text = json.dumps({"environment": environment(), **made}, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
