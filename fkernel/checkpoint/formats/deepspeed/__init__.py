"""DeepSpeed's checkpoints: a training's flat float32 partitions, cut back into parameters.

`engine.save_checkpoint` writes into one directory, named by a tag (global_step2/); a file `latest` beside it names the
newest. The trainers that save with DeepSpeed put that directory

    OpenRLHF         <ckpt>/_actor/<tag>/        latest in _actor/
    open-instruct    <state>/global_stepN/       latest in <state>/
    HF Trainer, TRL  checkpoint-N/global_stepN/  latest, and the weights by save_pretrained, in checkpoint-N/
    accelerate       <dir>/pytorch_model/        latest in <dir>/

With W ranks, r = 0 … W−1, and θ the float32 masters:

    stage 0      mp_rank_00_model_states.pt                        weights, and an optimizer of whole tensors
    stage 1, 2   mp_rank_00_model_states.pt                        weights, names and shapes in the flat order
                 [bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states   [rP, (r + 1)P) of each group's flat θ, m, v
    stage 3      zero_pp_rank_{r}_mp_rank_00_model_states          names and shapes; rank r's part of what is frozen
                 [bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states   of each parameter [rk, (r + 1)k), k = ⌈numel / W⌉

Source: DeepSpeed 0.19.8, runtime/engine.py (`_save_checkpoint`), runtime/zero/stage_1_and_2.py, stage3.py,
runtime/bf16_optimizer.py, runtime/fp16/*_optimizer.py (`state_dict`) and utils/zero_to_fp32.py.
"""

from fkernel.checkpoint.formats.deepspeed.places import find
from fkernel.checkpoint.formats.deepspeed.reading import read

__all__ = ["find", "read"]
