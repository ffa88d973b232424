"""The executed gradient: the training's own pass, in its own precision, micro-batches and padding."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

import fkernel as fk
from fkernel import func, precond
from fkernel.analysis import audit
from fkernel.checkpoint import adamw_state
from fkernel.engine import Microbatch, gradient_in
from tests.checkpoint.writers import TOKENIZER

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10], [2, 2]]
RESPONSES = [[3, 4, 1], [5, 1], [6, 7, 8, 9, 10, 1], [11, 12, 13, 14]]
U = func.pad(PROMPTS, RESPONSES)


def qwen3(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=15,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 15, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, bos_token_id=0, eos_token_id=1)).eval()


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(qwen3(), adapter).eval()


def constants(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ω and η of a loss, 0 outside of the response."""
    torch.manual_seed(seed)
    ω, η = torch.randn(U.input_ids.shape), 0.1 * torch.randn(U.input_ids.shape)
    return torch.where(U.response_mask, ω, 0.0), torch.where(U.response_mask, η, 0.0)


def relative(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    off = sum(float((given[name].double() - leaf.double()).square().sum()) for name, leaf in expected.items())
    return (off / sum(float(leaf.double().square().sum()) for leaf in expected.values())) ** 0.5


@pytest.mark.parametrize("head", ["trl", "linear"])
@pytest.mark.parametrize("microbatches", [None, 1, 3, [[2, 0], [3, 1]]])
@pytest.mark.parametrize(
    "make", [gpt2, qwen3, lambda: qwen3(tied=False), lora], ids=["gpt2", "qwen3", "untied", "lora"]
)
def test_without_autocast_it_is_the_pullback(make, microbatches, head):
    apply, params = func.make_functional(make())
    f, (ω, η) = func.weighted_logprob(apply, temperature=0.7), constants()
    batch, w = func.Weighted(U, ω, η), torch.tensor([1.0, -0.5, 2.0, 0.3])
    expected = func.vjp(f)(params, batch, w)
    given = gradient_in(f, params, batch, w, microbatches=microbatches, head=head)
    assert [*given] == [*params]
    assert relative(given, expected) < 2e-6
    S = func.sequence_logprob(apply)
    assert relative(gradient_in(S, params, U, w, microbatches=microbatches), func.vjp(S)(params, U, w)) < 1e-6


def test_padding_on_the_left_changes_nothing_where_positions_are_relative():
    apply, params = func.make_functional(qwen3())
    f, w = func.sequence_logprob(apply), torch.ones(4)
    laid = [Microbatch([0, 1], prompt_width=5), Microbatch([3, 2], prompt_width=4, width=14)]
    assert relative(gradient_in(f, params, U, w, microbatches=laid), func.vjp(f)(params, U, w)) < 1e-6


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Any:
    """TRL's own trainer, as it is by default: under bfloat16 autocast."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        temperature=0.7,
        bf16=True,
        use_cpu=True,
        report_to=[],
    )
    return GRPOTrainer(
        model=qwen3(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
        processing_class=TOKENIZER,
    )


def as_trl_pads(prompt_width: int, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts padded on their left, responses on their right; where each token of U has gone."""
    n, width = len(PROMPTS), prompt_width + longest
    ids, mask, source = (torch.zeros(n, width, dtype=torch.int64) for _ in range(3))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        place = slice(prompt_width - len(prompt), prompt_width + len(response))
        ids[row, place], mask[row, place] = torch.tensor(prompt + response), 1
        source[row, place] = torch.arange(len(prompt) + len(response))
    return ids, mask, source


def theirs(trainer: Any, model: Any, passes: list[list[int]], ω: torch.Tensor, η: torch.Tensor) -> dict[str, Any]:
    """The gradient that TRL's own log-probabilities and entropies give, pass by pass, as .grad adds it up."""
    ids, mask, source = as_trl_pads(prompt_width=5, longest=7)
    model.zero_grad()
    for rows in passes:
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model, ids[rows], mask[rows], 7, compute_entropy=True
        )
        place = source[rows][:, -7:]
        weigh = [torch.where(mask[rows][:, -7:].bool(), x[rows].gather(1, place), 0.0) for x in (ω, η)]
        ((weigh[0] * logps).sum() + (weigh[1] * entropies).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [[[0, 1, 2, 3]], [[2, 0], [3, 1]]], ids=["one pass", "two passes"])
