"""A language model in pieces: where it is cut, what is said where it cannot be, and the head by tiles of its table."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fkernel import func
from fkernel.func.handles import head
from fkernel.func.handles.forms import (
    Concat,
    SparseRows,
    Sum,
    add,
    at,
    count,
    is_bounded,
    materialize_into,
    nbytes,
    packed,
    shape_of,
    stack,
)
from fkernel.func.handles.head import Head, deltas, scored
from fkernel.func.inputs.source import moved, plain
from fkernel.func.layers import cutting
from fkernel.func.layers.cut import Cut
from fkernel.func.layers.cutting import cut_of
from tests.models import own

SMALL: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
BATCH = func.pad([[1, 2, 3], [4, 5], [6]], [[7, 8, 9], [10], [11, 12]])


def qwen2(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **changes})).double().eval()


def cut_model(model: nn.Module, select: Any = None, temperature: float = 1.0) -> Cut | str:
    apply, params = func.make_functional(model, select)
    return cut_of(func.sequence_logprob(apply, temperature), params, BATCH)


def refused(model: nn.Module) -> str:
    reason = cut_model(model)
    assert isinstance(reason, str)
    return reason


# -------------------------------------------------------------------------------------------------------------- the cut


def test_a_model_falls_into_its_layers():
    cut = cut_model(qwen2(tie_word_embeddings=True))
    assert isinstance(cut, Cut)
    assert [len(names) for names in cut.names] == [12, 12, 12]
    assert cut.before == ("model.embed_tokens.weight",)
    assert cut.after == ("model.norm.weight",)
    assert cut.tied
    assert cut.lowest == -1
    assert all(plan is not None for plan in cut.plans)


def test_an_untied_head_is_no_table_of_tokens():
    cut = cut_model(qwen2(tie_word_embeddings=False))
    assert isinstance(cut, Cut)
    assert (cut.table, cut.trained, cut.tied) == ("lm_head.weight", True, False)


def test_a_model_of_ones_own_is_cut_too():
    cut = cut_model(own(1))
    assert isinstance(cut, Cut)
    assert set(cut.tables) == {"embed.weight", "position.weight"}


def test_the_models_own_attention_runs():
    model = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "attn_implementation": "sdpa"}))
    cut = cut_model(model)
    assert isinstance(cut, Cut)
    module: Any = cut.module
    assert module.config._attn_implementation == "sdpa"


def test_the_lowest_piece_with_a_trained_parameter_is_known():
    model = qwen2()
    for part, lowest in (("layers.1.", 1), ("model.norm", 3), ("embed_tokens", -1)):
        cut = cut_model(model, lambda name, part=part: part in name)
        assert isinstance(cut, Cut)
        assert cut.lowest == lowest


def test_the_caller_s_module_keeps_its_forwards():
    model = qwen2()
    before = model(BATCH.input_ids).logits
    cut_model(model)
    assert not any("forward" in part.__dict__ for part in model.modules())
    assert torch.equal(model(BATCH.input_ids).logits, before)


def test_a_cut_is_made_once_and_forgotten_with_its_function(monkeypatch):
    apply, params = func.make_functional(qwen2())
    S = func.sequence_logprob(apply)
    cut = cut_of(S, params, BATCH)
    monkeypatch.setattr(cutting, "_cut", None)
    assert cut_of(S, params, func.pad([[1]], [[2]])) is cut
    gone = weakref.ref(S)
    del S, cut
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------------------- refusals


def test_other_functions_are_refused():
    apply, params = func.make_functional(qwen2())
    assert "no weighted sum" in str(cut_of(func.token_entropy(apply), params, BATCH))
    mine = lambda p, ids, mask: apply(p, ids, mask)  # noqa: E731
    assert "make_functional" in str(cut_of(func.sequence_logprob(mine), params, BATCH))
    wide = replace(apply, own_width=True)
    assert "width" in str(cut_of(func.sequence_logprob(wide), params, BATCH))


def test_a_head_with_operations_behind_it_is_refused():
    torch.manual_seed(0)
    gemma2 = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0))
    assert "logits" in refused(gemma2)


class Changed(nn.Module):
    """The tests' own transformer, with one thing done otherwise."""

    def __init__(self, change: str) -> None:
        super().__init__()
        inner: Any = own(1)
        self.inner, self.change = inner, change
        if change == "shared layer":
            inner.blocks[1] = copy.deepcopy(inner.blocks[0])
            inner.blocks[1].qkv.weight = inner.blocks[0].qkv.weight
        if change == "bias":
            inner.head = nn.Linear(8, 13, bias=True).double()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model: Any = self.inner
        t = input_ids.shape[1]
        x = first = model.embed(input_ids) + model.position(torch.arange(t))
        bias = torch.where(torch.ones(t, t, dtype=torch.bool).tril(), 0.0, -1e30).to(x.dtype)
        for block in model.blocks:
            x = block(x, bias + (x.mean() if self.change == "layers see more" else 0.0))
            x = x * 2 if self.change == "between" else x
        if self.change == "behind too":
            x = x + first
        z = model.head(model.norm(x))
        return z.tanh() if self.change == "cap" else z


