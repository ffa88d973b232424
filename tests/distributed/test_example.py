"""The example of `docs/scale.md`: torchrun on a distributed checkpoint gives the step that one process explains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import GPT2Config, GPT2LMHeadModel

import fkernel as fk
from fkernel import checkpoint
from tests.distributed.cases import two_steps

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "examples" / "explain_sharded.py"
LAUNCHED = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2"]
SEEDED = 'PYTHONHASHSEED=$((RANK + 1)) exec "$0" "$@"'
"""Each rank has other hashes, as ranks of a launcher have, and each run the same."""
E = [([1, 2], [3, 4, 5]), ([6], [7, 8])]
U = [([1], [9, 2, 3], 0.5), ([4, 4], [5], -1.0), ([7, 3, 1], [2, 6], 0.25)]


def trained(folder: Path) -> None:
    """Take two steps of AdamW with GPT-2, whose tokens and positions are tables of one shape, and save them."""
    torch.manual_seed(0)
    shape: Any = {"vocab_size": 12, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder / "base")
    weights, state = two_steps(model)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder / "step", no_dist=True)


def alone(folder: Path) -> Any:
    """Explain the step in this process."""
    whole: Any = checkpoint.load(folder / "step", model=folder / "base", dtype=torch.float64)
    apply, params = fk.func.make_functional(whole.model)
    e, u = (fk.func.pad([row[0] for row in rows], [row[1] for row in rows]) for rows in (E, U))
    weights = torch.tensor([w for *_, w in U], dtype=torch.float64)
    return fk.explain_step(fk.func.sequence_logprob(apply), params, e, u, weights, whole.optimizer, max_norm=0.5)[0]


@pytest.mark.turns(6)
def test_torchrun_of_the_example_explains_the_step_of_one_process(tmp_path):
    trained(tmp_path)
    for name, rows in (("E", E), ("U", U)):
        lines = [json.dumps(dict(zip(("prompt", "response", "weight"), row, strict=False))) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / each) for each in ("step", "E.jsonl", "U.jsonl", "out.json")]
    options = ["--model", str(tmp_path / "base"), "--max-norm", "0.5", "--dtype", "float64"]
    done = subprocess.run(
        [*LAUNCHED, "bash", "-c", SEEDED, sys.executable, str(SCRIPT), *files, *options],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = json.loads((tmp_path / "out.json").read_text()), alone(tmp_path)
    for name, values in found.items():
        own = torch.tensor(values, dtype=torch.float64)
        assert float((own - getattr(expected, name)).norm() / getattr(expected, name).norm()) <= 1e-12, name
