"""Gradients layer by layer are the gradients: in float64, of real architectures, whatever travels together."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fkernel as fk
from fkernel import func
from fkernel.engine.batching import SortedBatch
from fkernel.engine.by_layer import Shard, Side, shards
from fkernel.engine.layerwise import Walking, gradient_sum
from fkernel.errors import NonFiniteError
from fkernel.func.detach import through_detach
from fkernel.func.handles.forms import Factored, Sum, count, materialize_into, shape_of, summands, tensors
from fkernel.func.handles.head import Head
from fkernel.func.inputs.batch import by_length, length, take, trim
from fkernel.func.inputs.source import moved, plain
from fkernel.func.layers.cut import Cut
from fkernel.func.layers.cutting import cut_of
from fkernel.func.padding import with_masked_padding_grad
from fkernel.func.taps.rows import looped_rows
from fkernel.func.weighted import Weighted, weighted_logprob
from tests.cases import EXAMPLES
from tests.models import gpt2, own

V = 13
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GEMMA3 = {"num_hidden_layers": 4, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4} | {
    "layer_types": ["sliding_attention", "full_attention"] * 2
}


def of(name: str, config: str | None = None, **changes: Any) -> nn.Module:
    """A tiny model of Hugging Face's with random weights."""
    made = getattr(transformers, config or f"{name}Config")(**{**SMALL, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(made)


def lora(model: nn.Module, *targets: str, **options: Any) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=[*targets], **options))  # pyright: ignore
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "embedding_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


MODELS = {
    "the tests' own": lambda: own(1),
    "GPT-2": lambda: gpt2(1),
    "Qwen2, tied": lambda: of("Qwen2", tie_word_embeddings=True),
    "Qwen2, untied": lambda: of("Qwen2", tie_word_embeddings=False),
    "Qwen3": lambda: of("Qwen3", head_dim=8),
    "Llama": lambda: of("Llama"),
    "Mistral": lambda: of("Mistral", sliding_window=4),
    "Gemma3": lambda: of("Gemma3", "Gemma3TextConfig", **GEMMA3),
    "OPT": lambda: of("OPT", word_embed_proj_dim=16, ffn_dim=24),
    "Qwen3-MoE": lambda: of("Qwen3Moe", **EXPERTS),
    "gpt-oss": lambda: of("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "Qwen3.5": lambda: of("Qwen3_5", "Qwen3_5TextConfig", head_dim=8, **LINEAR),
    "Qwen3-Next": lambda: of("Qwen3Next", **EXPERTS, **LINEAR, shared_expert_intermediate_size=12),
    "LoRA": lambda: lora(of("Qwen2"), "q_proj", "v_proj", "down_proj"),
    "LoRA on embeddings": lambda: lora(of("Qwen2"), "embed_tokens", "q_proj"),
    "LoRA and a whole head": lambda: lora(of("Qwen2"), "q_proj", modules_to_save=["lm_head"]),
}


def built(name: str) -> nn.Module:
    """The model in float64, with the attention that the reference has."""
    torch.manual_seed(0)
    model: Any = MODELS[name]().double().eval()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def ragged(seed: int = 0, n: int = 4) -> func.Sequences:
    """Sequences of 2 to 16 tokens, longest first."""
    g = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        return torch.randint(3, V, (int(torch.randint(1, 9, (1,), generator=g)),), generator=g).tolist()

    batch = func.pad([ids() for _ in range(n)], [ids() for _ in range(n)])
    return take(batch, by_length(batch))


def cut(f: Any, params: Any, batch: Any) -> Cut:
    found = cut_of(f, params, batch)
    assert isinstance(found, Cut), found
    return found


def dense(handle: Any) -> Tensor:
    out = torch.empty(count(handle), *shape_of(handle), dtype=torch.float64)
    materialize_into(handle, out)
    return out


def assembled(walked: Any, side: str) -> dict[str, Tensor]:
    """J of one side, of its shards; none may name a parameter twice, and U's rows must come in order."""
    J: dict[str, list[Tensor]] = {}
    for shard in walked:
        blocks = [(slice(0, 0), shard.held)] if side == "E" else shard.streamed
        new, stop = dict[str, list[Tensor]](), 0
        for rows, handles in blocks:
            assert side == "E" or rows.start == stop
            stop = rows.stop
            for name, handle in handles.items():
                new.setdefault(name, []).append(dense(handle))
        assert not J.keys() & new.keys()
        J |= new
    return {name: torch.cat(parts) for name, parts in J.items()}


def looped(f: Any, params: Any, batch: Any) -> dict[str, Tensor]:
    """J by plain autograd, every sequence alone and unpadded."""
    rows = [looped_rows(f.fn, params, trim(take(batch, slice(i, i + 1))))[0] for i in range(length(batch))]
    return {name: torch.cat([row[name] for row in rows]) for name in params}  # pyright: ignore


def apart(J: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(J) == set(expected)
    error = sum(float((J[name] - leaf).square().sum()) for name, leaf in expected.items())
    return (error / sum(float(leaf.square().sum()) for leaf in expected.values())) ** 0.5


@pytest.mark.turns(6)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_layer_by_layer_are_autograd_s(name):
    apply, params = func.make_functional(built(name))
    S, E, U = func.sequence_logprob(apply, 0.7), ragged(), ragged(1, 3)
    pieces, source = cut(S, params, E), plain(params)
    expected = {"E": looped(S, params, E), "U": looped(S, params, U)}
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"every": 2},
        {"tokens": None},
        {"tokens": 24, "every": 3, "dense": False},
    )
    for options in choices:
        sides = Side(E, ((1.0, source),)), Side(U, ((1.0, source),))
        # A norm or an expert that multiplies in float32 has another last bit where its batch has another shape.
        bound = 1e-13 if "tokens" not in options or name in ("the tests' own", "GPT-2") else 1e-6
        for side in ("E", "U"):
            walked = shards(pieces, *sides, **options)
            assert apart(assembled(walked, side), expected[side]) < bound
            own_values = (walked.values_held if side == "E" else walked.values_streamed)[0]
            torch.testing.assert_close(own_values, S(params, E if side == "E" else U), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["the tests' own", "GPT-2", "OPT"])
