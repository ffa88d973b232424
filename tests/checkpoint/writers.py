"""Short trainings by the real writers: what they saved, and the step that they took next.

Every writer trains for two steps, saves, and takes a third, whose gradient and effect are kept. So a loaded state is
tested against what its own optimizer did with it, and not against our reading of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from fkernel.demo.tokenizer import build_tokenizer
from fkernel.shapes import Tree

VOCABULARY = 15
TOKENIZER = build_tokenizer()


class Ran(NamedTuple):
    """One training.

    Attributes:
        path: the checkpoint after two steps.
        before: trained parameters at the checkpoint.
        grads: what the optimizer was given for the third step, clipped.
        after: trained parameters after it.
        model: the model, for layouts without an architecture.
    """

    path: Path
    before: Tree
    grads: Tree
    after: Tree
    model: Any


def qwen2(seed: int = 0) -> Any:
    """RMSNorm, biases on q, k and v, a tied head."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def gpt2(seed: int = 0) -> Any:
    """LayerNorm, biases everywhere, Conv1D, a tied head."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
        )
    )


def trained(model: Any) -> Tree:
    """Copy the trained parameters."""
    return {name: leaf.detach().clone() for name, leaf in model.named_parameters() if leaf.requires_grad}


class Watch(TrainerCallback):
    """Keeps what the third step was given and found."""

    before: Tree
    grads: Tree

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look after clipping, before the step."""
        if state.global_step == 2:
            self.before = trained(given["model"])
            self.grads = {n: p.grad.detach().clone() for n, p in given["model"].named_parameters() if p.requires_grad}


USUAL: dict[str, Any] = {
    "max_steps": 3,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "seed": 0,
}


def trainer(directory: Path, make: Callable[[], Any] = qwen2, **settings: Any) -> Ran:
    """Hugging Face's Trainer, its linear schedule and its two groups."""
    from transformers import Trainer, TrainingArguments

    watch, model = Watch(), make()
    rows = torch.randint(2, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(1))
    data: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    args = TrainingArguments(output_dir=str(directory), per_device_train_batch_size=4, **USUAL, **settings)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[watch], processing_class=TOKENIZER).train()
    return Ran(directory / "checkpoint-2", watch.before, watch.grads, trained(model), model)


def grpo(directory: Path, lora: bool = False) -> Ran:
    """TRL's GRPOTrainer; with LoRA the base model is saved first, where the adapter records it."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    watch, model = Watch(), qwen2()
    options: dict[str, Any] = {}
    if lora:
        from peft import LoraConfig

        model.save_pretrained(directory / "base")
        TOKENIZER.save_pretrained(directory / "base")
        model = type(model).from_pretrained(directory / "base")
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    prompts = [{"prompt": f"{a}+{b}="} for a in range(10, 14) for b in range(20, 23)]
    args = GRPOConfig(
        output_dir=str(directory / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        bf16=False,
        gradient_checkpointing=False,
        **USUAL,
    )
    run = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(sum(map(text.count, "13579"))) for text in completions],
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=TOKENIZER,
        callbacks=[watch],
        **options,
    )
    run.train()
    return Ran(directory / "run" / "checkpoint-2", watch.before, watch.grads, trained(run.model), run.model)


class Loop:
    """A training loop of one's own."""

    def __init__(self, optimizer_of: Callable[[Any], torch.optim.Optimizer], model: Any = None) -> None:
        self.model = qwen2() if model is None else model
        self.optimizer = optimizer_of(self.model)
        self.rows = torch.randint(2, VOCABULARY, (3, 4, 9), generator=torch.Generator().manual_seed(1))

    def step(self, number: int) -> Tree:
        """Take one step; the gradient that it was given returns."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.rows[number], labels=self.rows[number]).loss.backward()
        grads = {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        return grads

    def run(self, path: Path, save: Callable[[Loop], None]) -> Ran:
        """Take two steps, save, and take the third."""
        self.step(0)
        self.step(1)
        save(self)
        before = trained(self.model)
        grads = self.step(2)
        return Ran(path, before, grads, trained(self.model), self.model)


def nameless(model: Any) -> torch.optim.Optimizer:
    """AdamW over bare parameters, one group."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def named(model: Any) -> torch.optim.Optimizer:
    """AdamW over named parameters: it records them."""
    return torch.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1)


def plain(directory: Path) -> Ran:
    """One file of torch.save, as DDP and torch.compile name the parameters."""
    path = directory / "last.pt"

    def save(loop: Loop) -> None:
        weights = {f"module._orig_mod.{name}": leaf for name, leaf in loop.model.state_dict().items()}
        torch.save({"model": weights, "optimizer": loop.optimizer.state_dict()}, path)

    return Loop(nameless).run(path, save)


