"""Where trainers keep what, and how it becomes one state: a module for each family of writers.

    common       one process: save_pretrained, Trainer, accelerate, torch.save; torch.distributed.checkpoint
    deepspeed    ZeRO-0 to 3, as DeepSpeed, OpenRLHF, open-instruct, Trainer and accelerate lay it
    fsdp         rank files of FSDP: verl's, accelerate's
    nemo         NeMo-RL's step_N/policy/
    prime        prime-rl's step_N/trainer/
    megatron     Megatron-Core's distributed checkpoints: verl's, NeMo-RL's, slime's

Each has `find(root) -> Layout | None`, which looks at names of files, and `read(layout, model, optimizer) -> Saved`,
which brings the files together: whole tensors under the model's own parameter names. What a state then means is the
same for all (`fkernel.checkpoint.optimizer`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fkernel.checkpoint.formats import common, deepspeed, fsdp, megatron, nemo, prime
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout, common_layout

__all__ = ["FORMATS", "STATE_PLACES", "Format", "Saved", "find_layout", "read", "wrapped"]


class Format(NamedTuple):
    """How one family of writers is told and read.

    Attributes:
        find: a directory or file → its layout, or None where it is not of this family.
        read: (layout, the model's architecture, whether the optimizer's state is wanted) → what was saved.
        wrap: (layout, the base model or its architecture) → the same with the adapters that the training put around it.
    """

    find: Callable[[Path], Layout | None]
    read: Callable[[Layout, Any, bool], Saved]
    wrap: Callable[[Layout, Any], Any] = lambda layout, model: model


FORMATS: dict[str, Format] = {
    "deepspeed": Format(deepspeed.find, deepspeed.read),
    "fsdp ranks": Format(fsdp.find, fsdp.read, fsdp.adapted),
    "nemo": Format(nemo.find, nemo.read),
    "prime": Format(prime.find, prime.read),
    "megatron": Format(megatron.find, megatron.read),
}
"""{kind of layout: its format}, tried in this order; what none finds is `common`."""


STATE_PLACES = (
    *("optimizer.pt", "optimizer.bin", "optimizer_0/", "'optimizer' in a file or a distributed checkpoint"),
    *("*_optim_states.pt (DeepSpeed)", "optim_world_size_*_rank_*.pt (verl)", "optimizer_0_rank*.bin (accelerate)"),
    *("policy/optimizer/ (NeMo-RL)", "optimizer.state.* (Megatron)"),
)
"""Where an optimizer's state is looked for."""


def find_layout(path: str | Path) -> Layout:
    """Tell how a checkpoint is laid out.

    Raises:
        CheckpointError: there is nothing, or nothing that is recognised; it says what was found and expected.
    """
    found = (each.find(Path(path)) for each in FORMATS.values())
    return next((layout for layout in found if layout is not None), None) or common_layout(path)


def wrapped(layout: Layout, model: Any) -> Any:
    """Put around a base model, or its architecture, what the training put around its own: LoRA's adapters.

    Raises:
        ModelError, CheckpointError: they cannot be made from what the checkpoint tells.
    """
    return FORMATS[layout.kind].wrap(layout, model) if layout.kind in FORMATS else model


def read(layout: Layout, model: Any, optimizer: bool = True) -> Saved:
    """Read a checkpoint's files, one at a time.

    Args:
        layout: what `find_layout` gave.
        model: the architecture: names and shapes are held against it; its values do not matter.
        optimizer: False to leave the optimizer's state unread.

    Raises:
        CheckpointError: a file is missing, damaged, or of another rank or step.
    """
    return (
        FORMATS[layout.kind].read(layout, model, optimizer)
        if layout.kind in FORMATS
        else common.read(layout, optimizer)
    )
