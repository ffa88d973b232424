"""Models as people have them: overwritten outputs, wrapped embeddings, virtual tokens, branches, widths that matter."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fkernel as fk
from fkernel import func, precond
from fkernel.func.trust.checks import plan_of
from tests.laws import close, rows

DTYPE = torch.float64
PROMPTS, RESPONSES = [[3, 4], [5], [6, 2, 1]], [[5, 6, 2], [8, 9], [3, 3, 2, 1]]
PAD = 0


def alone(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """S of one sequence by the definition, aligned from the end."""
    ids = torch.tensor([[*prompt, *response]])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    z = getattr(out, "logits", out)
    z = (z[0] if isinstance(z, tuple) else z)[0, -ids.shape[1] :].double()
    log_p = z[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return log_p[len(prompt) - 1 :].sum()


def backward(model: Any, prompts=PROMPTS, responses=RESPONSES) -> tuple[torch.Tensor, torch.Tensor]:
    """S [n] and J [n p] of plain reverse passes, one a sequence; a parameter without a gradient has zeros."""
    values, J = [], []
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    for prompt, response in zip(prompts, responses, strict=True):
        model.zero_grad(set_to_none=True)
        value = alone(model, prompt, response)
        value.backward()
        values.append(value.detach())
        J.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]))
    model.zero_grad(set_to_none=True)
    return torch.stack(values), torch.stack(J).double()


def met(model: Any, tolerance: float = 1e-10, **options: Any) -> Any:
    """Values, rows, kernel and influence are those of backward(); the apply returns."""
    values, J = backward(copy.deepcopy(model))
    apply, params = func.make_functional(model, **options)
    S, U = func.sequence_logprob(apply), func.pad(PROMPTS, RESPONSES, 7)
    close(func.evaluate(S)(params, U), values, tolerance)
    close(rows(func.per_sequence_grad(S, 2)(params, U)), J, tolerance)
    w = torch.tensor([1.0, -0.5, 2.0], dtype=DTYPE)
    close(fk.kernel(S, params, U, U, precond.identity()), J @ J.T, tolerance)
    close(fk.influence(S, params, U, U, precond.identity(), w), J @ J.T @ w, tolerance)
    return apply


class Net(nn.Module):
    """A small causal model whose layers' outputs are treated in ways that people treat them."""

    def __init__(self, treat: str = "") -> None:
        super().__init__()
        self.treat, self.embed = treat, nn.Embedding(10, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 10)

    def forward(self, input_ids, attention_mask=None, **_):
        x = self.embed(input_ids)
        if self.treat == "embedding *= 2":
            x *= 2.0
        x = x + x.cumsum(1) / 3
        y = self.up(x)
        y = F.relu(y, inplace=True) if self.treat == "relu in place" else F.gelu(y)
        if self.treat == "layer without a graph":
            with torch.no_grad():
                y = y + F.gelu(self.up(x))
        y = self.down(y)
        if self.treat == "y += x":
            y += x
        elif self.treat == "y[..., 0] = 0":
            y[..., 0] = 0.0
        elif self.treat == "y.mul_(x).add_(x)":
            y.mul_(x).add_(x)
        else:
            y = y + x
        z = self.head(y)
        if self.treat == "logits /= 3":
            z /= 3.0
        if self.treat == "masked_fill_":
            z.masked_fill_(torch.arange(10) == 9, -1e9)
        if self.treat == "branch" and bool((z[..., 0] > 0).any()):
            z = z * 2
        if self.treat == "boolean index":
            z = z * 1.0
            z[input_ids == 3] *= 0.5
        if self.treat == "own backward":
            z = Doubled.apply(z)
        if self.treat == "logits in a tuple":
            return z, z.sum()
        return SimpleNamespace(logits=z) if self.treat == "logits by name" else z