def test_it_is_what_trl_computes_under_autocast(trainer, passes, dtype):
    from trl.trainer.utils import add_fused_lm_head

    model = qwen3().to(dtype)
    trained = copy.deepcopy(model).train()
    add_fused_lm_head(trained, temperature=0.7, outputs=("log_probs", "entropy"))
    ω, η = constants()
    expected = theirs(trainer, trained, passes, ω, η)
    apply, params = func.make_functional(model)
    f = func.weighted_logprob(apply, temperature=0.7)
    laid = [Microbatch(rows, prompt_width=5, width=12) for rows in passes]
    batch, ones = func.Weighted(U, ω, η), torch.ones(4)
    given = gradient_in(f, params, batch, ones, autocast="bfloat16", microbatches=laid)
    assert all(given[name].dtype == dtype for name in params)
    assert relative(given, expected) < 1e-6
    exact = func.vjp(func.weighted_logprob(apply, 0.7))({k: v.float() for k, v in params.items()}, batch, ones)
    assert relative(exact, expected) > 1e-3  # what there is to be told apart
    linear = gradient_in(f, params, batch, ones, autocast="bfloat16", microbatches=laid, head="linear")
    if dtype is torch.float32:  # bfloat16 weights round either sum to the same
        assert 1e-5 < relative(linear, expected) < relative(exact, expected)


@pytest.mark.parametrize("make", [gpt2, qwen3])
def test_a_plain_linear_head_is_plain_backward(make):
    """Bit for bit: autograd's own pass under autocast, whose logits are float32 from there on."""
    model = make()
    ω, _ = constants()
    apply, params = func.make_functional(model)
    given = gradient_in(
        func.weighted_logprob(apply), params, func.Weighted(U, ω), torch.ones(4), autocast="bfloat16", head="linear"
    )
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        z = model(input_ids=U.input_ids, attention_mask=U.attention_mask.long(), use_cache=False).logits
    z = z[:, :-1].float()
    log_p = z.gather(-1, U.input_ids[:, 1:, None]).squeeze(-1) - z.logsumexp(-1)
    (ω[:, 1:] * log_p).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(given[name], parameter.grad), name


def test_the_attention_is_the_one_that_was_trained_with():
    """A checkpoint is loaded with eager attention; the training's own rounds otherwise."""
    trained, loaded = qwen3(), qwen3()
    loaded.set_attn_implementation("eager")
    assert trained.config._attn_implementation == "sdpa"
    (own, params), (eager, _) = func.make_functional(trained), func.make_functional(loaded)
    expected = gradient_in(func.sequence_logprob(own), params, U, torch.ones(4), autocast="bfloat16")
    f, ones = func.sequence_logprob(eager), torch.ones(4)
    again = gradient_in(f, params, U, ones, autocast="bfloat16", attention="sdpa")
    assert relative(again, expected) == 0
    assert relative(gradient_in(f, params, U, ones, autocast="bfloat16"), expected) > 1e-4
    assert loaded.config._attn_implementation == "eager"


def test_neither_the_model_nor_its_gradients_are_touched():
    model = gpt2()
    apply, params = func.make_functional(model)
    before = {name: leaf.clone() for name, leaf in params.items()}
    gradient_in(func.sequence_logprob(apply), params, U, torch.ones(4), autocast="bfloat16")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(params[name], leaf) and not params[name].requires_grad for name, leaf in before.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"autocast": "float16"}, fk.ModelError, "autocast is 'float16'.*scales its loss, which is not modelled"),
        ({"head": "fused"}, fk.ModelError, r"head 'fused'; .*one of \('trl', 'linear'\)"),
        ({"microbatches": 0}, fk.BatchError, "microbatches is 0; expected 1 or more"),
        ({"microbatches": [[0, 1], [1, 2, 3]]}, fk.BatchError, r"hold the rows \[0, 1, 1, 2, 3\] of a batch of 4"),
        ({"microbatches": [[0, 1, 2]]}, fk.BatchError, "expected each of 0 … 3 in one of them"),
        ({"microbatches": [Microbatch(range(4), prompt_width=3)]}, fk.BatchError, "longest prompt has 4 tokens"),
        ({"microbatches": [Microbatch(range(4), width=9)]}, fk.BatchError, "10 tokens are needed in all"),
    ],
)
def test_what_cannot_be_computed_is_said(options, error, message):
    apply, params = func.make_functional(gpt2())
    with pytest.raises(error, match=message):
        gradient_in(func.sequence_logprob(apply), params, U, torch.ones(4), **options)


def test_a_function_that_is_no_sum_of_tokens_is_refused():
    with pytest.raises(fk.ModelError, match=r"needs func\.sequence_logprob or func\.weighted_logprob"):
        gradient_in(lambda params, x: x @ params["w"], {"w": torch.ones(2)}, torch.eye(2), torch.ones(2))


# ------------------------------------------------------------------------------------------------ TRL's own steps