REASONS = {
    "shared layer": "is shared between layers",
    "bias": "without a bias",
    "between": "one after another",
    "layers see more": "depend on parameters",
    "cap": "logits",
    "behind too": "its pieces",
}


@pytest.mark.parametrize("change", REASONS)
def test_what_a_cut_would_miss_is_a_reason(change):
    assert REASONS[change] in refused(Changed(change))


def test_the_same_without_a_change_is_cut():
    assert isinstance(cut_model(Changed("nothing")), Cut)


def test_pieces_with_other_values_or_gradients_are_refused(monkeypatch):
    model = qwen2()
    right = head.scored
    monkeypatch.setattr(head, "scored", lambda *args: right(*args)._replace(logprobs=1.01 * right(*args).logprobs))
    assert "do not compute what it computes" in refused(model)
    monkeypatch.setattr(head, "scored", lambda *args: right(*args)._replace(slopes=1.01 * right(*args).slopes))
    assert "other gradients" in refused(model)


def test_the_probe_looks_at_a_window_of_long_sequences():
    long = func.pad([[1] * 40, [2] * 90], [[3] * 100, [4] * 5])
    window = cutting._windows(long, long.response_mask)
    assert window.input_ids.shape == (2, cutting.CONTEXT + cutting.PROBED)
    assert window.response_mask.sum(1).tolist() == [cutting.PROBED, 5]
    assert window.attention_mask.sum(1).tolist() == [cutting.CONTEXT + cutting.PROBED, cutting.CONTEXT + 5]


# ------------------------------------------------------------------------------------------------------------- sources


def test_sources_widen_move_and_look_up():
    params = {"w": torch.randn(5, 3).bfloat16(), "b": torch.ones(2, dtype=torch.float64)}
    source = plain(params)
    assert source(["w"])["w"].dtype == torch.float32
    assert source(["b"])["b"] is params["b"]
    δ = {"w": torch.randn(5, 3)}
    path = moved(params, δ, 0.5)
    ids = torch.tensor([[1, 4]])
    assert torch.equal(path.leaf("w", ids), (params["w"].float() + 0.5 * δ["w"])[ids])
    assert torch.equal(path.leaf("b", None), params["b"])


# ------------------------------------------------------------------------------------------------------------- the head


