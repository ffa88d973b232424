"""A recorded or dumped policy gradient is permuted as the same loss by advantages is: p-values are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fkernel.report.analysis_tables import uncertainty_table
from fkernel.rollout import GeneratedBatch, load_batch, save_batch
from fkernel.study import FisherKernelRunner
from fkernel.study.analyses.exchange import is_policy_gradient

PERMUTED = ("p", "prompt_p", "top_p")
ASKED = {"analyses": {"uncertainty": {"draws": 200}}, "storage": {"persist": False, "pictures": False}}


def weighed(run) -> GeneratedBatch:
    """U with an advantage of every sequence that tells the completions of a prompt apart."""
    U = load_batch(run.update)
    A = torch.linspace(-1.0, 1.3, len(U), dtype=torch.float64)[torch.randperm(len(U))]
    return U.with_values("advantage", A).with_loss_weights("grpo")


def by_tokens(U: GeneratedBatch) -> GeneratedBatch:
    """The same loss by the weights of its tokens, as a recorder notes it."""
    mask = U.sequences.response_mask
    return U.with_token_weights({"loss": -U.weighted_advantages[:, None] * mask})


def studied(run, place, U, loss):
    save_batch(U, place / "update")
    requests = [{"kind": "evaluation", "name": "held_out", "batch_size_prompts": 3}]
    plan = run.plan(place / "out", update={"kind": "from_file", "path": str(place / "update")}, requests=requests)
    step = {key: value for key, value in plan.get("step", {}).items() if key != "loss"}
    return FisherKernelRunner({**plan, **ASKED, "step": {**step, **loss}}).run()["held_out"]


@pytest.mark.turns(6)
@pytest.mark.parametrize("masked", [False, True])
def test_the_p_values_are_those_of_the_loss_by_advantages(run, tmp_path, masked):
    torch.manual_seed(3)
    U = weighed(run)
    if masked:  # a response that was cut off counts for nothing, and its advantage is still one of its prompt's
        U = U.with_values("weight", torch.tensor([0.0 if u == 1 else each.weight for u, each in enumerate(U)]))
    plain = studied(run, tmp_path / "plain", U, {})
    whole = studied(run, tmp_path / "whole", by_tokens(U), {"loss": {"kind": "token_weights"}})
    np.testing.assert_allclose(whole.batch, plain.batch, rtol=1e-4, atol=1e-9)
    found, expected = whole.analysis("uncertainty"), plain.analysis("uncertainty")
    assert found.facts["informative"] == expected.facts["informative"]
    assert any(found.facts["informative"])
    assert "untested" not in found.facts
    assert (expected["prompt_p"] < 1).any()
    for name in PERMUTED:
        np.testing.assert_allclose(
            found[name], expected[name], atol=0.011
        )  # an order of two that are equal but for rounding
    np.testing.assert_allclose(found["error"], expected["error"], rtol=1e-3)


def test_a_loss_that_may_depend_on_signs_is_not_permuted_and_says_so(run, tmp_path):
    torch.manual_seed(3)
    U = weighed(run)
    omega = by_tokens(U).token_weights["loss"].clone()
    first = U.sequences.response_mask[0].nonzero()[0]
    omega[0, first] *= 1.2  # a ratio
    given = U.with_token_weights({"loss": omega})
    assert not is_policy_gradient(given)
    found = studied(run, tmp_path, given, {"loss": {"kind": "token_weights"}})
    assert (found.analysis("uncertainty")["prompt_p"] == 1).all()
    with (console := Console(width=200)).capture() as printed:
        console.print(uncertainty_table(found))
    text = " ".join(printed.get().split())
    assert "the loss may weigh tokens otherwise under other advantages, so none was permuted" in text
    assert "have any to permute" not in text


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda w, tokens, A: w, True),
        (lambda w, tokens, A: w / tokens, True),
        (lambda w, tokens, A: w * torch.where(A > 0, 1.0, 2.0), False),
        (lambda w, tokens, A: -w, False),
    ],
    ids=["one weight a token", "one weight a response", "another weight for what is wrong", "the other sign"],
)
def test_what_is_a_policy_gradient(run, change, same):
    torch.manual_seed(3)
    U = weighed(run)
    mask = U.sequences.response_mask.double()
    w = change(torch.full((len(U),), 0.25, dtype=torch.float64), mask.sum(1), U.advantages.double())
    omega = -(w * U.advantages)[:, None] * mask
    assert is_policy_gradient(U.with_token_weights({"loss": omega})) == same


def test_an_advantage_of_zero_has_no_weights(run):
    U = weighed(run)
    given = by_tokens(U)
    none = replace(given, records=(replace(given.records[0], advantage=0.0), *given.records[1:]))
    assert not is_policy_gradient(none)
