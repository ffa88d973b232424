"""One plain pass over a batch gives the gradients of plain autograd, one sequence at a time; or it is not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import fkernel as fk
from fkernel import func
from fkernel.func.handles.forms import materialize_into
from fkernel.func.inputs.batch import length, take
from fkernel.func.taps.batched import batch_plan, piece_plan, pull_rows
from fkernel.func.taps.plan import GradientPlan
from fkernel.func.taps.rows import gradient_rows, handles_of, make_plan, plan_of
from tests.laws import close, rows
from tests.test_architectures import CASES, LLAMA_LIKE
from tests.test_as_people_have_them import OVERWRITTEN, PROMPTS, RESPONSES, Net, backward

DTYPE = torch.float64
SINGLE = 1e-6  # where float32 is in between
LAST_BIT = 1e-6  # transformers' norms and softmax are in float32, whose last bit moves with a batch's shape


def built(name: str) -> Any:
    shape: dict[str, Any] = {**LLAMA_LIKE, "num_key_value_heads": 2}
    small = {key: shape[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                         "num_attention_heads", "max_position_embeddings")}  # fmt: skip
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    local: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}
    linear: dict[str, Any] = {
        **{f"linear_num_{part}_heads": heads for part, heads in (("key", 2), ("value", 4))},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3, "head_dim": 8},
        "layer_types": ["linear_attention", "full_attention"],
    }
    gemma3: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
    shared: dict[str, Any] = {**shape, **linear, **experts, "shared_expert_intermediate_size": 8}
    makers: dict[str, Any] = {
        "Gemma": lambda: GemmaForCausalLM(GemmaConfig(**shape, head_dim=8)),
        "Gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**shape, **gemma3)),
        "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**shape, **local)),
        "Qwen3.5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape, **linear)),
        "Qwen3-Next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**shared)),  # pyright: ignore
        "Phi": lambda: PhiForCausalLM(PhiConfig(**small)),
        "GPT-NeoX": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**small)),
        "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)),  # pyright: ignore
        **{name: case.build for name, case in CASES.items()},
    }
    torch.manual_seed(1)
    model = makers[name]().double().eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))
    return model


DENSE = [
    "GPT-2", "Qwen2, tied", "Qwen3", "Llama", "OPT", "Phi", "GPT-NeoX", "LoRA on Qwen2", "Gemma", "Gemma2", "Gemma3",
    "Qwen3.5",
]  # fmt: skip
EXPERTS = ["Mixtral", "Qwen3-MoE", "gpt-oss", "Qwen3-Next"]


def alone(f: Any, params: dict[str, torch.Tensor], batch: Any) -> dict[str, torch.Tensor]:
    """J by plain autograd, one sequence at a time."""
    J: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for i in range(length(batch)):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        value = f(leaves, take(batch, slice(i, i + 1))).sum()
        grads = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
        for (name, leaf), g in zip(params.items(), grads, strict=True):
            J[name].append(torch.zeros_like(leaf) if g is None else g)
    return {name: torch.stack(each) for name, each in J.items()}


def written(handles: dict[str, Any], params: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    J = {name: leaf.new_full((n, *leaf.shape), torch.nan) for name, leaf in params.items()}
    for name, handle in handles.items():
        materialize_into(handle, J[name])
    return J


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_a_language_model_s_gradients_are_those_of_a_loop(name):
    apply, params = func.make_functional(built(name))
    S, one, n = func.sequence_logprob(apply), func.pad([[5]], [[6, 7]]), 5
    batch = func.pad([[5, 6, 7], [8], [9, 3], [4, 4, 4, 4], [5, 6]], [[3, 4], [5], [6, 7, 8, 9], [3], [7, 8]])
    plan = make_plan(S.fn, params, one)
    assert plan.batched
    handles, values = handles_of(S.fn, params, batch, plan)
    close(values, S(params, batch), LAST_BIT)
    close(rows(written(handles, params, n)), rows(alone(S.fn, params, batch)), LAST_BIT)
    mapped, _ = handles_of(S.fn, params, batch, plan._replace(batched=False))  # and vmap says the same
    close(rows(written(handles, params, n)), rows(written(mapped, params, n)), LAST_BIT)
    single, _ = handles_of(S.fn, params, one, plan)
    close(rows(written(single, params, 1)), rows(alone(S.fn, params, one)), LAST_BIT)


def test_positions_that_are_looked_up_once_are_each_sequence_s_own():
    apply, params = func.make_functional(built("GPT-2"))
    S, batch = func.sequence_logprob(apply), func.pad([[5, 6, 7], [8, 9, 3]], [[3, 4], [5, 6]])
    handles, _ = handles_of(S.fn, params, batch, make_plan(S.fn, params, take(batch, slice(0, 1))))
    positions = handles["transformer.wpe.weight"]
    assert isinstance(positions, func.SparseRows)
    assert positions.ids.shape == (2, 5)
    close(written({"w": positions}, {"w": params["transformer.wpe.weight"]}, 2)["w"],
          alone(S.fn, params, batch)["transformer.wpe.weight"], LAST_BIT)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ kinds of uses


def linear(p, x):
    return F.linear(x, p["w"], p["b"]).tanh().sum((1, 2))


def indexed(p, x):
    ids = torch.arange(3)[None].expand(len(x), -1)
    return (p["w"][ids] * x).tanh().sum((1, 2)) + (p["w"][ids[:1]] + x).sin().sum((1, 2))


def rows_of_vectors(p, x):
    return F.linear(x.sum(1), p["w"], p["b"]).tanh().sum(1)


def frozen_weight(p, x):
    return F.linear(x, torch.ones(4, 4, dtype=DTYPE), p["b"]).tanh().sum((1, 2))


def conv1d(p, x):
    flat = x.reshape(-1, x.shape[-1])
    return torch.addmm(p["b"], flat, p["w"]).tanh().reshape(x.shape).sum((1, 2))


def scale(p, x):
    return (p["b"] * (x * p["b"]).tanh()).tanh().sum((1, 2)) + torch.mul(p["b"], x).sin().sum((1, 2))


def shift(p, x):
    return ((p["b"] + x).tanh() + p["b"]).sin().sum((1, 2)) * torch.add(x, p["b"]).cos().sum((1, 2))


def layer_norm(p, x):
    return F.layer_norm(F.layer_norm(x, (4,), p["b"]), (4,), p["b"], p["c"], 0.1).tanh().sum((1, 2))


def wide_norm(p, x):
    return F.layer_norm(x.unflatten(-1, (2, 2)), (2, 2), weight=p["v"], bias=p["v"], eps=0.3).sin().sum((1, 2, 3))


def rms_norm(p, x):
    return (F.rms_norm(x, (4,), p["b"], 0.1) * F.rms_norm(x.sin(), (4,), weight=p["c"])).tanh().sum((1, 2))


def heads(p, x):
    return (F.linear(x, p["w"]).unflatten(-1, (1, 2, 2)).transpose(1, 2) * p["d"]).tanh().sum((1, 2, 3, 4))


def tied(p, x):
    ids = torch.arange(3)[None].expand(len(x), -1)
    return F.linear(x + F.embedding(ids, p["w"]), p["w"], p["b"]).tanh().sum((1, 2))


def once(p, x):
    h = F.linear(F.embedding(torch.arange(x.shape[1])[None], p["w"]), p["w"], p["b"])
    return (h + x).tanh().sum((1, 2))


def overwritten(p, x):
    h = F.linear(x, p["w"], p["b"])
    h *= 2.0
    h[..., 0] = 0.0
    h += F.embedding(torch.arange(x.shape[1])[None], p["w"])
    return h.tanh_().sum((1, 2))


def without_a_graph(p, x):
    with torch.no_grad():
        y = F.linear(x, p["w"], p["b"])
    return (F.linear(x, p["w"]) + y).tanh().sum((1, 2)) + p["c"].detach().sum()


def product(p, x):
    return (x @ p["w"]).tanh().sum((1, 2))


def as_data(p, x):
    return F.linear(x, F.linear(p["w"], p["w"])).tanh().sum((1, 2))


def of_a_parameter(p, x):
    return (F.linear(p["e"], p["w"])[:, None] + x).tanh().sum((1, 2))


def squared(p, x):
    return (x * (p["b"] * p["b"])).sum((1, 2))


def reshaped(p, x):
    return (x * p["b"][None, None]).tanh().sum((1, 2))


def looked_up_in_a_row(p, x):
    return (F.embedding(torch.arange(x.shape[1]) % 4, p["w"]) * x).sum((1, 2))


def cast_and_shifted(p, x):
    h = F.linear(x, p["w"].float().double())
    return (h * (1.0 + p["b"].float())).tanh().sum((1, 2)) * (-p["c"].exp() * x.sin()).sum((1, 2))


def of_two(p, x):
    return F.linear(x, p["w"] * p["b"], p["b"] - p["c"]).tanh().sum((1, 2))


def turned(p, x):
    h = F.linear(x, p["w"].T) @ p["w"].mT + x.tanh() @ p["w"].t() @ p["w"]
    return (h * F.linear(x, p["w"].transpose(0, 1) * 2.0)).sin().sum((1, 2))


def repeated(p, x):
    """Attention sinks: one more column for every row, the same in every sequence."""
    h = F.linear(x, p["w"])
    sinks = p["e"].reshape(1, 1, 4).expand(len(x), x.shape[1], -1)
    return torch.cat([h, sinks], -1).softmax(-1).square().sum((1, 2))


def convolved(p, x):
    h = F.linear(x, p["w"]).transpose(1, 2)
    return F.conv1d(h, p["w"][:, :3].unsqueeze(1), p["b"], padding=2, groups=4).tanh().sum((1, 2))


def contracted(p, x):
    return torch.einsum("nti,oi->nto", F.linear(x, p["w"]).tanh(), p["w"]).sin().sum((1, 2))


def scalar(p, x):
    return (F.linear(x, p["w"]) * p["b"][0] + p["w"].sum()).tanh().sum((1, 2))


KINDS = [
    linear, rows_of_vectors, frozen_weight, conv1d, scale, shift, layer_norm, wide_norm, rms_norm, heads, tied, once,
    overwritten, without_a_graph, product, as_data, of_a_parameter, squared, reshaped, looked_up_in_a_row,
    indexed, cast_and_shifted, of_two, turned, repeated, convolved, contracted, scalar,
]  # fmt: skip


@pytest.fixture
def params():
    shapes = {"w": (4, 4), "b": (4,), "c": (4,), "v": (2, 2), "d": (2,), "e": (1, 4)}
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=DTYPE) for name, shape in shapes.items()}


@pytest.mark.parametrize("f", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_known_use_has_the_gradients_of_a_loop(f, n, params):
    x = torch.randn(n, 3, 4, dtype=DTYPE)
    plan = batch_plan(f, params, x[:1])
    assert plan is not None
    handles, _ = handles_of(f, params, x, plan)
    close(rows(written(handles, params, n)), rows(alone(f, params, x)), SINGLE if f is cast_and_shifted else 1e-12)


def test_what_is_not_used_takes_no_storage(params):
    plan = plan_of(linear, params, torch.randn(2, 3, 4, dtype=DTYPE))
    handles, _ = handles_of(linear, params, torch.randn(2, 3, 4, dtype=DTYPE), plan)
    unused = handles["c"]
    assert isinstance(unused, torch.Tensor)
    assert set(unused.stride()) == {0}


# --------------------------------------------------------------------------------------------- what is no known use


def beside(p, x):
    return linear(p, x) + (p["w"] ** 2).sum() * x.sum((1, 2))


def in_place(p, x):
    return (2 * x).add_(p["b"]).tanh().sum((1, 2))


def mixed(p, x):
    """An operation on all sequences together, which no copy of a parameter for each explains."""
    h = F.linear(x, p["w"]).tanh()
    return torch.einsum("nti,oi,mti->nto", h, p["w"], h).sum((1, 2))


def of_positions(p, x):
    """Once for the whole batch, in rows that 2 and 3 divide."""
    features = torch.ones(x.shape[1], 4, dtype=x.dtype, device=x.device)
    return (F.linear(features, p["w"]) * x).tanh().sum((1, 2))


def times_first(p, x):
    flat = x.transpose(0, 1).reshape(-1, x.shape[-1])
    out = torch.addmm(p["b"], flat, p["w"]).reshape(x.shape[1], x.shape[0], -1)
    return out.transpose(0, 1).tanh().sum((1, 2))


def coupled(p, x):
    h = F.linear(x, p["w"], p["b"])
    return (h - h.mean(0)).square().sum((1, 2)) + h.tanh().sum((1, 2))


def times_outermost(p, x):
    return F.linear(x.transpose(0, 1), p["w"], p["b"]).tanh().sum((0, 2))


OTHERS = [
    beside, in_place, times_first, coupled, mixed, of_positions, times_outermost,
]  # fmt: skip


@pytest.mark.parametrize("t", [2, 3, 6])
@pytest.mark.parametrize("f", OTHERS, ids=lambda f: f.__name__)
def test_any_other_use_is_left_to_vmap(f, t, params):
    x = torch.randn(4, t, 4, dtype=DTYPE)
    assert batch_plan(f, params, x[:1]) is None
    if f not in (coupled, mixed):
        plan = plan_of(f, params, x)
        assert not plan.batched
        close(rows(gradient_rows(f, 2, plan)(params, x)), rows(alone(f, params, x)), 1e-12)


@pytest.mark.parametrize(
    "f", [linear, once, looked_up_in_a_row, convolved, of_positions, times_outermost], ids=lambda f: f.__name__
)
def test_the_layout_of_rows_is_found_out_without_values(f, params):
    """On the meta device, where a model is counted that is not loaded."""
    meta = {name: leaf.to("meta") for name, leaf in params.items()}
    plan = batch_plan(f, meta, torch.empty(1, 6, 4, dtype=DTYPE, device="meta"))
    assert (plan is not None) is (f in KINDS)


@pytest.mark.filterwarnings("ignore::fkernel.ModelWarning")
def test_a_coupling_is_still_an_error(params):
    with pytest.raises(fk.ModelError):
        func.per_sequence_grad(coupled)(params, torch.randn(4, 3, 4, dtype=DTYPE))


def test_a_wrong_gradient_is_taken_by_vmap(params, monkeypatch):
    """The certificate sends it one way on, and no further."""
    from fkernel.func.taps import listening as taps

    right, x = alone(linear, params, x := torch.randn(4, 3, 4, dtype=DTYPE)), x
    hear = taps.Tap.hear
    monkeypatch.setattr(taps.Tap, "hear", lambda self, cotangent: hear(self, 1.1 * cotangent))
    with pytest.warns(fk.ModelWarning, match="do not add up .* they are taken under vmap, which is slower"):
        close(rows(func.per_sequence_grad(linear)(params, x)), rows(right), 1e-12)


def test_rows_that_belong_to_no_sequence_are_an_error(params):
    def f(p, x):
        return linear(p, x) if len(x) < 4 else F.linear(x[:3], p["w"]).tanh().sum() + x.sum((1, 2))

    x = torch.randn(4, 3, 4, dtype=DTYPE)
    plan = batch_plan(f, params, x[:1])
    assert plan is not None
    with pytest.raises(fk.ModelError, match=r"'w' is used in an operation whose result has shape \[3, 3, 4\], in a"):
        handles_of(f, params, x, plan)


@pytest.mark.parametrize("treat", OVERWRITTEN)
def test_overwritten_outputs_have_the_gradients_of_backward_by_vmap_too(treat):
    model = Net(treat).double()
    _, J = backward(model)
    apply, params = func.make_functional(model)
    S, U = func.sequence_logprob(apply), func.pad(PROMPTS, RESPONSES, 7)
    plan = make_plan(S.fn, params, take(U, slice(1, 2)))
    assert plan.batched
    for each in (plan, plan._replace(batched=False)):
        close(rows(gradient_rows(S, 2, each)(params, U)), J, 1e-10)


# ------------------------------------------------------------------------------------------------- a piece of a model


def layer_of(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A decoder layer as fn(params, h), rotary positions and mask made of h's shape."""
    model = built(name)
    body = model.transformer if name == "GPT-2" else model.model
    layer = (body.h if name == "GPT-2" else body.layers)[1]

    def fn(params: Any, h: torch.Tensor) -> torch.Tensor:
        t = h.shape[1]
        mask = torch.full((t, t), -1e30, dtype=h.dtype).triu(1)[None, None]
        more = {} if name == "GPT-2" else {"position_embeddings": body.rotary_emb(h, torch.arange(t)[None])}
        out = functional_call(layer, params, (h,), {"attention_mask": mask, **more})
        return out[0] if isinstance(out, tuple) else out

    return fn, {name: leaf.detach() for name, leaf in layer.named_parameters()}


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "Qwen2, tied", "Llama"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_layer_s_rows_are_those_of_autograd_one_sequence_at_a_time(name, n):
    fn, params = layer_of(name)
    h, c = torch.randn(n, 5, 16, dtype=DTYPE), torch.randn(n, 5, 16, dtype=DTYPE)
    plan = piece_plan(fn, params, (h,))
    assert plan is not None
    handles, (dh,) = pull_rows(fn, params, (h,), c, plan)
    assert dh is not None
    J = alone(lambda p, x: (fn(p, x[0]) * x[1]).sum((1, 2)), params, (h, c))
    close(rows(written(handles, params, n)), rows(J), LAST_BIT)
    close(dh, alone(lambda p, x: (fn(params, p["h"][x[0]]) * x[1]).sum((1, 2)), {"h": h}, (torch.arange(n), c))["h"]
          .sum(0), LAST_BIT)  # fmt: skip


