"""The engine on real architectures: tiny random Hugging Face models, given in train mode and with fused attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fkernel as fk
from fkernel import func, precond

VOCABULARY = 23
TEMPERATURE = 0.8

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "attention_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE))


def _qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True))


def _qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE, head_dim=8))


def _gemma2() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=6))


def _opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2))


def _lora() -> nn.Module:
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(cast(Any, _qwen2()), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@dataclass(frozen=True)
class Case:
    """An architecture and what it is held to.

    Attributes:
        build: makes the model, with random weights.
        dtype: its precision.
        gradient: largest relative error against plain autograd.
        reshaped: the same where the batch has another shape; Gemma2's norms multiply in float32, whose last bit moves.
        tied: whether the head shares the embedding's table, whose one name is then `table`.
    """

    build: Callable[[], nn.Module]
    dtype: torch.dtype = torch.float64
    gradient: float = 1e-10
    reshaped: float = 1e-10
    tied: bool = False
    table: str = "model.embed_tokens.weight"
    padding: int = 0
    attention: str = "sdpa"


CASES = {
    "GPT-2": Case(_gpt2, tied=True, table="transformer.wte.weight"),
    "Llama": Case(_llama),
    "Qwen2, tied": Case(_qwen2, tied=True),
    "Qwen3": Case(_qwen3),
    "Gemma2": Case(_gemma2, tied=True, attention="eager", reshaped=1e-8),
    "OPT": Case(_opt, tied=True, table="model.decoder.embed_tokens.weight", padding=1),
    "LoRA on Qwen2": Case(_lora),
    "Mixtral": Case(_mixtral, dtype=torch.float32, gradient=1e-5, reshaped=1e-5),
}
SECOND_ORDER = 1e-6  # the models themselves compute their norms and softmax in float32


@dataclass(frozen=True)
class Given:
    """A model in train mode, made functional, and the Jacobian of plain autograd."""

    case: Case
    model: nn.Module
    apply: func.Apply
    params: dict[str, torch.Tensor]
    J: dict[str, torch.Tensor]

    @property
    def logprob(self) -> func.Objective:
        return func.sequence_logprob(self.apply, TEMPERATURE)

    def random(self, seed: int = 1) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(seed)
        return {name: torch.randn(p.shape, dtype=p.dtype, generator=source) for name, p in self.params.items()}


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
RESPONSES = [[15, 16, 17, 18], [5, 19], [3], [20, 21, 22, 3, 4]]


def sequences(case: Case, wider: int = 0) -> func.Sequences:
    """Four ragged sequences whose ids are no padding ids; `wider` columns of padding more than they need."""
    batch = func.pad(PROMPTS, RESPONSES, pad_id=case.padding)
    fill = (case.padding, False, False)
    columns = (nn.functional.pad(leaf, (0, wider), value=value) for leaf, value in zip(batch, fill, strict=True))
    return func.Sequences(*columns)


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build().to(dtype=case.dtype)
    for name, parameter in model.named_parameters():
        if "lora" not in name and parameter.ndim > 1:
            parameter.data.mul_(4.0)  # away from the near-linear start, where every gradient looks alike
    return model.train()


def eager_copy(model: nn.Module) -> nn.Module:
    """A model of its own for the oracle: eager attention, eager experts, eval mode."""
    oracle = copy.deepcopy(model).eval()
    for part in oracle.modules():
        if getattr(getattr(part, "config", None), "_attn_implementation", None) not in (None, "eager"):
            cast(Any, part).set_attn_implementation("eager")
        if hasattr(part, "set_experts_implementation"):
            cast(Any, part).set_experts_implementation("eager")
    return oracle


def plain_logprob(model: nn.Module, row: int) -> torch.Tensor:
    """S of one trimmed sequence, from the definition."""
    ids = torch.tensor([PROMPTS[row] + RESPONSES[row]])
    log_p = (model(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
    start = len(PROMPTS[row])
    return log_p[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()


def plain_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for row in range(len(PROMPTS)):
        grads = torch.autograd.grad(plain_logprob(model, row), list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), grads, strict=True)])
    return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module", params=CASES)
def given(request: pytest.FixtureRequest) -> Given:
    case = CASES[request.param]
    model = build(case)
    J = plain_gradients(eager_copy(model))
    apply, params = func.make_functional(model)
    return Given(case, model, apply, params, J)


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖x − y‖ / ‖y‖."""
    return float((x - y).double().norm() / y.double().norm())


