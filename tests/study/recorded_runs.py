"""Real runs of TRL's GRPOTrainer with a recorder, made once a process: a tiny policy, twelve steps."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from fkernel.record import Recorder, Recording
from tests.record.test_trl import trainer

STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "cispo, KL, two inner epochs": {"loss_type": "cispo", "beta": 0.05, "num_iterations": 2},
    "lora": {"lora": True},
    "bf16 autocast": {"bf16": True, "gradient_checkpointing": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "temperature 0.7": {"temperature": 0.7},
    "a ratio of sequences": {"importance_sampling_level": "sequence", "beta": 0.05, "num_iterations": 2},
    "a penalty without a ratio": {"use_bias_correction_kl": False, "beta": 0.05, "num_iterations": 2},
}
PROBES = [
    {"id": "right", "prompt": "3+5=", "response": "8"},
    {"id": "nine", "prompt": "7+2=", "response": "9"},
    {"id": "eights", "prompt": "19+28=", "response": "88"},
]


@cache
def recording_of(kind: str, snapshots: str | int = "every") -> Recording:
    """A run's recording; the same kind is the same run, whatever the snapshots."""
    place = Path(tempfile.mkdtemp(prefix="fkernel-run-"))
    options = {"lora": False, **{**KINDS, **OTHERS}[kind]}
    made = trainer(
        place, **{"max_steps": STEPS, "save_steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1.0, **options}
    )
    Recorder(place / "recording", snapshots=snapshots).attach(made)
    made.train()
    return Recording.open(place / "recording")


def probes_file(place: Path) -> Path:
    """A file of probes."""
    path = place / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBES))
    return path
