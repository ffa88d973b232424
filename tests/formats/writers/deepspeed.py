"""DeepSpeed's checkpoints: every ZeRO stage by `engine.save_checkpoint`, laid as OpenRLHF, open-instruct and others do.

    plain           save_checkpoint(dir)                              dir/latest, dir/global_step2/
    OpenRLHF        save_checkpoint(dir/_actor, tag, client_state)    dir/_actor/latest, dir/_actor/global_step2/
    open-instruct   save_checkpoint(dir, client_state)                with random states of numpy; dir/ref_policy/
    Trainer         transformers.Trainer(deepspeed=…)                 dir/checkpoint-2/ with bf16 model.safetensors
    accelerate      Accelerator.save_state(dir)                       dir/latest, dir/pytorch_model/

The truth comes from DeepSpeed's own safe_get_full_* functions; without ZeRO from the optimizer's own tensors; and under
round_robin_gradients, where safe_get_full_* and param_slice_mappings take the parameters in another order than the flat
tensors have them (DeepSpeed 0.19.8), from the same training in one process. FusedAdam and DeepSpeedCPUAdam are
DeepSpeed's own, compiled for the CPU.

Two long scripts that DeepSpeed copies beside every checkpoint (zero_to_fp32.py, zero_to_torch.py) are cut to their
first line.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.formats.policy import BETAS, DECAY, EPS, LR, loss_of, rows, tiny
from tests.formats.truth import Truth, save_truth


class Run(NamedTuple):
    """What is trained, and how it is saved.

    Attributes:
        stage: of ZeRO.
        dtype: that the policy runs in: fp32, bf16 or fp16, the last two with fp32 masters.
        save: "plain", "openrlhf", "open_instruct", "accelerate" or "trainer".
        zero: further settings of zero_optimization.
        config: further settings of DeepSpeed.
        optimizer: "torch", "cpu" or "fused"; "config" lets DeepSpeed make torch's from its configuration.
        groups: one group of parameters, or two: with decay and without.
        frozen: the beginnings of the names of parameters that are not trained.
        tied: whether lm_head is the embedding.
        lora: whether PEFT's adapter is trained.
        processes: how many ranks.
    """

    stage: int
    dtype: str = "bf16"
    save: str = "plain"
    zero: dict[str, Any] = {}  # noqa: RUF012
    config: dict[str, Any] = {}  # noqa: RUF012
    optimizer: str = "torch"
    groups: int = 1
    frozen: tuple[str, ...] = ()
    tied: bool = True
    lora: bool = False
    processes: int = 2


FROZEN = ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
WRITTEN: dict[str, Run] = {
    **{f"deepspeed_zero{stage}_{dtype}": Run(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")},
    "deepspeed_zero0_fused": Run(0, optimizer="fused", groups=2),
    "deepspeed_zero0_fused_fp32": Run(0, "fp32", optimizer="fused"),
    "deepspeed_zero1_fp32_gradients": Run(1, config={"data_types": {"grad_accum_dtype": "fp32"}}, groups=2),
    "deepspeed_zero1_elastic": Run(1, zero={"elastic_checkpoint": True}, optimizer="config"),
    "deepspeed_zero1_frozen": Run(1, frozen=FROZEN),
    "deepspeed_zero2_aligned": Run(2, zero={"parameter_alignment": True}, tied=False, processes=3),
    "deepspeed_zero2_round_robin": Run(2, "fp32", zero={"round_robin_gradients": True}, groups=2, tied=False),
    "deepspeed_zero3_frozen": Run(3, frozen=FROZEN),
    "deepspeed_zero3_subgroups": Run(3, zero={"sub_group_size": 60}, groups=2, tied=False, processes=3),
    "deepspeed_zero3_fused": Run(3, zero={"sub_group_size": 100}, optimizer="fused", groups=2),
    "deepspeed_openrlhf": Run(
        2, save="openrlhf", zero={"offload_optimizer": {"device": "cpu"}}, optimizer="cpu", groups=2
    ),
    "deepspeed_open_instruct": Run(3, save="open_instruct"),
    "deepspeed_accelerate": Run(2, save="accelerate", optimizer="config"),
    "deepspeed_trainer_zero2": Run(2, save="trainer"),
    "deepspeed_trainer_zero3": Run(
        3, save="trainer", zero={"stage3_gather_16bit_weights_on_model_save": True}, optimizer="config"
    ),
    "deepspeed_trainer_lora": Run(2, save="trainer", lora=True),
}
RUNS = {name: run.processes for name, run in WRITTEN.items()}


def write(name: str, directory: Path) -> None:
    """Train, save into directory/checkpoint, and take the step that follows."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja compiles Adam
    run, place = WRITTEN[name], directory / "checkpoint"
    package().init_distributed(dist_backend="gloo")
    truth = trained_by_trainer(run, place) if run.save == "trainer" else trained(run, place)
    if torch.distributed.get_rank() == 0:
        for script in place.rglob("zero_to_*.py"):
            script.write_text(script.read_text().splitlines()[0] + "\n")
        save_truth(directory, truth)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def package(part: str = "") -> Any:
    """DeepSpeed, which this module has its name of."""
    return import_module(f"deepspeed{part}")