def nested(directory: Path) -> Ran:
    """The study's layout: an order of the optimizer's own, which a file beside it tells."""
    import json

    def shuffled(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([leaf for _, leaf in reversed([*model.named_parameters()])], lr=1e-3, weight_decay=0.1)

    def save(loop: Loop) -> None:
        loop.model.save_pretrained(directory / "model")
        TOKENIZER.save_pretrained(directory / "model")
        torch.save(loop.optimizer.state_dict(), directory / "optimizer.pt")
        names = [name for name, _ in reversed([*loop.model.named_parameters()])]
        (directory / "optimizer_param_names.json").write_text(json.dumps(names))

    return Loop(shuffled).run(directory, save)


def sharded(directory: Path) -> Ran:
    """save_pretrained in several files."""

    def save(loop: Loop) -> None:
        loop.model.save_pretrained(directory, max_shard_size="10KB")
        torch.save(loop.optimizer.state_dict(), directory / "optimizer.pt")

    return Loop(named, gpt2()).run(directory, save)


def accelerate(directory: Path) -> Ran:
    """Accelerator.save_state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def save(loop: Loop) -> None:
        accelerator.save_state(str(directory))

    def prepared(model: Any) -> torch.optim.Optimizer:
        return accelerator.prepare(model, nameless(model))[1]

    return Loop(prepared).run(directory, save)


def distributed(directory: Path) -> Ran:
    """torch.distributed.checkpoint, with names instead of numbers."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    def save(loop: Loop) -> None:
        weights, optimizer = get_state_dict(loop.model, loop.optimizer)
        save_distributed({"model": weights, "optimizer": optimizer}, checkpoint_id=directory, no_dist=True)

    return Loop(nameless).run(directory, save)


def within_app(directory: Path) -> Ran:
    """torch.distributed.checkpoint as PyTorch's tutorial writes it: both under one key."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    def save(loop: Loop) -> None:
        weights, optimizer = get_state_dict(loop.model, loop.optimizer)
        app = {"app": {"model": weights, "optimizers": optimizer}}
        save_distributed(app, checkpoint_id=directory, no_dist=True)

    return Loop(nameless).run(directory, save)


def flattened(directory: Path, key: str | None = "optimizer") -> Ran:
    """torch.distributed.checkpoint of a flattened optimizer; without a key, weights and state are at the top."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    def save(loop: Loop) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, optimizer = get_state_dict(loop.model, loop.optimizer, options=options)
        both: dict[str, Any] = {"model": weights, key: optimizer} if key else {**weights, **optimizer}
        save_distributed(both, checkpoint_id=directory, no_dist=True)

    return Loop(nameless).run(directory, save)


def listed(directory: Path) -> Ran:
    """One file with the optimizer in a list, as Lightning writes it."""
    path = directory / "last.ckpt"

    def save(loop: Loop) -> None:
        told = {"state_dict": loop.model.state_dict(), "optimizer_states": [loop.optimizer.state_dict()]}
        torch.save({**told, "epoch": 1, "global_step": 2}, path)

    return Loop(nameless).run(path, save)


def named_adapter(directory: Path, where: str = "") -> Ran:
    """PEFT's adapter with a name: saved in a folder of that name, the optimizer's state above it."""
    from peft import LoraConfig
    from peft.mapping_func import get_peft_model

    qwen2().save_pretrained(directory / "base")
    base = type(qwen2()).from_pretrained(directory / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name="mine").eval()

    def save(loop: Loop) -> None:
        loop.model.save_pretrained(directory / "run")
        torch.save(loop.optimizer.state_dict(), directory / "run" / "optimizer.pt")

    def adamw(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([leaf for leaf in model.parameters() if leaf.requires_grad], lr=1e-3, weight_decay=0.1)

    return Loop(adamw, model).run(directory / "run" / where, save)


WRITERS: dict[str, Callable[[Path], Ran]] = {
    "trainer": trainer,
    "trainer, gpt2": lambda directory: trainer(directory, gpt2),
    "grpo": grpo,
    "grpo, lora": lambda directory: grpo(directory, lora=True),
    "file": plain,
    "nested": nested,
    "sharded": sharded,
    "accelerate": accelerate,
    "distributed": distributed,
    "distributed, app": within_app,
    "distributed, flattened": flattened,
    "distributed, flat at the top": lambda directory: flattened(directory, key=None),
    "file, list": listed,
    "named adapter": named_adapter,
    "named adapter, its folder": lambda directory: named_adapter(directory, where="mine"),
}