class Doubled(torch.autograd.Function):
    """A function of somebody's own, without setup_context."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * grads[0]


OVERWRITTEN = [
    "embedding *= 2", "relu in place", "y += x", "y[..., 0] = 0", "y.mul_(x).add_(x)", "logits /= 3", "masked_fill_",
]  # fmt: skip


@pytest.mark.parametrize("treat", [*OVERWRITTEN, "layer without a graph", "logits in a tuple", "logits by name"])
def test_outputs_that_a_model_overwrites_or_wraps_have_the_gradients_of_backward(treat):
    with warnings.catch_warnings():
        if treat != "layer without a graph":  # which forward mode does not heed
            warnings.simplefilter("error", fk.ModelWarning)
        met(Net(treat).double())


class Settings(NamedTuple):
    """A configuration that cannot be changed."""

    vocab_size: int = 10


class Own(nn.Module):
    """A model of somebody's own with a configuration, as Hugging Face's have, and another way to be called."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.net = config, Net()

    def forward(self, input_ids, attention_mask=None):
        return self.net(input_ids)


@pytest.mark.parametrize("config", [SimpleNamespace(vocab_size=10), {"vocab_size": 10}, Settings()])
def test_a_model_of_ones_own_may_have_a_configuration(config):
    met(Own(config).double())


class Encoder(nn.Module):
    """Layers of torch's own, which in eval mode may take kernels without a derivative; or such as compute twice."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)
        self.layers, self.checkpointed = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), checkpointed

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        if self.checkpointed:
            return self.head(checkpoint(self.layers, x, mask, use_reentrant=False))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def test_torchs_own_transformer_is_differentiated_in_eval_mode():
    fast = torch.backends.mha.get_fastpath_enabled()
    met(Encoder().double().eval())
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Encoder(checkpointed=True), r"computes activations again in backward \(torch\.utils\.checkpoint\)"),
        (lambda: nn.DataParallel(Net()), r"make_functional the one inside: model\.module"),
    ],
)
def test_wrappers_that_torch_func_cannot_follow_are_named(model, said):
    apply, params = func.make_functional(model().double())
    with pytest.raises(fk.ModelError, match=said):
        func.per_sequence_grad(func.sequence_logprob(apply))(params, func.pad(PROMPTS, RESPONSES))


@pytest.mark.parametrize("treat", OVERWRITTEN[1:6])
def test_and_they_still_take_one_pass(treat):
    apply, params = func.make_functional(Net(treat).double())
    plan = plan_of(func.sequence_logprob(apply), params, func.pad(PROMPTS, RESPONSES))
    assert plan.batched


@pytest.mark.parametrize("treat", ["branch", "boolean index", "own backward"])
def test_where_vmap_cannot_follow_sequences_are_differentiated_one_at_a_time(treat):
    with pytest.warns(fk.ModelWarning, match="vmap cannot follow .* one sequence at a time, which is as exact"):
        met(Net(treat).double())


@pytest.mark.parametrize("treat", ["own backward"])
def test_where_forward_mode_cannot_follow_reverse_passes_do(treat):
    apply, params = func.make_functional(Net(treat).double())
    S, U = func.sequence_logprob(apply), func.pad(PROMPTS, RESPONSES)
    v = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    with pytest.warns(fk.ModelWarning, match="by reverse passes"):
        first, second = func.jvp(S, 2)(params, U, v), func.curvature(S)(params, U, v)
    plain, _ = func.make_functional(Net().double())
    T = func.sequence_logprob(lambda p, ids, mask: 2 * plain(p, ids, mask))
    with func.skip_certificates("forward"):  # forward mode is the oracle here
        close(first, func.jvp(T)(params, U, v))
        close(second, func.curvature(T)(params, U, v))


def test_an_operation_whose_nested_forward_rule_is_wrong_is_noticed():
    """torch.linalg.solve (pytorch issue 198017): forward over forward lacks terms."""

    def f(p, x):
        A = 3 * torch.eye(2, dtype=x.dtype) + p["w"] * x[:, :, None]
        return torch.linalg.solve(A, x[..., None])[..., 0].square().sum(1)

    params, x = {"w": torch.randn(2, 2, dtype=DTYPE)}, torch.randn(3, 2, dtype=DTYPE)
    v, h = {"w": torch.randn(2, 2, dtype=DTYPE)}, 1e-4
    at = [f({"w": params["w"] + k * h * v["w"]}, x) for k in (-1, 0, 1)]
    with pytest.warns(fk.ModelWarning, match="second derivative .* by reverse passes"):
        close(func.curvature(f)(params, x, v), (at[0] - 2 * at[1] + at[2]) / h**2, 1e-5)


def qwen(**settings: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {
        "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
        "initializer_range": 0.3, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(3)
    made = Qwen2ForCausalLM(Qwen2Config(**{**shape, **settings})).double().eval()
    made.set_attn_implementation("eager")
    return made


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_virtual_tokens_in_front_do_not_shift_the_logits(kind):
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config = {
        "prompt": lambda: PromptTuningConfig(**shared),
        "p-tuning": lambda: PromptEncoderConfig(**shared, encoder_hidden_size=8),
        "prefix": lambda: PrefixTuningConfig(**shared),
    }[kind]()
    met(get_peft_model(qwen(), config).double().eval(), 1e-6)  # rotary frequencies and norms are in float32


def wrapped(kind: str) -> Any:
    """An embedding with a padding row, inside of what PEFT puts around it."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [PAD, 3, 5]},
        "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    }[kind]
    model = get_peft_model(qwen(pad_token_id=PAD), LoraConfig(r=2, task_type="CAUSAL_LM", **settings)).double()
    for leaf in model.parameters():
        if leaf.requires_grad:
            nn.init.normal_(leaf, std=0.3)
    return model.eval()