def configuration(run: Run) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; gradients are not clipped."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": run.stage, **run.zero},
    }
    if run.dtype != "fp32":
        config[run.dtype] = {"enabled": True, **run.config.get(run.dtype, {})}
    if run.optimizer == "config":
        numbers = {"lr": LR, "betas": [*BETAS], "eps": EPS, "weight_decay": DECAY}
        config["optimizer"] = {"type": "AdamW", "params": numbers}
    return {**{key: value for key, value in run.config.items() if key != run.dtype}, **config}


def policy_of(run: Run, directory: Path) -> Any:
    """The tiny policy, with its frozen parameters, or with an adapter on it."""
    model = tiny(tied=run.tied)
    if run.lora:
        from peft import LoraConfig
        from peft.mapping_func import get_peft_model

        if torch.distributed.get_rank() == 0:
            model.save_pretrained(directory / "base")
        torch.distributed.barrier()
        model = type(model).from_pretrained(directory / "base")
        return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(not name.startswith(run.frozen) if run.frozen else True)
    return model


def optimizer_of(run: Run, model: Any) -> Any:
    """AdamW over one group of parameters or two; None where DeepSpeed makes it."""
    if run.optimizer == "config":
        return None
    named = [(name, leaf) for name, leaf in model.named_parameters() if leaf.requires_grad]
    decayed = [leaf for name, leaf in named if "norm" not in name and "bias" not in name]
    others = [leaf for name, leaf in named if "norm" in name or "bias" in name]
    split = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    groups: list[Any] = split if run.groups == 2 else [{"params": [leaf for _, leaf in named], "weight_decay": DECAY}]
    if run.optimizer == "torch":
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    kinds = package(".ops.adam")
    return (kinds.DeepSpeedCPUAdam if run.optimizer == "cpu" else kinds.FusedAdam)(groups, lr=LR, betas=BETAS, eps=EPS)


def scheduled(optimizer: Any) -> Any:
    """A schedule whose every step has another learning rate."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=8)


def trained(run: Run, place: Path) -> Truth:
    """Two steps, the checkpoint, and a third step, in a loop of one's own."""
    model = policy_of(run, place)
    optimizer = optimizer_of(run, model)
    if run.save == "accelerate":
        engine, save = accelerated(run, model, place)
    else:
        given: dict[str, Any] = {} if optimizer else {"model_parameters": model.parameters()}
        schedule = None if optimizer is None else scheduled(optimizer)
        engine = package().initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=configuration(run), **given
        )[0]
        save = {"plain": plainly, "openrlhf": as_openrlhf, "open_instruct": as_open_instruct}[run.save]
    twin = Twin(run) if run.zero.get("round_robin_gradients") else None
    for number in (0, 1):
        step(engine, number)
        if twin is not None:
            twin.step(number)
    save(engine, place)
    seen = Seen(engine, twin)
    seen.before()
    step(engine, 2, seen.gradients)
    if twin is not None:
        twin.step(2)
    return seen.truth()


