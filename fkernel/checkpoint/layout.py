"""Where a training run keeps what: the layouts that trainers write, told apart by the names of their files.

    huggingface   config.json, model*.safetensors          save_pretrained; Trainer and TRL add optimizer.pt,
                                                           scheduler.pt, trainer_state.json
    adapter       adapter_config.json, adapter_model.*     the same of a PEFT model; its base model is elsewhere
                  name/ (the same), optimizer.pt           of an adapter that has a name: the folder's
    nested        model/ (one of the above), optimizer.pt  the study's own; optimizer_param_names.json, scheduler.pt
    accelerate    model*.safetensors, optimizer.bin        Accelerator.save_state: weights without a configuration
    fsdp          pytorch_model_fsdp_0/, optimizer_0/      the same of sharded training
    distributed   .metadata, *.distcp                      torch.distributed.checkpoint of {"model": …, "optimizer": …},
                                                           nested or flattened; see `fkernel.checkpoint.contents`
    file          a file                                   torch.save({"model": …, "optimizer": …})

The last four say nothing about the architecture: the caller gives a model. Formats of several files that one trainer or
engine writes are told apart, and read, in `fkernel.checkpoint.formats`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from fkernel.checkpoint.distributed import METADATA
from fkernel.checkpoint.model import ADAPTER
from fkernel.errors import CheckpointError, listing

Kind = Literal[
    "huggingface",
    "adapter",
    "nested",
    "accelerate",
    "fsdp",
    "distributed",
    "file",
    "deepspeed",
    "fsdp ranks",
    "nemo",
    "megatron",
]
NAMES = "optimizer_param_names.json"
TRAINER_STATE = "trainer_state.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Weights for `load_model`, which reads safetensors and says how the last are converted."""
PICKLED = "pytorch_model.bin"
"""Weights as transformers and DeepSpeed's zero_to_fp32.py wrote them: read as tensors only, as every file is."""


class Layout(NamedTuple):
    """Where things are.

    Attributes:
        kind: which layout.
        model: the directory of weights and configuration, or the file or directory that holds a state dict.
        optimizer: the optimizer's file or directory; None where there is none, or where it is inside `model`.
        names: a file with the parameters' names in the optimizer's order, or None.
        scheduler: the scheduler's file, or None.
        trainer_state: trainer_state.json, or None.
        adapter: the name that an adapter had in its training; its parameters' names hold it.
        config: a directory of config.json and a tokenizer, where the weights do not lie in one.
        tokenizer: a directory of a tokenizer alone, or None.
    """

    kind: Kind
    model: Path
    optimizer: Path | None = None
    names: Path | None = None
    scheduler: Path | None = None
    trainer_state: Path | None = None
    adapter: str = "default"
    config: Path | None = None
    tokenizer: Path | None = None

    @property
    def places(self) -> tuple[Path, ...]:
        """Directories in which its configuration and its tokenizer may lie, the nearest first."""
        around = self.model.parent if self.kind in ("nested", "fsdp") else None
        return tuple(place for place in (self.model, self.config, self.tokenizer, around) if place is not None)

    @property
    def pretrained(self) -> bool:
        """Whether `model` is a directory of save_pretrained, with weights: of a whole model, or of an adapter."""
        if (self.model / ADAPTER).is_file():
            return True
        return (self.model / "config.json").is_file() and _first(self.model, *WHOLE) is not None

    @property
    def needs_model(self) -> bool:
        """Whether the caller must say what architecture it is."""
        return not self.pretrained and self.config is None


def common_layout(path: str | Path) -> Layout:
    """Tell how a checkpoint is laid out that is of none of `fkernel.checkpoint.formats`.

    Raises:
        CheckpointError: there is nothing, or nothing that is recognised; it says what was found and expected.
    """
    root = Path(path)
    if root.is_file():
        return Layout("file", root)
    if not root.is_dir():
        raise CheckpointError(f"There is no checkpoint at {root}: no such directory or file.")
    if (root / METADATA).is_file():
        return Layout("distributed", root)
    beside = _beside(root)
    if (root / ADAPTER).is_file():
        if beside["optimizer"] is None and _named_adapters(root.parent) == [root.absolute().name]:
            return Layout("adapter", root, **_beside(root.parent), adapter=root.absolute().name)
        return Layout("adapter", root, **beside)
    if (root / "config.json").is_file():
        if (root / PICKLED).is_file() and _first(root, *WHOLE) is None:
            return Layout("file", root / PICKLED, **beside, config=root)
        return Layout("huggingface", root, **beside)
    if (root / "model").is_dir():
        return Layout("nested", root / "model", **beside)
    sharded = _first(root, "pytorch_model_fsdp_0")
    if sharded is not None:
        return Layout("fsdp", sharded, **beside)
    if _first(root, "model.safetensors", "model.safetensors.index.json") is not None:
        return Layout("accelerate", root, **beside)
    adapters = _named_adapters(root)
    if len(adapters) == 1:
        return Layout("adapter", root / adapters[0], **beside, adapter=adapters[0])
    if adapters:
        raise CheckpointError(
            f"{root} holds {len(adapters)} adapters ({', '.join(adapters)}), and nothing says which of them its "
            f"optimizer trained; name one's directory, with optimizer=False."
        )
    raise CheckpointError(_unknown(root))


def is_inner(path: str | Path) -> bool:
    """Whether a directory is model/ of a nested checkpoint: its optimizer's state lies beside it, where it belongs."""
    inner = Path(path).absolute()
    around = inner.parent
    return inner.name == "model" and not any((around / name).exists() for name in ("config.json", ADAPTER, METADATA))


def _beside(root: Path) -> dict[str, Any]:
    return {
        "optimizer": _first(root, "optimizer.pt", "optimizer.bin", "optimizer_0"),
        "names": _first(root, NAMES),
        "scheduler": _first(root, "scheduler.pt", "scheduler.bin"),
        "trainer_state": _first(root, TRAINER_STATE),
    }


def _named_adapters(root: Path) -> list[str]:
    """List the adapters that PEFT saved in folders of their names, where a training's state lies around them.

    A directory of checkpoints, or one that is a model or an adapter itself, has none.
    """
    own = any((root / name).exists() for name in ("config.json", ADAPTER, METADATA))
    if own or _beside(root)["optimizer"] is None:
        return []
    names = sorted(item.parent.name for item in root.glob(f"*/{ADAPTER}"))
    return [name for name in names if "." not in name and not name.startswith("checkpoint-")]


def _first(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def _unknown(root: Path) -> str:
    inside = sorted(item.name for item in root.iterdir())
    steps = [name for name in inside if name.startswith("checkpoint-")]
    if steps:
        steps = sorted(steps, key=lambda name: (len(name), name))
        several = "" if len(steps) == 1 else "s"
        return f"{root} holds {len(steps)} checkpoint{several}, {listing(steps)}; name one, such as {root / steps[-1]}."
    pickled = [name for name in inside if name.startswith("pytorch_model") and name.endswith(".bin")]
    if pickled:
        return f"{root} holds weights as {pickled[0]} and no config.json; save them with save_pretrained()."
    return (
        f"{root} is no checkpoint that is recognised: it holds {inside[:8]}. Expected one of: config.json with "
        f"safetensors, {ADAPTER}, a folder model/, model.safetensors, pytorch_model_fsdp_0/, {METADATA}."
    )