def flat(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in rows.values()], 1)


def tolerance(given: Given) -> float:
    return max(given.case.gradient, SECOND_ORDER)


# ---------------------------------------------------------------------------------------------- the caller's model


@pytest.mark.parametrize("name", CASES)
def test_the_caller_s_model_is_left_untouched(name):
    model = build(CASES[name])
    first = next(name for name, p in model.named_parameters() if p.requires_grad)
    dict(model.named_parameters())[first].requires_grad_(False)

    def photograph() -> dict[str, Any]:
        configs = {where: getattr(part, "config", None) for where, part in model.named_modules()}
        return {
            "training": {where: part.training for where, part in model.named_modules()},
            "attention": {where: getattr(config, "_attn_implementation", None) for where, config in configs.items()},
            "experts": {where: getattr(config, "_experts_implementation", None) for where, config in configs.items()},
            "padding": {where: getattr(part, "padding_idx", None) for where, part in model.named_modules()},
            "identity": {where: id(p) for where, p in model.named_parameters(remove_duplicate=False)},
            "requires_grad": {where: p.requires_grad for where, p in model.named_parameters()},
            "gradients": {where: p.grad is None for where, p in model.named_parameters()},
        }

    before, values = photograph(), {where: p.detach().clone() for where, p in model.named_parameters()}
    assert all(before["training"].values())
    assert CASES[name].attention in before["attention"].values()
    apply, params = func.make_functional(model)
    func.per_sequence_grad(func.sequence_logprob(apply))(params, sequences(CASES[name]))
    assert photograph() == before
    assert all(torch.equal(p, values[where]) for where, p in model.named_parameters())
    assert first not in params
    assert not any(leaf.requires_grad for leaf in params.values())


def test_only_the_parameters_that_learn_are_differentiated(given):
    learning = [name for name, p in given.model.named_parameters() if p.requires_grad]
    assert list(given.params) == learning
    if isinstance(given.model, PeftModel):
        assert learning
        assert all("lora_" in name for name in learning)
        assert all(float(leaf.abs().max()) > 0 for leaf in given.J.values())


def test_parameters_share_the_model_s_storage(given):
    named = dict(given.model.named_parameters())
    assert all(leaf.data_ptr() == named[name].data_ptr() for name, leaf in given.params.items())


def test_activation_checkpointing_is_put_right_in_the_copy_alone():
    case = CASES["GPT-2"]
    model = cast(GPT2LMHeadModel, build(case))
    J = plain_gradients(eager_copy(model))
    model.gradient_checkpointing_enable()
    apply, params = func.make_functional(model)
    rows = func.per_sequence_grad(func.sequence_logprob(apply, TEMPERATURE))(params, sequences(case))
    assert error(flat(rows), flat(J)) <= case.gradient
    assert model.is_gradient_checkpointing


# ------------------------------------------------------------------------------------------------------ derivatives


def test_the_log_probability_is_that_of_the_trimmed_sequence(given):
    oracle = eager_copy(given.model)
    with torch.no_grad():
        expected = torch.stack([plain_logprob(oracle, row) for row in range(len(PROMPTS))])
    assert error(given.logprob(given.params, sequences(given.case)), expected) <= given.case.gradient


@pytest.mark.parametrize("microbatch", [None, 3])
def test_gradients_equal_a_loop_of_plain_autograd_over_trimmed_sequences(given, microbatch):
    rows = func.per_sequence_grad(given.logprob, microbatch)(given.params, sequences(given.case))
    assert list(rows) == list(given.J)
    assert error(flat(rows), flat(given.J)) <= given.case.gradient
    for row in range(len(PROMPTS)):
        assert error(flat(rows)[row], flat(given.J)[row]) <= given.case.gradient