def step(engine: Any, number: int, look: Callable[[], None] = lambda: None) -> None:
    """Take one step; in fp16, again and again until the scaled gradient does not overflow."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    skipped = -1
    while skipped != engine.skipped_steps:
        skipped = engine.skipped_steps
        engine.backward(loss_of(engine, rows(number)[rank::ranks]))
        look()
        engine.step()


def plainly(engine: Any, place: Path) -> None:
    """As DeepSpeed's tutorial."""
    engine.save_checkpoint(str(place))


def as_openrlhf(engine: Any, place: Path) -> None:
    """As OpenRLHF's DeepspeedStrategy.save_ckpt of the actor."""
    states = {"consumed_samples": 8, "episode": 0, "global_step": 2, "data_loader_state_dict": {}}
    engine.save_checkpoint(str(place / "_actor"), tag="global_step2", client_state=states, save_latest=True)


def as_open_instruct(engine: Any, place: Path) -> None:
    """As open-instruct's grpo_fast, with the random states that it keeps and its reference policy beside."""
    import numpy

    drawn = {
        "torch_cpu_rng_state": torch.get_rng_state(),
        "numpy_rng_state": numpy.random.get_state(),  # noqa: NPY002
        "python_rng_state": random.getstate(),
    }
    states = {"training_step": 2, "episode": 8, "num_total_tokens": 72, "rng_states": drawn, "ref_policy_saved": True}
    if engine.global_rank == 0:
        (place / "ref_policy").mkdir(parents=True)
        torch.save(tiny().state_dict(), place / "ref_policy" / "pytorch_model.bin")
    engine.save_checkpoint(str(place), client_state={**states, "rank": engine.global_rank})


def accelerated(run: Run, model: Any, place: Path) -> tuple[Any, Callable[[Any, Path], Any]]:
    """As an Accelerator with DeepSpeed: the engine, and its save_state."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DummyOptim

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration(run)))
    engine, _ = accelerator.prepare(model, DummyOptim(model.parameters(), lr=LR))
    return engine, lambda engine, place: accelerator.save_state(str(place))


def trained_by_trainer(run: Run, place: Path) -> Truth:
    """The same by transformers.Trainer, which saves place/checkpoint-2."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from fkernel.demo.tokenizer import build_tokenizer

    args = TrainingArguments(
        output_dir=str(place),
        deepspeed=configuration(run),
        per_device_train_batch_size=2,
        max_steps=3,
        save_steps=2,
        bf16=True,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
    )
    seen: list[Seen] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Look at the state before the third step, and at its gradient within."""
            if state.global_step == 2:
                engine: Any = trainer.model_wrapped
                seen.append(Seen(engine))
                seen[0].before()
                original = engine.step

                def look(*given: Any, **named: Any) -> None:
                    seen[0].gradients()
                    original(*given, **named)

                engine.step = look

    data: Any = [{"input_ids": row, "labels": row} for row in torch.cat([rows(step) for step in range(3)])]
    model: Any = policy_of(run, place)
    trainer = Trainer(
        model=model, args=args, train_dataset=data, callbacks=[Watch()], processing_class=build_tokenizer()
    )
    trainer.train()
    return seen[0].truth()


class Twin:
    """The same training in one process, by torch alone: what a layout without DeepSpeed's own gathering is held to."""

    def __init__(self, run: Run) -> None:
        self.model = tiny(tied=run.tied)
        self.optimizer = optimizer_of(run, self.model)
        self.schedule = scheduled(self.optimizer)

    def step(self, number: int) -> None:
        """Take one step on all ranks' rows."""
        ranks = torch.distributed.get_world_size()
        self.optimizer.zero_grad()
        for rank in range(ranks):
            (loss_of(self.model, rows(number)[rank::ranks]) / ranks).backward()
        self.optimizer.step()
        self.schedule.step()


