"""FSDP's rank files: each rank saved its own part of the weights and of the optimizer's state, with torch.save.

    verl          global_step_N/actor/  {model,optim,extra_state}_world_size_{W}_rank_{r}.pt, fsdp_config.json,
                  huggingface/ (configuration, tokenizer), lora_train_meta.json where there are adapters
    accelerate    pytorch_model_fsdp_0_rank{r}.bin, optimizer_0_rank{r}.bin: save_fsdp_model(…, use_dcp=False)

How a part says where it belongs:

    FSDP2                      a DTensor: its mesh of ranks, and on which dimension it is cut (`parts`)
    FSDP1, weights             a DTensor, or without a device mesh a ShardedTensor, which notes where it begins
    FSDP1, optimizer, by name  likewise (accelerate)
    FSDP1, optimizer           in verl nothing does: a number and a stretch of numbers, which the sizes of the model's
                               parameters and layers decide (`units`)

Source: verl 0.9.1, utils/checkpoint/fsdp_checkpoint_manager.py; accelerate 1.15, utils/fsdp_utils.py; torch 2.13,
distributed/fsdp/_flat_param.py, distributed/tensor/_api.py and distributed/_shard/sharded_tensor/api.py.
"""

from fkernel.checkpoint.formats.fsdp.adapters import adapted
from fkernel.checkpoint.formats.fsdp.places import find
from fkernel.checkpoint.formats.fsdp.reading import read

__all__ = ["adapted", "find", "read"]
