"""Where trainers keep what, and how it becomes one state: a module for each family of writers.

    plain        one process: save_pretrained, Trainer, accelerate, torch.save; torch.distributed.checkpoint
    deepspeed    ZeRO-0 to 3, as DeepSpeed, OpenRLHF, open-instruct, Trainer and accelerate lay it
    fsdp         rank files of FSDP: verl's, accelerate's
    nemo         NeMo-RL's step_N/policy/
    prime        prime-rl's step_N/trainer/
    megatron     Megatron-Core's distributed checkpoints: verl's, NeMo-RL's, slime's

Each has `find(root) -> Layout | None`, which looks at names of files, and `read(layout, model, optimizer) -> Saved`,
which brings the files together: whole tensors under the model's own parameter names. What a state then means is the
same for all (`fkernel.checkpoint.optimizer`).
"""

from fkernel.checkpoint.formats.registry import FORMATS, STATE_PLACES, Format, find_layout, read, wrapped
from fkernel.checkpoint.formats.saved import Saved

__all__ = ["FORMATS", "STATE_PLACES", "Format", "Saved", "find_layout", "read", "wrapped"]