class Seen:
    """What DeepSpeed's engine, or its twin, knows of the trained parameters, around the third step."""

    def __init__(self, engine: Any, twin: Twin | None = None) -> None:
        self.engine, self.twin = engine, twin
        self.params = {name: leaf for name, leaf in engine.module.named_parameters() if leaf.requires_grad}
        self.twins = {} if twin is None else dict(twin.model.named_parameters())
        self.parts: dict[str, dict[str, Any]] = {}
        self.lr, self.steps = 0.0, 0

    def before(self) -> None:
        """Look at the checkpoint's θ and moments."""
        self.lr, self.steps = self.engine.get_lr()[0], 2
        if hasattr(self.engine.optimizer, "fp16_groups") and not self.engine.zero_optimization():
            self.steps = max(
                int(entry["step"]) for entry in self.engine.optimizer.state.values()
            )  # an empty one before
        if getattr(self.engine.optimizer, "_hp_optimizer_states_linked", False):  # after group 0's first step, for it
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for tree in ("theta", "exp_avg", "exp_avg_sq"):
            self.parts[tree] = {name: self._part(name, tree) for name in self.params}
        if not self.engine.bfloat16_enabled() and not self.engine.fp16_enabled():
            self.parts["rounded"] = {}
            return
        kept = torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float16
        self.parts["rounded"] = {name: self._ran_with(leaf).to(kept) for name, leaf in self.params.items()}

    def gradients(self) -> None:
        """Look at what the optimizer is given."""
        if self.twin is None:
            scale = float(getattr(self.engine.optimizer, "loss_scale", None) or 1.0)
            grads = {name: package(".utils").safe_get_full_grad(leaf) for name, leaf in self.params.items()}
            self.parts["grads"] = {name: leaf.detach().float().clone() / scale for name, leaf in grads.items()}

    def truth(self) -> Truth:
        """Look at θ after the step, and put everything together."""
        self.parts["after"] = {name: self._part(name, "theta") for name in self.params}
        if self.twin is not None:
            self.parts["grads"] = {name: leaf.grad for name, leaf in self.twins.items()}
        versions = {"deepspeed": package().__version__, "torch": torch.__version__}
        return Truth(**self.parts, meta={"step": self.steps, "lr": self.lr, "versions": versions})

    def _ran_with(self, leaf: Any) -> torch.Tensor:
        """The whole of what the policy computes with."""
        with package().zero.GatheredParameters([leaf], enabled=hasattr(leaf, "ds_id")):
            return leaf.detach().clone()

    def _part(self, name: str, tree: str) -> torch.Tensor:
        """θ or a moment of one parameter."""
        leaf = self.params[name]
        if self.twin is not None:
            found = leaf if tree == "theta" else self.twin.optimizer.state[self.twins[name]][tree]
        elif self.engine.zero_optimization():
            whole = package(".utils")
            found = whole.safe_get_full_fp32_param(leaf) if tree == "theta" else None
            found = whole.safe_get_full_optimizer_state(leaf, tree) if found is None else found
        else:
            found = self._without_zero(leaf, tree)
        return found.detach().clone()

    def _without_zero(self, leaf: Any, tree: str) -> Any:
        """The same without ZeRO: in the optimizer itself, or beside its float32 copy of the parameter."""
        outer = self.engine.optimizer
        if not hasattr(outer, "fp16_groups"):
            return leaf if tree == "theta" else outer.state[leaf][tree]
        for number, group in enumerate(outer.fp16_groups):
            for place, own in enumerate(group):
                if own is not leaf:
                    continue
                if hasattr(outer, "fp32_groups"):
                    master = outer.fp32_groups[number][place]
                    return master if tree == "theta" else outer.optimizer.state[master][tree]
                flat = outer.fp32_groups_flat[number]
                flat = flat if tree == "theta" else outer.optimizer.state[flat][tree]
                start = sum(other.numel() for other in group[:place])
                return flat[start : start + leaf.numel()].view_as(leaf)
        raise LookupError("The parameter is of no group.")
