"""TRL's own trainers, recorded: the trainer's gradient is met, and a batch read back is what compute_loss received."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Qwen2ForCausalLM

from fkernel.checkpoint import load
from fkernel.errors import ModelError
from fkernel.record import Recorder, Recording
from tests.checkpoint.writers import TOKENIZER
from tests.study.trl_run import LONGEST, SEEN, policy

STEPS = 3


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(text.count, "13579"))) for text in completions]


def brevity(completions: list[str], **_: Any) -> list[float | None]:
    return [None if "0" in text else -0.1 * len(text) for text in completions]


def trainer(place: Path, lora: bool, rloo: bool = False, **options: Any) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    policy().save_pretrained(place / "base")
    TOKENIZER.save_pretrained(place / "base")
    more: dict[str, Any] = {}
    if lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "output_dir": str(place / "run"),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": LONGEST,
        "max_steps": STEPS,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.3,
        "weight_decay": 0.1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    kind: Any = RLOOTrainer if rloo else GRPOTrainer
    made = kind(
        model=Qwen2ForCausalLM.from_pretrained(place / "base"),
        reward_funcs=[digits, brevity],
        args=(RLOOConfig if rloo else GRPOConfig)(**{**settings, **options}),
        train_dataset=Dataset.from_list([{"prompt": prompt, "answer": "88"} for prompt in SEEN]),
        processing_class=TOKENIZER,
        **more,
    )
    made.remove_callback(PrinterCallback)
    return made


class Run:
    """A recorded run, and what its compute_loss was given."""

    def __init__(self, place: Path, lora: bool, **options: Any) -> None:
        self.place, self.trainer = place, trainer(place, lora, **options)
        self.given: dict[int, list[dict[str, torch.Tensor]]] = {}
        inner = self.trainer.compute_loss

        def watched(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            kept = {name: leaf.clone() for name, leaf in inputs.items() if isinstance(leaf, torch.Tensor)}
            self.given.setdefault(self.trainer.state.global_step, []).append(kept)
            return inner(model, inputs, *rest, **others)

        self.trainer.compute_loss = watched
        Recorder(place / "recording", snapshots="every").attach(self.trainer)
        self.trainer.train()
        self.recording = Recording.open(place / "recording")
        self.log = [row for row in self.trainer.state.log_history if "grad_norm" in row]


CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": True},
    "cispo, KL, two inner epochs, autocast": {
        "lora": False,
        "loss_type": "cispo",
        "beta": 0.05,
        "num_iterations": 2,
        "bf16": True,
        "gradient_checkpointing": True,
    },
    "entropy bonus": {"lora": False, "loss_type": "grpo", "entropy_coef": 0.01, "temperature": 0.7},
    "rloo": {"lora": False, "rloo": True},
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), **CASES[request.param])


def test_the_trainers_gradient_is_met(run):
    assert run.recording.steps == (0, 1, 2)
    for number in run.recording.steps:
        step = run.recording.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        assert step.grad_norm == pytest.approx(run.log[number]["grad_norm"], rel=1e-5)
        assert step.clip == pytest.approx(min(1.0, 0.3 / (step.grad_norm + 1e-6)), rel=1e-5)
        assert step.lr[0][0] == pytest.approx(run.log[number]["learning_rate"], rel=1e-6)
        assert step.loss is not None


def test_the_batch_is_what_compute_loss_received(run):
    for number in run.recording.steps:
        step = run.recording.step(number)
        for recorded, given in zip(step.microbatches, run.given[number], strict=True):
            assert torch.equal(recorded.input_ids, torch.cat([given["prompt_ids"], given["completion_ids"]], 1))
            assert torch.equal(
                recorded.response_mask[:, -given["completion_mask"].shape[1] :].long(), given["completion_mask"]
            )
            assert recorded.prompt_width == given["prompt_ids"].shape[1]
        advantages = torch.cat([given["advantages"] for given in run.given[number]])
        assert torch.allclose(step.batch.advantages, advantages)
        for record, group in zip(step.batch, step.batch.groups.tolist(), strict=True):
            assert record.sequence_id.startswith(f"U-{group:03d}")
            assert record.prompt in SEEN
            assert record.rewards["digits"] == digits([record.response])[0]
            assert (record.rewards["brevity"] is None) == ("0" in record.response)
            assert record.metadata["data"] == {"answer": "88"}
            assert len(record.token_weights["loss"]) == len(record.response_ids)
        groups = {record.provenance.group: record.prompt for record in step.batch}
        assert len(groups) == 4


def test_snapshots_are_the_trainers_checkpoints(run):
    assert run.recording.snapshots == (0, 1, 2, 3)
    lora = "peft" in type(run.trainer.model).__module__
    for number in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of autocast
            place: Any = {"base": run.place / "base"} if lora else {}
            loaded = load(run.place / "run" / f"checkpoint-{number}", **place)
        params = {name: leaf for name, leaf in loaded.model.named_parameters() if leaf.requires_grad}
        snapshot, kept = run.recording.snapshot(number), loaded.optimizer
        state: Any = snapshot.optimizer
        assert {*snapshot.params} == {*params}
        assert all(torch.equal(snapshot.params[name], leaf) for name, leaf in params.items())
        assert kept is not None
        for moment in ("exp_avg", "exp_avg_sq"):
            assert all(torch.equal(getattr(state, moment)[name], leaf) for name, leaf in getattr(kept, moment).items())


def test_a_run_that_is_resumed_is_compared(tmp_path):
    first = Run(tmp_path, lora=True)
    place = tmp_path / "recording" / "steps" / "000002" / "step.json"
    before = place.stat().st_mtime_ns
    again = trainer(tmp_path, lora=True)
    Recorder(tmp_path / "recording", snapshots="every").attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert place.stat().st_mtime_ns == before
    assert first.recording.steps == (0, 1, 2)
    assert not (tmp_path / "recording" / "replaced").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"use_liger_loss": True}, "a liger loss"),
        ({"packing": True}, "packed batches"),
        ({"padding_free": True}, "without padding"),
        ({"aux_loss_enabled": True}, "auxiliary loss of the routers"),
        ({"is_fsdp_enabled": True}, "FSDP"),
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"args": SimpleNamespace(n_gpu=2)}, "launch one process a device"),
        (
            {"accelerator": SimpleNamespace(parallelism_config=SimpleNamespace(tp_size=2))},
            "tensor, context or sequence",
        ),
    ],
)
def test_what_hides_its_log_probabilities_is_refused(tmp_path, option, said):
    def nothing(*_: Any) -> None:
        raise AssertionError

    methods = {"_get_per_token_logps_and_entropies": nothing, "compute_loss": nothing, "add_callback": nothing}
    with Recorder(tmp_path) as recorder, pytest.raises(ModelError, match=said):
        recorder.attach(SimpleNamespace(**methods, **option))


def test_another_trainer_is_refused(tmp_path):
    with (
        Recorder(tmp_path) as recorder,
        pytest.raises(ModelError, match=r"no trainer that can be attached.*SFTTrainer.*recorder\.tap"),
    ):
        recorder.attach(SimpleNamespace(compute_loss=None))