def test_they_are_what_the_reference_of_the_library_gives(name):
    apply, params = func.make_functional(built(name))
    S, E = func.sequence_logprob(apply), ragged()
    side = Side(E, ((1.0, plain(params)),))
    J = assembled(shards(cut(S, params, E), side, side), "E")
    assert apart(J, func.per_sequence_grad(S)(params, E)) < 1e-13


def test_fused_attention_is_as_right_as_its_own_arithmetic():
    model = of("Qwen2", attn_implementation="sdpa").double()
    apply, params = func.make_functional(model)
    S, E = func.sequence_logprob(apply), ragged()
    side = Side(E, ((1.0, plain(params)),))
    J = assembled(shards(cut(S, params, E), side, side), "E")
    assert apart(J, looped(S, params, E)) < 1e-6


@pytest.mark.parametrize("entropies", [False, True])
def test_weighted_tokens_of_any_sign_and_none(entropies):
    apply, params = func.make_functional(built("GPT-2"))
    f, U = weighted_logprob(apply, 0.7), ragged()
    omega, eta = torch.randn(2, *U.input_ids.shape, dtype=torch.float64)
    omega[1] = eta[1] = 0.0
    omega[2] = 0.0  # nothing but entropies, where there are any
    batch = Weighted(U, omega, eta if entropies else None)
    side = Side(batch, ((1.0, plain(params)),))
    walked = shards(cut(f, params, batch), side, side, tokens=40)
    torch.testing.assert_close(walked.values_streamed[0], f(params, batch))
    J = assembled(walked, "U")
    assert apart(J, looped(f, params, batch)) < 1e-13
    assert all(not leaf[1].any() for leaf in J.values())
    assert any(leaf[2].any() for leaf in J.values()) == entropies