class Step(NamedTuple):
    """What one step of TRL's was given, and what it did."""

    microbatches: list[dict[str, torch.Tensor]]
    gradient: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]
    state: Any

    def batch(self) -> tuple[func.Weighted, list[Microbatch]]:
        """Its sequences with the ω that autograd handed back, and how its micro-batches were padded."""
        prompts, responses, ω, passes = [], [], [], []
        for one in self.microbatches:
            widths = [one[f"{part}_ids"].shape[1] for part in ("prompt", "completion")]
            passes.append(Microbatch(range(len(prompts), len(prompts) + len(one["ω"])), widths[0], sum(widths)))
            for part, into in (("prompt", prompts), ("completion", responses)):
                rows = zip(one[f"{part}_ids"], one[f"{part}_mask"].bool(), strict=True)
                into += [ids[mask].tolist() for ids, mask in rows]
            ω += [*one["ω"]]
        sequences = func.pad(prompts, responses)
        weights = torch.zeros(sequences.input_ids.shape)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            weights[row, len(prompt) : len(prompt) + len(response)] = ω[row][: len(response)]
        return func.Weighted(sequences, weights), passes


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[Step]:
    """Three steps of TRL's GRPO by its defaults: autocast, checkpointing, accumulation, a second inner epoch, CISPO."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    seen: dict[int, list[dict[str, torch.Tensor]]] = {}
    taken: list[Step] = []

    class Watched(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            kept = {name: leaf.clone() for name, leaf in inputs.items() if isinstance(leaf, torch.Tensor)}
            seen.setdefault(self.state.global_step, []).append(kept)
            return super().compute_loss(model, inputs, *rest, **others)

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            out = super()._get_per_token_logps_and_entropies(*args, **options)
            if out[0].requires_grad:
                now = seen[self.state.global_step][-1]
                out[0].register_hook(lambda g: now.update(ω=g.clone()))
            return out

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model, optimizer = given["model"], given["optimizer"]
            named = [(name, leaf) for name, leaf in model.named_parameters()]
            gradient = {name: leaf.grad.clone() for name, leaf in named}
            params = {name: leaf.detach().clone() for name, leaf in named}
            optimizer = getattr(optimizer, "optimizer", optimizer)
            taken.append(Step(seen[state.global_step], gradient, params, copy.deepcopy(optimizer.state_dict())))

    trainer = Watched(
        model=qwen3(),
        reward_funcs=lambda completions, **_: [float(sum(map(text.count, "13579"))) for text in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("run")),
            loss_type="cispo",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=4,
            num_iterations=2,
            max_completion_length=6,
            generation_kwargs={"suppress_tokens": [TOKENIZER.pad_token_id]},
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=1e9,
            max_steps=4,
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 20) for b in range(2, 30, 3)]),
        processing_class=TOKENIZER,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    trainer.train()
    return taken


def test_trls_own_gradient_is_met(steps):
    """From ω, micro-batches and padding alone, whatever the loss was; the exact gradient is a per cent or more away."""
    apply, _ = func.make_functional(qwen3())
    f, ones = func.weighted_logprob(apply), torch.ones(16)
    for step in steps:
        batch, passes = step.batch()
        given = gradient_in(f, step.params, batch, ones, autocast="bfloat16", microbatches=passes)
        assert relative(given, step.gradient) < 1e-6
        right_padded = gradient_in(f, step.params, batch, ones, autocast="bfloat16", microbatches=8)
        exact = func.vjp(f)(step.params, batch, ones)
        assert 5e-3 < relative(right_padded, step.gradient) < 0.1
        assert 5e-3 < relative(exact, step.gradient) < 0.1


def test_the_audit_of_trls_own_step(steps):
    """Described by the executed gradient it is met to the rounding of float32; by another step's batch it is not."""
    apply, _ = func.make_functional(qwen3())
    f, ones = func.weighted_logprob(apply), torch.ones(16)
    for step, later in itertools.pairwise(steps[1:]):
        executed = {name: later.params[name].double() - leaf.double() for name, leaf in step.params.items()}
        state = adamw_state(step.state, dict(step.params), model=qwen3())

        def told(of: Step, params: dict[str, torch.Tensor] = step.params, state: Any = state) -> precond.AdamWStep:
            batch, passes = of.batch()
            g = gradient_in(f, params, batch, ones, autocast="bfloat16", microbatches=passes)
            return precond.adamw_step(params, dict(g), state)

        right = audit(told(step), executed, params=step.params)
        assert right.fine, right.verdict
        assert right.overall.left < max(1e-4, 2 * right.overall.rounding)
        wrong = audit(told(steps[0] if step is not steps[1] else steps[3]), executed, params=step.params)
        assert [each.kind for each in wrong.findings] == ["left"]
        assert "another batch, or other weights" in wrong.verdict
