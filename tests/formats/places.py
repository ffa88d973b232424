"""What a user points at in each packed run, and what he says besides."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fkernel import checkpoint
from tests.formats.archives import names
from tests.formats.policy import tiny

INSIDE = {
    "deepspeed_trainer": "checkpoint-2",
    "verl": "global_step_2",
    "nemo": "step_2",
    "prime": "step_2",
    "torchtitan": "step-2",
    "megatron_qwen3": "global_step_2",
    "megatron": "iter_0000002",
}
"""{the beginning of a run's name: the directory inside that the user names}; else the whole."""
ARCHITECTURE = ("deepspeed_trainer", "verl", "megatron_qwen3", "accelerate_trainer", "quantised")
"""Runs that keep a configuration."""
UNTIED = (
    *(
        "deepspeed_zero2_aligned",
        "deepspeed_zero2_round_robin",
        "deepspeed_zero3_subgroups",
        "nemo_v2",
        "megatron_qwen2",
    ),
    *(
        "accelerate_fsdp2_ranks",
        "accelerate_trainer_fsdp2_sharded",
        "prime_fsdp2",
        "prime_offload",
        "torchtitan_fsdp2",
        "megatron_dp_reshardable",
    ),
)
BASELESS = ("verl_fsdp2_lora_only", "nemo_v2_lora")
"""Adapters without the model that they change."""
UNSAID = (
    "quantised_ao_fp8",
    "deepspeed_openrlhf",
    "deepspeed_zero0_fused",
    "deepspeed_zero0_fused_fp32",
    "deepspeed_zero3_fused",
)
"""Whether weight decay is AdamW's, no file says."""


def readable() -> list[str]:
    """List the runs that load here: one form of Megatron's is refused, and torchao's codes need torchao."""
    runs = [run for run in names() if run != "megatron_dp_reshardable"]
    return [run for run in runs if find_spec("torchao") or "_ao_" not in run]


def place_of(run: str, root: Path) -> Path:
    """What a user points at."""
    return root / next((inside for begin, inside in INSIDE.items() if run.startswith(begin)), ".")


def options_of(run: str, root: Path) -> dict[str, Any]:
    """What he says besides."""
    said: dict[str, Any] = {"decoupled": True} if run in UNSAID else {}
    if (not run.startswith(ARCHITECTURE) or run.endswith("sharded")) and run not in BASELESS:
        said["model"] = tiny(seed=7, tied=run not in UNTIED)
    if run == "deepspeed_trainer_lora":
        said["base"] = root / "base"
    if run in BASELESS:
        said["base"] = root.parent / "base"
        tiny(tied=run not in UNTIED).save_pretrained(said["base"])
    return said


def load(run: str, root: Path) -> checkpoint.Checkpoint:
    """Load a run's checkpoint."""
    return checkpoint.load(place_of(run, root), **options_of(run, root))