def test_a_weighted_sum_of_entropies_layer_by_layer():
    apply, params = func.make_functional(built("Qwen2, tied"))
    f, U, w = weighted_logprob(apply), ragged(), torch.linspace(-1, 1, len(ragged().input_ids)).double()
    batch = Weighted(U, torch.zeros(U.input_ids.shape).double(), torch.ones(U.input_ids.shape).double())
    total = gradient_sum(SortedBatch("U", batch, f), params, w, Walking(30, 1))
    H = func.token_entropy(apply)
    J = looped(replace(H, fn=lambda p, x: H.fn(p, x).sum(1)), params, U)
    for name, leaf in total.items():
        torch.testing.assert_close(leaf, torch.tensordot(w, J[name], 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dense_rows", [True, False])
def test_a_path_s_nodes_add_up_with_their_weights(dense_rows):
    apply, params = func.make_functional(built("the tests' own"))
    S, E = func.sequence_logprob(apply), ragged()
    δ = {name: 0.1 * torch.randn_like(leaf) for name, leaf in params.items()}
    nodes = ((0.3, moved(params, δ, 0.25)), (0.7, moved(params, δ, 0.8)))
    sides = Side(E, nodes), Side(E, ((1.0, plain(params)),))
    walked = shards(cut(S, params, E), *sides, every=2, tokens=20, dense=dense_rows)
    thetas = [{name: leaf + s * δ[name] for name, leaf in params.items()} for s in (0.25, 0.8)]
    torch.testing.assert_close(walked.values_held, torch.stack([S(θ, E) for θ in thetas]))
    first, second = (looped(S, θ, E) for θ in thetas)
    J = assembled(walked, "E")
    assert apart(J, {name: 0.3 * first[name] + 0.7 * second[name] for name in J}) < 1e-13
    again = assembled(shards(cut(S, params, E), *sides, tokens=20), "U")
    assert apart(again, looped(S, params, E)) < 1e-13


@pytest.mark.parametrize("name", ["Qwen2, tied", "Qwen2, untied", "Gemma3", "gpt-oss", "LoRA"])
def test_weights_in_half_precision_are_float32_at_those_weights(name):
    E, found = ragged(), []
    torch.manual_seed(0)
    half = MODELS[name]().to(torch.bfloat16).eval()
    for model in (half, copy.deepcopy(half).float()):
        apply, params = func.make_functional(model)
        side = Side(E, ((1.0, plain(params)),))
        found.append(assembled(shards(cut(func.sequence_logprob(apply), params, E), side, side), "U"))
    assert apart(*found) == 0.0


def test_a_sequence_is_worth_the_same_in_any_company():
    apply, params = func.make_functional(built("GPT-2"))
    S, batch = func.sequence_logprob(apply), ragged(n=5)
    pieces, source = cut(S, params, batch), plain(params)
    J = assembled(shards(pieces, *[Side(batch, ((1.0, source),))] * 2, tokens=None), "E")
    for i in range(5):
        alone = Side(take(batch, slice(i, i + 1)), ((1.0, source),))
        assert apart(assembled(shards(pieces, alone, alone), "U"), {name: J[name][i : i + 1] for name in J}) < 1e-13
    wide = func.Sequences(*(torch.nn.functional.pad(leaf, (0, 7)) for leaf in batch))
    assert apart(assembled(shards(pieces, *[Side(wide, ((1.0, source),))] * 2), "E"), J) < 1e-13


def test_gradients_of_training_and_of_what_is_detached():
    E = ragged()
    inside = E._replace(input_ids=torch.where(E.input_ids == 5, 0, E.input_ids))  # padding ids inside of sequences
    apply, params = func.make_functional(built("Qwen2, tied"))
    for change in (lambda same: same, with_masked_padding_grad):
        S = func.sequence_logprob(change(apply))
        side = Side(inside, ((1.0, plain(params)),))
        assert apart(assembled(shards(cut(S, params, inside), side, side), "E"), looped(S, params, inside)) < 1e-13
    torch.manual_seed(0)
    dora = lora(of("Qwen2"), "q_proj", use_dora=True).double().eval()
    dora.set_attn_implementation("eager")  # pyright: ignore
    apply, params = func.make_functional(dora)
    for change in (lambda same: same, through_detach):
        S = func.sequence_logprob(change(apply))
        side = Side(E, ((1.0, plain(params)),))
        assert apart(assembled(shards(cut(S, params, E), side, side), "E"), looped(S, params, E)) < 1e-13


def test_a_tied_table_comes_last_with_both_of_its_uses():
    apply, params = func.make_functional(built("Qwen2, tied"))
    S, E = func.sequence_logprob(apply), ragged()
    side = Side(E, ((1.0, plain(params)),))
    *_, last = shards(cut(S, params, E), side, side, tokens=None)
    (handle,) = last.held.values()
    assert isinstance(handle, Sum)
    assert isinstance(handle.parts[0], Head)


def test_layers_share_their_storage():
    apply, params = func.make_functional(built("Qwen2, tied"))
    S, E, U = func.sequence_logprob(apply), ragged(), ragged(1)
    sides = (Side(batch, ((1.0, plain(params)),)) for batch in (E, U))
    places = [
        {tensors(leaf)[0].data_ptr() for leaf in shard.held.values()}
        for shard in shards(cut(S, params, E), *sides)
        if any("layers" in name for name in shard.held)
    ]
    assert len(places) == 3
    assert places[0] == places[1] == places[2]


def test_short_sequences_may_stay_factors():
    apply, params = func.make_functional(of("Qwen2", hidden_size=64, intermediate_size=96).double())
    S, E, U = func.sequence_logprob(apply), ragged(), ragged(1)
    pieces, source = cut(S, params, E), plain(params)
    held = []
    for keep in (True, False):
        sides = (Side(batch, ((1.0, source),)) for batch in (E, U))
        handles = {
            name: handle
            for shard in shards(pieces, *sides, tokens=None, dense=keep)
            for name, handle in shard.held.items()
        }
        held.append(handles["model.layers.0.mlp.up_proj.weight"])
    assert isinstance(held[0], Tensor)
    assert all(isinstance(part, Factored) for part in summands(held[1]))


def test_u_that_nobody_reads_is_walked_all_the_same():
    apply, params = func.make_functional(built("GPT-2"))
    S, E, U = func.sequence_logprob(apply), ragged(), ragged(1)
    sides = [Side(batch, ((1.0, plain(params)),)) for batch in (E, U)]
    *_, last = shards(cut(S, params, E), *sides)
    J = {name: dense(handle) for _, handles in last.streamed for name, handle in handles.items()}
    expected = looped(S, params, U)
    assert apart(J, {name: expected[name] for name in J}) < 1e-13


def test_one_side_twice_is_computed_once():
    apply, params = func.make_functional(built("GPT-2"))
    S, E = func.sequence_logprob(apply), ragged()
    side = Side(E, ((1.0, plain(params)),))
    for shard in shards(cut(S, params, E), side, side):
        assert isinstance(shard, Shard)
        ((rows, handles),) = shard.streamed
        assert rows == slice(0, 4)
        assert all(handles[name] is shard.held[name] for name in shard.held)


def test_a_value_that_is_not_finite_names_its_row():
    apply, params = func.make_functional(built("GPT-2"))
    S, E = func.sequence_logprob(apply), ragged()
    pieces = cut(S, params, E)
    bad = {name: leaf.clone() for name, leaf in params.items()}
    bad["transformer.ln_f.weight"][0] = torch.nan
    with pytest.raises(NonFiniteError, match="sequence 0"):
        shards(pieces, *[Side(E, ((1.0, plain(bad)),))] * 2)


def test_a_kernel_of_shards_is_the_kernel():
    apply, params = func.make_functional(built("GPT-2"))
    S, E, U = func.sequence_logprob(apply), ragged(), ragged(1, 3)
    D = {name: torch.rand_like(leaf) for name, leaf in params.items()}
    sides = [Side(batch, ((1.0, plain(params)),)) for batch in (E, U)]
    K = torch.zeros(4, 3, dtype=torch.float64)
    for shard in shards(cut(S, params, E), *sides, tokens=20):
        diagonal = {name: D[name] for name in shard.held}
        for rows, handles in shard.streamed:
            K[:, rows] += func.contract(shard.held, handles, diagonal=diagonal)
    torch.testing.assert_close(K, fk.kernel(S, params, E, U, fk.precond.diagonal(D)))


_MEASURED = """
import torch, transformers
from fkernel import func
from fkernel.engine.by_layer import Side, shards
from fkernel.func.layers.cutting import cut_of
from fkernel.func.inputs.source import plain
from benchmarks.memory import _forget_peak, _status

torch.set_num_threads(1)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=30000, **shape, tie_word_embeddings=True))
apply, params = func.make_functional(model)
S, batch = func.sequence_logprob(apply), func.pad([[1] * 8] * 3, [[2] * 1500] * 3)
cut, source = cut_of(S, params, batch), plain(params)
_forget_peak()
before = _status("VmRSS")
for shard in shards(cut, Side(batch, ((1.0, source),)), Side(func.Sequences(*batch), ((1.0, source),)), every=2):
    for _, handles in shard.streamed:
        func.contract(shard.held, handles)
print(_status("VmHWM") - before)
"""


@pytest.mark.turns(6)
def test_no_logits_and_no_model_of_gradients_is_held():
    command = [sys.executable, "-c", _MEASURED]
    root = Path(fk.__file__).parent.parent
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=300)
    logits = 1500 * 30000 * 4 / 1e6
    assert float(out.stdout.split()[-1]) < 1.5 * logits  # a backward pass through them holds three of one sequence


def test_half_precision_is_never_computed_with_whole(tmp_path):
    """Only a walk widens weights: whoever cannot walk says so, and nothing is computed in bf16."""
    case = EXAMPLES[1]
    S, params, E, U = case.engine(fk)
    half, P = {name: leaf.bfloat16() for name, leaf in params.items()}, fk.precond.identity()
    for strategy in (fk.Strategy("sequences", "E", None, None, None), fk.Strategy("store", "E", None, None, None)):
        with pytest.raises(fk.TreeError, match="bfloat16"):
            fk.kernel(S, half, E, U, P, strategy=strategy, store=tmp_path)
    with pytest.raises(fk.TreeError, match="bfloat16"):
        fk.low_precision_kernel(S, half, E, U, P)
    with pytest.raises((fk.TreeError, fk.ModelError)):
        fk.kernel(lambda p, x: S.fn(p, x), half, E, U, P)