class Padded(nn.Module):
    """Nobody's class: a table with a padding row, found by nothing but its use."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(13, 6, padding_idx=PAD), nn.Linear(6, 13)
        nn.init.normal_(self.words.weight)

    def forward(self, input_ids, attention_mask=None, **_):
        return self.head(self.words(input_ids).cumsum(1))


INSIDE = ([[3, 4], [PAD, 5, 6], [7]], [[5, PAD, 6], [8, 9], [PAD, PAD, 2, 1]])


@pytest.mark.filterwarnings("ignore:.*padding id")
@pytest.mark.parametrize("kind", ["saved", "tokens", "lora", "own"])
def test_a_padding_row_inside_of_a_wrapper_is_withheld_as_training_withholds_it(kind):
    model = Padded().double() if kind == "own" else wrapped(kind)
    _, J = backward(copy.deepcopy(model), *INSIDE)
    apply, params = func.make_functional(model)
    assert apply.padding_idx == PAD
    U = func.pad(*INSIDE, PAD)
    trained, true = (func.sequence_logprob(each) for each in (func.with_masked_padding_grad(apply), apply))
    close(rows(func.per_sequence_grad(trained)(params, U)), J, 1e-6)
    derivative = rows(func.per_sequence_grad(true)(params, U))
    assert float((derivative - J).norm() / J.norm()) > 1e-3
    v, h = {name: torch.randn_like(leaf) for name, leaf in params.items()}, 2e-3
    ends = [func.evaluate(true)(fk.tree.axpy(s * h, v, params), U) for s in (-1, 1)]
    close(func.jvp(true)(params, U, v), (ends[1] - ends[0]) / (2 * h), 2e-3)  # norms are in float32
    with pytest.warns(UserWarning, match="padding id 0 inside"):
        func.evaluate(true)(params, U)


def test_a_frozen_padding_row_is_none_of_its_business():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(qwen(pad_token_id=PAD), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert func.make_functional(model)[0].padding_idx is None


def test_the_balancing_loss_of_experts_is_no_part_of_log_pi():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(MixtralConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True,
        initializer_range=0.3,
    )).double().eval()  # fmt: skip
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", fk.ModelWarning)
        met(model, 1e-5)
    assert model.config.output_router_logits  # the caller's own is left alone


SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"max_position_embeddings": 4, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0],
            "original_max_position_embeddings": 4,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_positions_that_the_longest_sequence_scales_are_each_sequence_s_own(kind):
    settings = copy.deepcopy(SCALED[kind])
    settings["rope_parameters"]["rope_theta"] = 10000.0
    model = qwen(**settings)
    long = ([[3, 4], [5, 6, 7], [8] * 9], [[1, 2], [3, 3, 1], [2] * 8])
    each = [backward(copy.deepcopy(model), [p], [r]) for p, r in zip(*long, strict=True)]
    values, J = (torch.cat(parts) for parts in zip(*each, strict=True))
    apply, params = func.make_functional(model)
    assert apply.own_width
    S, U = func.sequence_logprob(apply), func.pad(*long)
    for batch in (S(params, U), func.evaluate(S, 2)(params, U)):
        close(batch, values, 1e-6)
    close(rows(func.per_sequence_grad(S, 3)(params, U)), J, 1e-5)
    short = func.pad(long[0][:1], long[1][:1])
    close(S(params, short), values[:1], 1e-6)  # nothing is left of the long one
    first = qwen()
    assert not func.make_functional(first)[0].own_width


def test_a_forward_pass_that_somebody_patched_is_noticed():
    """What the copy runs is not what the module runs: here a patch that only the module as given has."""
    model = qwen()
    apply, params = func.make_functional(model)
    apply.original.lm_head.register_forward_hook(lambda module, args, out: out * 1.1)  # pyright: ignore
    with pytest.raises(fk.ModelError, match="functional copy of the model does not compute what the model itself does"):
        func.evaluate(func.sequence_logprob(apply))(params, func.pad(PROMPTS, RESPONSES))


def test_attention_that_cannot_be_set_is_set_all_the_same():
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    model: Any = FalconForCausalLM(FalconConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=1,
        initializer_range=0.3,
    )).double().eval()  # fmt: skip
    met(model, 1e-5)


def test_a_model_that_returns_no_logits_is_refused():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, input_ids, attention_mask):
            return self.w

    apply, params = func.make_functional(Silent())
    with pytest.raises(fk.ModelError, match=r"Silent returned \[2\] for input_ids of .*; expected logits \[n t v\]"):
        func.evaluate(func.sequence_logprob(apply))(params, func.pad(PROMPTS, RESPONSES))


def test_other_quantities_than_log_pi_get_their_own_widths_too():
    settings = copy.deepcopy(SCALED["dynamic"])
    settings["rope_parameters"]["rope_theta"] = 10000.0
    apply, params = func.make_functional(qwen(**settings))
    long = ([[3, 4], [5, 6, 7], [8] * 9], [[1, 2], [3, 3, 1], [2] * 8])
    E, other = func.pad(*long), func.pad(long[0], [[6, 1, 3], [2], [4, 4]])
    each = [(func.pad([p], [r]), func.pad([p], [s])) for p, r, s in zip(*long, [[6, 1, 3], [2], [4, 4]], strict=True)]
    v = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    for f, whole, alone in (
        (func.mean_entropy(apply), E, [first for first, _ in each]),
        (func.log_odds(apply), func.Pair(E, other), [func.Pair(*pair) for pair in each]),
    ):
        close(func.evaluate(f, 3)(params, whole), torch.cat([func.evaluate(f)(params, one) for one in alone]), 1e-6)
        close(func.jvp(f, 3)(params, whole, v), torch.cat([func.jvp(f)(params, one, v) for one in alone]), 1e-5)
        J = torch.cat([rows(func.per_sequence_grad(f)(params, one)) for one in alone])
        close(rows(func.per_sequence_grad(f, 3)(params, whole)), J, 1e-5)
