"""FSDP as accelerate saves it, by itself and for Hugging Face's Trainer, on gloo ranks.

    use_dcp=False    pytorch_model_fsdp_0_rank{r}.bin, optimizer_0_rank{r}.bin
    sharded          pytorch_model_fsdp_0/, optimizer_0/               torch.distributed.checkpoint
    full             pytorch_model_fsdp.bin, optimizer.bin             one file each; Trainer adds model.safetensors

accelerate turns its FSDP plugin on where it finds an accelerator, and nowhere else (`AcceleratorState.__init__` asks
for a distributed type such as MULTI_GPU). `_fsdp_on_a_cpu` turns it on for gloo ranks too; what it then does, and what
it writes, is its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fkernel.demo.tokenizer import build_tokenizer
from fkernel.shapes import Tree
from tests.formats.policy import BETAS, DECAY, EPS, LR, loss_of, rows, tiny
from tests.formats.truth import Truth, save_truth
from tests.formats.writers import _fsdp1 as fsdp


class Run(NamedTuple):
    """How a run is sharded and saved.

    Attributes:
        fsdp: 1 or 2.
        save: "ranks", "sharded" or "full".
        trainer: whether Hugging Face's Trainer runs it.
        recompute: whether layers recompute their activations, which wraps them and renames parameters.
        orig: FSDP1's use_orig_params.
    """

    fsdp: int
    save: str
    trainer: bool = False
    recompute: bool = False
    orig: bool = False


HOW = {
    "accelerate_fsdp1_ranks": Run(1, "ranks"),
    "accelerate_fsdp2_ranks": Run(2, "ranks", recompute=True),
    "accelerate_fsdp1_sharded": Run(1, "sharded"),
    "accelerate_trainer_fsdp1_full": Run(1, "full", trainer=True, orig=True),
    "accelerate_trainer_fsdp2_full": Run(2, "full", trainer=True, recompute=True),
    "accelerate_trainer_fsdp2_sharded": Run(2, "sharded", trainer=True, recompute=True),
}
RUNS = dict.fromkeys(HOW, 2)


def write(name: str, directory: Path) -> None:
    """Train two steps, save, take the third."""
    _fsdp_on_a_cpu()
    fsdp.on_a_cpu()
    run = HOW[name]
    truth = _trainer(run, directory) if run.trainer else _accelerator(run, directory)
    if dist.get_rank() == 0:
        save_truth(directory, truth)
    dist.barrier()
    dist.destroy_process_group()


def _fsdp_on_a_cpu() -> None:
    """Let accelerate use its FSDP plugin without an accelerator."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    initialise = AcceleratorState.__init__

    def with_plugin(self: Any, *given: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        initialise(self, *given, fsdp_plugin=fsdp_plugin, **more)
        self.fsdp_plugin = fsdp_plugin or vars(self).get("fsdp_plugin")  # all share one state, that of the first
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.device = torch.device("cpu")  # it says cpu:0, which is not equal to it

    AcceleratorState.__init__ = with_plugin


def _accelerator(run: Run, directory: Path) -> Truth:
    """accelerate by itself, with a loop of one's own."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer, set_seed

    set_seed(0)

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=run.fsdp,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        activation_checkpointing=run.recompute,
        use_orig_params=run.orig if run.fsdp == 1 else None,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: Any = tiny(tied=run.fsdp == 1)
    if run.fsdp == 1:  # its parameters are known when it is wrapped
        model = accelerator.prepare(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    model, optimizer = accelerator.prepare(model, optimizer)

    def backward(step: int) -> None:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, rows(step).tensor_split(dist.get_world_size())[dist.get_rank()]))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)

    for step in (0, 1):
        backward(step)
        optimizer.step()
    path = directory / "checkpoint"
    if run.save == "ranks":
        save_fsdp_model(plugin, accelerator, model, path, use_dcp=False)
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, path, use_dcp=False)
    else:
        accelerator.save_state(str(path), safe_serialization=True)
    backward(2)
    known = _known(model, optimizer)
    optimizer.step()
    return Truth(*known, _weights(model, known[1]), {}, _meta(LR))


def _trainer(run: Run, directory: Path) -> Truth:
    """Hugging Face's Trainer: it saves after the second step, and its third is the last."""
    from transformers import Trainer, TrainingArguments

    seen = _Watch()
    tokens = torch.cat([rows(step) for step in range(3)])
    args = TrainingArguments(
        output_dir=str(directory / "run"),
        per_device_train_batch_size=2,
        max_steps=3,
        save_steps=2,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
        fsdp=True,  # pyright: ignore[reportArgumentType]
        fsdp_config={
            "version": run.fsdp,
            "state_dict_type": f"{run.save.upper()}_STATE_DICT",
            "activation_checkpointing": run.recompute,
            "use_orig_params": run.orig,
            "sync_module_states": False,
        },
    )
    data: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    trainer = Trainer(
        model=tiny(tied=run.fsdp == 1),
        args=args,
        train_dataset=data,
        callbacks=[seen],
        processing_class=build_tokenizer(),
    )
    seen.trainer = trainer
    trainer.train()
    after = _weights(trainer.model_wrapped, seen.known[1])
    if dist.get_rank() == 0:
        (directory / "run" / "checkpoint-2").rename(directory / "checkpoint")
        shutil.rmtree(directory / "run")
    return Truth(*seen.known, after, {}, _meta(seen.lr))


class _Watch(TrainerCallback):
    """Keeps what the third step was given."""

    trainer: Any = None
    known: tuple[Tree, Tree, Tree, Tree]
    lr: float

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look after clipping, before the step."""
        if state.global_step == 2:
            self.lr = self.trainer.optimizer.param_groups[0]["lr"]
            self.known = _known(self.trainer.model_wrapped, self.trainer.optimizer)


def _meta(lr: float) -> dict[str, Any]:
    packages = {name: version(name) for name in ("accelerate", "transformers", "torch")}
    return {"step": 2, "lr": lr, "versions": packages}


def _known(model: Any, optimizer: Any) -> tuple[Tree, Tree, Tree, Tree]:
    """Gather θ, both moments and the gradient."""
    own = getattr(optimizer, "optimizer", optimizer)
    exp_avg, exp_avg_sq = (fsdp.moments(model, own, key) for key in ("exp_avg", "exp_avg_sq"))
    return _weights(model, exp_avg), exp_avg, exp_avg_sq, fsdp.gradients(model, own)


def _weights(model: Any, names: Collection[str]) -> Tree:
    return {name: leaf for name, leaf in fsdp.weights(model).items() if name in names}
