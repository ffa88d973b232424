"""The same call in two processes, and with one and two threads: which bits are the same, and how far others are apart.

    python -m tests.torture.determinism [--out FILE]

Differences are of an array's entries, relative to its largest one. After a resume bits are the same as undisturbed
(`tests.torture.crashes`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fkernel as fk
from fkernel.cli.writing import execute
from fkernel.study import FisherKernelPlan
from tests.study.conftest import made

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "torture_determinism.json"
Call = Callable[[Path], dict[str, np.ndarray]]


def study(place: Path) -> dict[str, np.ndarray]:
    """A whole study of a tiny policy, with what accounts for its step: every array that it keeps."""
    run = made(place / "run")
    requests = [{"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4}]
    plan = run.plan(place / "out", requests=requests, analyses={"ledger": True}, self_kernel=True)
    execute(FisherKernelPlan.model_validate(plan), overwrite=False, log="minimal", page=False)
    with np.load(place / "out" / "kernel.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def kernel(place: Path) -> dict[str, np.ndarray]:
    """A kernel of a model wide enough that two threads share its products."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 2048}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=4)).eval()
    apply, params = fk.func.make_functional(model)
    ids = torch.randint(1, 2048, (12, 96))
    batch = fk.func.Sequences(ids, torch.ones_like(ids), (torch.arange(96) >= 48).int().expand(12, -1).contiguous())
    f = fk.func.sequence_logprob(apply)
    E, U = (fk.func.Sequences(*(leaf[part] for leaf in batch)) for part in (slice(4), slice(4, 12)))
    return {"kernel": fk.kernel(f, params, E, U, fk.precond.identity()).detach().numpy()}


def called(call: Call, threads: int, work: Path) -> dict[str, np.ndarray]:
    """Call in a process of its own, in a folder of the same name."""
    place, kept = work / "place", work / "arrays.npz"
    kept.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(threads)
            place.mkdir()
            np.savez(kept, allow_pickle=False, **call(place))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.rename(place, work / f"place-{threads}-{len(os.listdir(work))}")
    with np.load(kept, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """How far arrays are apart, relative to the largest entry of each; those that are the same are left out."""
    assert {*one} == {*other}
    found = dict[str, float]()
    for name, a in one.items():
        if a.tobytes() != other[name].tobytes():
            found[name] = float(np.abs(a - other[name]).max() / np.abs(a).max())
    return found


def main() -> int:
    """Compare, and save what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.determinism", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    given, found, wrong = parser.parse_args(), dict[str, Any](), 0
    for name, call in {"study": study, "kernel": kernel}.items():
        with tempfile.TemporaryDirectory(prefix="fkernel-torture-") as work:
            one, again, two, twice = (called(call, threads, Path(work)) for threads in (1, 1, 2, 2))
        same = {"one thread, two processes": apart(one, again), "two threads, two processes": apart(two, twice)}
        threads = dict(sorted(apart(one, two).items(), key=lambda item: -item[1]))
        found[name] = {"arrays": len(one), **same, "one thread and two": threads}
        wrong += bool(same["one thread, two processes"])
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