def a_head(n: int = 2, s: int = 3, d: int = 4, v: int = 11, seed: int = 0) -> tuple[Head, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    W, x = torch.randn(v, d, generator=g).double(), torch.randn(n, s, d, generator=g).double()
    targets, omega = torch.randint(v, (n, s), generator=g), torch.randn(n, s, generator=g).double()
    lse = (x @ W.mT / 0.7).logsumexp(-1)
    return Head(targets, omega, lse, x, W.__getitem__, v, 0.7), W


def dense_of(handle: Head, W: torch.Tensor) -> torch.Tensor:
    """G by autograd, one sequence at a time."""
    rows = []
    for x, y, omega in zip(handle.x, handle.targets, handle.omega, strict=True):
        leaf = W.clone().requires_grad_()
        log_p = (x @ leaf.mT / handle.temperature).log_softmax(-1).gather(-1, y[:, None])[:, 0]
        rows.append(torch.autograd.grad((omega * log_p).sum(), leaf)[0])
    return torch.stack(rows)


def test_a_head_forms_its_gradient_by_ranges_of_rows():
    handle, W = a_head()
    G = dense_of(handle, W)
    for start, r in ((0, 11), (3, 5), (10, 1)):
        out = torch.full((2, r, 4), torch.nan, dtype=torch.float64)
        materialize_into(handle, out, start)
        torch.testing.assert_close(out, G[:, start : start + r])
        add(handle, out, start)
        torch.testing.assert_close(out, 2 * G[:, start : start + r])


def test_a_head_is_a_handle_like_any_other():
    handle, W = a_head()
    assert shape_of(handle) == (11, 4)
    assert count(handle) == 2
    assert is_bounded(handle)
    assert not is_bounded(handle._replace(lse=handle.lse * torch.nan))
    rows = SparseRows(torch.tensor([[1, 2], [3, 3]]), torch.randn(2, 2, 4).double(), 11)
    tied, more = Sum((handle, rows)), a_head(seed=1)[0]._replace(rows=handle.rows)
    both = stack([tied, at(tied, slice(1, 2)), more])
    assert isinstance(both, Concat)
    assert count(both) == 5
    out = torch.empty(5, 11, 4, dtype=torch.float64)
    materialize_into(both, out)
    alone = torch.empty(2, 11, 4, dtype=torch.float64)
    materialize_into(rows, alone)
    torch.testing.assert_close(out[:2], dense_of(handle, W) + alone)
    torch.testing.assert_close(out[2], out[1])
    own = packed({"w": both})
    assert nbytes(own) == nbytes({"w": both})
    again = torch.empty_like(out)
    materialize_into(own["w"], again)
    assert torch.equal(again, out)


def test_two_heads_contract_by_tiles(monkeypatch):
    (left, W), (right, _) = a_head(), a_head(n=3, s=5, seed=2)
    right = right._replace(rows=left.rows, lse=(right.x @ W.mT / 0.7).logsumexp(-1))
    D = torch.rand(11, 4).double()
    expected = (dense_of(left, W) * D).flatten(1) @ dense_of(right, W).flatten(1).T
    torch.testing.assert_close(func.contract({"w": left}, {"w": right}, diagonal={"w": D}), expected)


@pytest.mark.parametrize("tile", [1, 64, 1 << 20])
def test_scores_do_not_depend_on_the_tile(tile, monkeypatch):
    handle, W = a_head(n=1, s=7)
    W = 30 * W  # far from flat: most of a tile's sum is shrunk by a later one's largest
    monkeypatch.setattr(head, "LOGITS_BYTES", tile * 8)
    x = handle.x[0].clone().requires_grad_()
    log_p = (x @ W.mT / 0.7).log_softmax(-1).gather(-1, handle.targets[0][:, None])[:, 0]
    slopes = torch.autograd.grad(log_p.sum(), x)[0]
    found = scored(x.detach(), handle.targets[0], W.__getitem__, 11, 0.7)
    torch.testing.assert_close(found.logprobs, log_p.detach())
    torch.testing.assert_close(found.slopes, slopes)
    delta = deltas(handle, 2, 6)
    assert delta.shape == (1, 7, 4)


def test_gpt2_moves_its_positions_with_its_tokens():
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 13, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    cut = cut_model(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).double())
    assert isinstance(cut, Cut)
    assert set(cut.before) == {"transformer.wte.weight", "transformer.wpe.weight"}


_TABLES = """
import torch
from fkernel import func
from fkernel.func.layers.cutting import cut_of
from tests.models import MODELS

apply, params = func.make_functional(MODELS["gpt2"](0))
print(*cut_of(func.sequence_logprob(apply), params, func.pad([[1, 2], [3]], [[4], [5]])).tables)
"""


@pytest.mark.turns(6)
def test_tables_come_in_the_order_of_their_lookup_in_every_process():
    """Ranks gather them in that order; a set would have another one with this seed of hashes."""
    environment = {**os.environ, "PYTHONHASHSEED": "2"}
    command = [sys.executable, "-W", "ignore", "-c", _TABLES]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.stdout.split() == ["transformer.wte.weight", "transformer.wpe.weight"], run.stderr