def test_a_piece_s_other_inputs_have_no_cotangent_and_need_no_copies(params):
    def fn(p, h, ids, mask, scale):
        return F.linear(h, p["w"]) * mask + scale * F.embedding(ids, p["w"])

    inputs = (torch.randn(3, 5, 4, dtype=DTYPE), torch.randint(4, (3, 5)), torch.ones(5, 1, dtype=torch.int64), 2.0)
    plan = piece_plan(fn, params, inputs)
    assert plan is not None
    handles, cotangents = pull_rows(fn, params, inputs, torch.ones(3, 5, 4, dtype=DTYPE), plan)
    assert [c is None for c in cotangents] == [False, True, True, True]
    J = alone(lambda p, x: fn(p, *x, *inputs[2:]).sum((1, 2)), params, inputs[:2])  # pyright: ignore
    close(rows(written(handles, params, 3)), rows(J), 1e-12)


def test_a_cotangent_of_another_shape_is_an_error(params):
    x = torch.randn(2, 3, 4, dtype=DTYPE)
    plan = GradientPlan(batched=True)
    with pytest.raises(fk.ModelError, match=r"fn returned \[2\], its cotangent is \[2, 3\]"):
        pull_rows(linear, params, (x,), torch.ones(2, 3, dtype=DTYPE), plan)
