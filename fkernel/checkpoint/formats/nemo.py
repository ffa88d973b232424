"""NeMo-RL's checkpoints of its DTensor workers: weights and optimizer's state lie in folders beside each other.

    step_N/policy/tokenizer/        save_pretrained of it
    step_N/policy/weights/          v1: torch.distributed.checkpoint of {"model": …}
    step_N/policy/optimizer/            of {"optim": {"optim": {state, param_groups}, "sched": …}}
    step_N/policy/weights/model/    v2 (nemo_automodel): shard-*-model-*-of-*.safetensors with .hf_metadata/config.json,
                                        or torch.distributed.checkpoint, the names at its top
                                        or of LoRA, adapter_model.safetensors in PEFT's names
    step_N/policy/optimizer/optim/      of {"optim": flattened, "sched": …}; of LoRA, in the names of its own model:
                                        model.layers.0.self_attn.q_proj.lora_A.weight

step_N/, its policy/ and the folder weights/ are the same checkpoint. Megatron workers write another format
(`fkernel.checkpoint.formats.megatron`).

Source: github.com/NVIDIA-NeMo/RL at 7ea279a, `nemo_rl/utils/native_checkpoint.py`, `nemo_rl/models/automodel/
checkpoint.py`; nemo_automodel 0.7.0, `components/checkpoint/checkpointing.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel.checkpoint.contents import optimizer_in, weights_in
from fkernel.checkpoint.distributed import METADATA, read_distributed
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.model import ADAPTER
from fkernel.checkpoint.shards import PATTERN, read_shards
from fkernel.errors import CheckpointError

CONFIGS = (".hf_metadata", "consolidated")
"""Where v2 leaves config.json, beside its shards."""


def find(root: Path) -> Layout | None:
    """Tell a checkpoint of NeMo-RL's by its folders; None where it is none.

    Args:
        root: step_N/, its policy/, policy/weights/ or policy/weights/model/.
    """
    root = root.absolute()
    policies = [root / "policy", root]
    policies += [root.parent] if root.name == "weights" else []
    policies += [root.parent.parent] if (root.parent.name, root.name) == ("weights", "model") else []
    for policy in policies:
        places = [place for place in (policy / "weights", policy / "weights" / "model") if _holds_weights(place)]
        if places:
            config = next((places[0] / name for name in CONFIGS if (places[0] / name / "config.json").is_file()), None)
            optimizer, tokenizer = (
                each if each.is_dir() else None for each in (policy / "optimizer", policy / "tokenizer")
            )
            return Layout("nemo", places[0], optimizer, config=config, tokenizer=tokenizer)
    return None


def read(layout: Layout, model: Any, optimizer: bool = True) -> Saved:
    """Read the weights, and the optimizer's state from the folder beside them.

    Arguments and errors as in `fkernel.checkpoint.formats.read`.
    """
    if (layout.model / ADAPTER).is_file():
        weights = {}  # which are loaded with their base model
    elif (layout.model / METADATA).is_file():
        weights = weights_in(read_distributed(layout.model), layout.model)
    else:
        shapes = {name: tuple(leaf.shape) for name, leaf in model.state_dict().items()}
        weights = read_shards(layout.model, shapes)
    if layout.optimizer is None or not optimizer:
        return Saved(weights)
    place = next((each for each in (layout.optimizer, layout.optimizer / "optim") if (each / METADATA).is_file()), None)
    if place is None:
        raise CheckpointError(
            f"{layout.optimizer} holds neither {METADATA} nor optim/{METADATA}, as NeMo-RL's optimizer states do: the "
            f"file is missing. Say optimizer=False to load the weights alone."
        )
    found = read_distributed(place)
    state_dict = optimizer_in(found, place)
    if state_dict is None:
        raise CheckpointError(f"{place} holds {sorted(map(str, found))[:8]}; expected an optimizer's state, 'optim'.")
    return Saved(weights, _in_pefts_names(state_dict, model) if not weights else state_dict)


def _in_pefts_names(state_dict: Any, model: Any) -> Any:
    """Name an adapter's parameters as PEFT does: base_model.model.….lora_A.default.weight."""
    own = {
        name.removeprefix("base_model.model.").replace(".default.", "."): name for name, _ in model.named_parameters()
    }
    groups = [
        {**group, "params": [own.get(name, name) for name in group["params"]]} for group in state_dict["param_groups"]
    ]
    return {
        "state": {own.get(name, name): entry for name, entry in state_dict["state"].items()},
        "param_groups": groups,
    }


def _holds_weights(place: Path) -> bool:
    return any((place / name).is_file() for name in (METADATA, ADAPTER)) or next(place.glob(PATTERN), None) is not None
