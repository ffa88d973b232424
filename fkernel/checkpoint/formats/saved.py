"""What a trainer's files hold, brought together: the one form that every format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Saved:
    """Weights and optimizer state as a trainer saved them, whole, by the model's own parameter names.

    Attributes:
        weights: {name: tensor} in the dtypes in which they are stored, frozen parameters too. {} where they lie in a
            directory of save_pretrained, which is loaded by itself. Where the trainer keeps float32 master weights and
            nothing else, the masters.
        optimizer: a state_dict of torch's with names for numbers, {"state": {name: {"step": n, "exp_avg": tensor,
            "exp_avg_sq": tensor}}, "param_groups": [{"params": [names], "lr": …, …}]}, or as a trainer's file has it;
            None where none was saved, or none was asked for. An entry's "master_param" is the parameter's float32
            master, which is then θ.
        step: optimizer steps taken, where the trainer tells; None where the state's own steps do.
    """

    weights: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    step: int | None = None