def test_every_parameter_receives_gradient_from_some_sequence(given):
    silent = [name for name, leaf in given.J.items() if not bool(leaf.any())]
    # a shift of all keys alike changes no softmax: the bias of a key projection has no gradient but rounding
    assert not [name for name in silent if "k_proj.bias" not in name]


def test_padding_changes_nothing(given):
    rows = func.per_sequence_grad(given.logprob)(given.params, sequences(given.case, wider=2))
    assert error(flat(rows), flat(given.J)) <= given.case.reshaped


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_padding_beyond_a_sliding_window_changes_nothing(dtype, largest):
    """At such a position every key inside of the window is padding, so a masked softmax has nothing to share out."""
    case = replace(CASES["Gemma2"], dtype=dtype)
    model = build(case)
    apply, params = func.make_functional(model)
    logprob = func.sequence_logprob(apply, TEMPERATURE)
    rows = func.per_sequence_grad(logprob)(params, sequences(case, wider=8))
    assert error(flat(rows), flat(plain_gradients(eager_copy(model)))) <= largest


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tied])
def test_a_tied_table_appears_once_and_its_gradient_is_the_sum_of_both_uses(name):
    case = CASES[name]
    model = build(case)
    apply, params = func.make_functional(model)
    head = cast(Any, model).get_output_embeddings()
    assert head.weight is cast(Any, model).get_input_embeddings().weight
    assert case.table in params
    assert "lm_head.weight" not in params

    untied = eager_copy(model)
    separate = cast(Any, untied).get_output_embeddings()
    separate.weight = nn.Parameter(separate.weight.detach().clone())
    uses = plain_gradients(untied)
    rows = func.per_sequence_grad(func.sequence_logprob(apply, TEMPERATURE))(params, sequences(case))
    as_input, as_head = uses[case.table], uses["lm_head.weight"]
    assert float(as_input.norm()) > 0
    assert float(as_head.norm()) > 0
    assert error(rows[case.table], as_input + as_head) <= case.gradient


def test_jvp_and_vjp_agree_with_j(given):
    batch, v = sequences(given.case), given.random()
    along = torch.cat([leaf.reshape(-1) for leaf in v.values()])
    assert error(func.jvp(given.logprob, 3)(given.params, batch, v), flat(given.J) @ along) <= tolerance(given)
    w = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=given.case.dtype)  # powers of two commute with float32's rounding
    pulled = func.vjp(given.logprob, 3)(given.params, batch, w)
    pulled_flat = torch.cat([leaf.reshape(-1) for leaf in pulled.values()])
    assert error(pulled_flat, w @ flat(given.J)) <= given.case.reshaped


def test_curvature_is_finite_and_differs_from_zero(given):
    curvature = func.curvature(given.logprob, 3)(given.params, sequences(given.case), given.random())
    assert curvature.shape == (len(PROMPTS),)
    assert bool(torch.isfinite(curvature).all())
    assert bool((curvature != 0).all())


def test_curvature_equals_a_central_difference_of_jvp_for_gpt2():
    case = CASES["GPT-2"]
    apply, params = func.make_functional(build(case))
    logprob, batch = func.sequence_logprob(apply, TEMPERATURE), sequences(case)
    v = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    h = 1e-5
    up, down = (func.jvp(logprob)(fk.tree.axpy(sign * h, v, params), batch, v) for sign in (1, -1))
    assert error(func.curvature(logprob)(params, batch, v), (up - down) / (2 * h)) <= 1e-4


def test_influence_equals_kernel_times_weights(given):
    E, U = sequences(given.case), func.Sequences(*(leaf[1:] for leaf in sequences(given.case)))
    P = precond.diagonal({name: leaf.abs() for name, leaf in given.random(2).items()})
    w = torch.tensor([1.0, -2.0, 0.5], dtype=given.case.dtype)
    K = fk.kernel(given.logprob, given.params, E, U, P, microbatch=2)
    assert K.shape == (4, 3)
    scale = torch.cat([leaf.abs().reshape(-1) for leaf in given.random(2).values()])
    assert error(K, flat(given.J) * scale @ flat(given.J)[1:].T) <= given.case.gradient
    assert error(fk.influence(given.logprob, given.params, E, U, P, w, microbatch=2), K @ w) <= tolerance(given)
