"""verl's LoRA adapters: what the training put around its model, from the few numbers that it saved of it.

    lora_adapter/adapter_config.json    PEFT's configuration, whole (verl before 0.8)
    lora_train_meta.json                {"r", "lora_alpha", "task_type"}; which modules have adapters, the names in the
                                        model's files tell; the rest is what verl leaves at PEFT's defaults

Source: verl 0.9.1, `FSDPCheckpointManager._save_lora_train_meta` and `FSDPEngine._build_lora_module`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel.checkpoint.files import read_json
from fkernel.checkpoint.formats.fsdp.parts import opened
from fkernel.checkpoint.formats.fsdp.places import ADAPTER_SIZES, is_verl, rank_files
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.model import ADAPTER
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError, ModelError, listing

FIRST = ".lora_A."


@libraries_quiet()
def adapted(layout: Layout, model: Any) -> Any:
    """Put around a base model the adapters that a checkpoint of verl's has; anything else is returned as it is.

    Args:
        layout: of `find`.
        model: the base model, or its architecture; a PeftModel is returned as it is.

    Raises:
        ModelError: peft is not installed, or the adapters that PEFT makes are not those in the files.
        CheckpointError: a file is damaged.
    """
    config = _configured(layout.model)
    if config is None or hasattr(model, "peft_config"):
        return model
    try:
        from peft import LoraConfig
        from peft.mapping_func import get_peft_model
    except ImportError:
        raise ModelError(f"{layout.model} has LoRA adapters; install peft to load them.") from None
    saved = {name for name in opened(rank_files(layout.model, "model")[0], "a model") if "lora_" in name}
    if not saved:
        raise CheckpointError(f"{layout.model} says that it has LoRA adapters ({config}), and its files hold none.")
    config.setdefault("target_modules", sorted({_module(name) for name in saved if FIRST in name}))
    made = get_peft_model(model, LoraConfig(**config))
    own = {name for name, _ in made.named_parameters() if "lora_" in name}
    if own != saved:
        raise ModelError(
            f"The adapters in {layout.model} are not those that PEFT makes with r={config['r']} for "
            f"{listing(config['target_modules'])}: they differ in {listing(sorted(own ^ saved))}. Give model=, the "
            f"PeftModel as the training made it."
        )
    return made.eval()


def _configured(directory: Path) -> dict[str, Any] | None:
    """Read how adapters were made; None where nothing tells of any."""
    if not directory.is_dir() or not is_verl(directory):
        return None
    whole, sizes = directory / "lora_adapter" / ADAPTER, directory / ADAPTER_SIZES
    if whole.is_file():
        config = read_json(whole, "a PEFT adapter's configuration")
        keys = (
            "r",
            "lora_alpha",
            "target_modules",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "task_type",
        )
        if isinstance(config, dict) and {"r", "lora_alpha"} <= set(config):
            return {key: config[key] for key in keys if key in config}
        raise CheckpointError(f"{whole} has no r and lora_alpha; expected a PEFT adapter's configuration.")
    if not sizes.is_file():
        return None
    config = read_json(sizes, "a LoRA adapter's sizes")
    r, alpha = (config.get(key) if isinstance(config, dict) else None for key in ("r", "lora_alpha"))
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        raise CheckpointError(f"{sizes} has no whole number r and no lora_alpha: {config!r}.")
    return {"r": r, "lora_alpha": alpha, "task_type": str(config.get("task_type") or "CAUSAL_LM")}


def _module(name: str) -> str:
    """The module that an adapter's parameter belongs to, as the base model names it.

    Example:
        >>> _module("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
        'model.layers.0.self_attn.q_proj'
    """
    return name.partition(FIRST)[0].removeprefix("base_model.model.")
