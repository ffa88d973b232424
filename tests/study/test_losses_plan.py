"""A step on another loss than the policy gradient: really taken by torch, and predicted from the plan's `step.loss`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import pytest
import torch
from torch.nn.functional import logsigmoid

import fkernel as fk
from fkernel import checkpoint, func
from fkernel.rollout import GeneratedBatch, load_batch, save_batch
from fkernel.study import (
    FisherKernelPlan,
    FisherKernelResults,
    FisherKernelRunner,
    check_inputs,
    influence_of,
    load_workspace,
)
from tests.study.conftest import MAX_NORM, Run, made, saved

LOW, HIGH, BETA = 0.1, 0.15, 0.3
FAR, NEAR = 1e-3, 1e-4
"""Learning rates: of the step that takes the policy away from U's, and of the one that is explained."""


def by_bytes(prompt: Any, response: str) -> float:
    """A reward that no two responses share."""
    return sum(response.encode()) / 1000


class Second(NamedTuple):
    """A run whose batch is used twice.

    Attributes:
        first: its first step's files; U was sampled at `first.before`.
        one: after a step on U that was far too long.
        pairs: two responses to each of some prompts, sampled at `first.before`.
        place: where steps from `one` are kept.
    """

    first: Run
    one: Path
    pairs: Path
    place: Path

    def step(self, name: str, loss: Callable[[Any], torch.Tensor], start: Path | None = None) -> Path:
        """Take the step from `one`, or another start, by torch, on a loss of the model; once a name."""
        if not (self.place / name).exists():
            model, optimizer, tokenizer = restored(start or self.one)
            taken(model, optimizer, loss, NEAR)
            saved(self.place / name, model, tokenizer)
        return self.place / name

    def plan(self, out: Path, after: Path | None, loss: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
        step = {"max_norm": MAX_NORM, "after": None if after is None else {"path": str(after)}, "loss": loss}
        requests = [
            {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4},
            {"kind": "update", "name": "self"},
        ]
        given = {"checkpoint": {"path": str(self.one)}, "step": step, "requests": requests}
        return self.first.plan(out, **{**given, **changes})

    @property
    def reference(self) -> dict[str, Any]:
        """The policy that sampled; also what penalties and preferences refer to."""
        return {"path": str(self.first.before)}

    def foreign(self) -> dict[str, Any]:
        """U as if `one` had sampled it: what a plan without a loss would have to be given."""
        fingerprint = checkpoint.load(self.one).provenance.fingerprint
        return {"kind": "payload", "batch": replace(self.first.batch, checkpoint=fingerprint)}


def restored(place: Path) -> tuple[Any, torch.optim.AdamW, Any]:
    loaded = checkpoint.load(place)
    optimizer = torch.optim.AdamW(loaded.model.named_parameters(), weight_decay=0.1)
    optimizer.load_state_dict(torch.load(place / "optimizer.pt", weights_only=True))
    return loaded.model, optimizer, loaded.tokenizer


def taken(model: Any, optimizer: torch.optim.AdamW, loss: Callable[[Any], torch.Tensor], lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


def token_logp(model: Any, U: func.Sequences) -> torch.Tensor:
    """[n t−1], of the tokens that follow."""
    return model(U.input_ids).logits[:, :-1].log_softmax(-1).gather(-1, U.input_ids[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Second:
    place = tmp_path_factory.mktemp("second")
    first = made(place / "first")
    model, optimizer, tokenizer = restored(first.before)
    U = first.batch.sequences
    mask, weights = U.response_mask[:, 1:], first.batch.loss_weights
    taken(model, optimizer, lambda m: -(weights * (token_logp(m, U) * mask).sum(1)).sum(), FAR)
    optimizer.param_groups[0]["lr"] = NEAR
    saved(place / "one", model, tokenizer)
    torch.save(optimizer.state_dict(), place / "one" / "optimizer.pt")
    hub = FisherKernelRunner(first.plan(place / "out")).generator
    pairs = hub.generate_update_batch(4, 2, seed=7, reward_cfg=by_bytes, advantage_cfg=None, weight_cfg=None)
    save_batch(pairs, place / "pairs")
    return Second(first, place / "one", place / "pairs", place)


# ------------------------------------------------------------------------------------------ losses as papers write them


def surrogate(second: Second, sequences: bool = False, beta: float = 0.0, corrected: bool = True) -> Callable[..., Any]:
    """−Σ w Σ_t min(r A, clip(r) A) + β Σ w Σ_t k3 (times r), of U, with its own old log-probabilities."""
    batch, U = second.first.batch, second.first.batch.sequences
    mask, A = U.response_mask[:, 1:].bool(), batch.advantages[:, None]
    w = torch.tensor([record.weight for record in batch])[:, None]
    with torch.no_grad():
        old = token_logp(checkpoint.load(second.first.before).model, U)

    def loss(model: Any, only: Any = slice(None)) -> torch.Tensor:
        now = token_logp(model, U)
        log_r = torch.where(mask, now - old, 0.0)
        r = (log_r.sum(1, keepdim=True) / mask.sum(1, keepdim=True) if sequences else log_r).exp()
        each = -torch.min(r * A, r.clamp(1 - LOW, 1 + HIGH) * A)
        if beta:
            d = torch.where(mask, old - now, 0.0)  # the reference is the old policy
            k3 = d.exp() - d - 1
            each = each + beta * k3 * (log_r.exp() if corrected else 1)
        return (w * torch.where(mask, each, 0.0))[only].sum()

    return loss


def preferred(second: Second, beta: float) -> Callable[[Any], Any]:
    """−mean log σ(m), of pairs whose higher reward was chosen."""
    batch = load_batch(second.pairs)
    rewards = batch.rewards.view(-1, 2)
    chosen = torch.arange(0, len(batch), 2) + rewards.argmax(1)
    rejected = torch.arange(0, len(batch), 2) + rewards.argmin(1)
    U, mask = batch.sequences, batch.sequences.response_mask[:, 1:]
    with torch.no_grad():
        base = (token_logp(checkpoint.load(second.first.before).model, U) * mask).sum(1)

    def loss(model: Any) -> torch.Tensor:
        s = (token_logp(model, U) * mask).sum(1) - base
        return -logsigmoid(beta * (s[chosen] - s[rejected])).mean()

    return loss


def executed(plan: dict[str, Any]) -> Any:
    return FisherKernelRunner(plan).run()


def error(result: Any) -> float:
    """Relative error of the prediction."""
    assert result.realised is not None
    return float(np.linalg.norm(result.predicted - result.realised) / np.linalg.norm(result.realised))


def at_start(plan: dict[str, Any]) -> dict[str, Any]:
    """The same plan with all gradients at the checkpoint: the first order."""
    return {**plan, "step": {**plan["step"], "path": "start"}}


RATIO = {"kind": "clipped_ratio", "low": LOW, "high": HIGH}
STRENGTH = 2.0
"""β of the preferences."""
QUIET: dict[str, Any] = {"self_kernel": False, "storage": {"persist": False, "pictures": False}}


def kl(second: Second, corrected: bool = True) -> dict[str, Any]:
    return {"beta": BETA, "reference": second.reference, "corrected": corrected}


def preference(second: Second) -> dict[str, Any]:
    return {"kind": "preference", "beta": STRENGTH, "reference": second.reference}


CASES: dict[str, tuple[Callable[[Second], Any], Callable[[Second], dict[str, Any]]]] = {
    "ratio": (surrogate, lambda s: RATIO),
    "old": (surrogate, lambda s: {**RATIO, "old": s.reference}),
    "sequences": (lambda s: surrogate(s, True), lambda s: {**RATIO, "kind": "sequence_ratio"}),
    "kl": (lambda s: surrogate(s, beta=BETA), lambda s: {**RATIO, "kl": kl(s)}),
    "plain kl": (lambda s: surrogate(s, beta=BETA, corrected=False), lambda s: {**RATIO, "kl": kl(s, False)}),
}


@pytest.fixture(scope="module")
def study(second: Second, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """The step on the clipped surrogate with a penalty, explained with every analysis, and kept."""
    asked = {
        "ledger": True,
        "tokens": {"pairs": [["E-000-00", "U-001-01"]]},
        "parts": True,
        "observables": [{"name": "entropy", "kind": "entropy"}],
        "counterfactuals": [
            {"name": "same", "scale": {"U-000-00": 1.0}},
            {"name": "without", "drop": ["U-000-*"]},
            {"name": "half", "scale": {"*": 0.5}, "max_norm": "none"},
        ],
        "preconditioners": ["identity", "post-step"],
        "uncertainty": {"draws": 50},
        "health": True,
        "structure": {"clusters": 3, "alignment": True},
    }
    after = second.step("kl", surrogate(second, beta=BETA))
    loss = {**RATIO, "kl": kl(second)}
    plan = second.plan(tmp_path_factory.mktemp("losses") / "out", after, loss, analyses=asked)
    results = executed(plan)
    results.save_results(plan["out"])
    return plan, results


# ------------------------------------------------------------------------------------------------- a step really taken


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_loss_is_predicted(second, tmp_path, case):
    loss, plan = CASES[case]
    after = second.step(case.replace("old", "ratio").replace(" ", "-"), loss(second))
    whole = second.plan(tmp_path / "out", after, plan(second), **QUIET)
    results, start = executed(whole), executed(at_start(whole))
    assert results.step["loss"]["clipped"] > 0.1
    assert results.step["clip"] < 1
    without = executed(second.plan(tmp_path / "out", after, None, update=second.foreign(), **QUIET))
    for name in ("held_out", "self"):
        first = error(start[name])
        assert first < 0.03
        assert error(results[name]) < min(0.005, first)
        assert error(without[name]) > 3 * first
        assert error(without[name]) > 0.05


@pytest.mark.parametrize("path", ["midpoint", "start"])
def test_what_each_sequence_did_is_its_share_of_the_loss(second, study, tmp_path, path):
    """C_eu = −c ⟨∇S_e(θ + sΔθ), P ∇L_u(θ)⟩, by plain autograd; Δθ is what the optimizer did."""
    plan, results = study
    model = checkpoint.load(second.one).model
    own = {**plan, "analyses": {}, "out": str(tmp_path), "storage": QUIET["storage"]}
    loss, found = surrogate(second), (results if path == "midpoint" else executed(at_start(own)))["self"]
    moved = [leaf.detach() for leaf in checkpoint.load(plan["step"]["after"]["path"]).model.parameters()]
    U = second.first.batch.sequences
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        P, c = workspace.P, workspace.clip
    names = [name for name, _ in model.named_parameters()]

    def gradient(value):
        return dict(zip(names, torch.autograd.grad(value, [*model.parameters()]), strict=True))

    there = copy.deepcopy(model)
    with torch.no_grad():
        for leaf, after in zip(there.parameters(), moved, strict=True):
            leaf += {"start": 0.0, "midpoint": 0.5}[path] * (after - leaf)
    S = (token_logp(there, U) * U.response_mask[:, 1:]).sum(1)
    e = dict(zip(names, torch.autograd.grad(S[4], [*there.parameters()]), strict=True))
    worst = 0.0
    for u in range(len(second.first.batch)):
        expected = -c * float(fk.tree.dot(e, P(gradient(loss(model, slice(u, u + 1))))))
        atol = 1e-4 * float(np.abs(found.contributions).max())
        assert found.contributions[4, u] == pytest.approx(expected, rel=1e-3, abs=atol)
        worst = max(worst, abs(found.contributions[4, u] - expected))
    if path == "midpoint":  # it is the path that is met, and not the checkpoint nearby
        assert np.abs(found.contributions[4] - executed(at_start(own))["self"].contributions[4]).max() > 5 * worst


def test_old_log_probabilities_are_the_records_or_the_checkpoints(second, tmp_path):
    losses = RATIO, {**RATIO, "old": second.reference}
    one, other = (executed(second.plan(tmp_path, None, loss, **QUIET))["held_out"] for loss in losses)
    np.testing.assert_allclose(one.contributions, other.contributions, rtol=1e-3, atol=1e-7)


def test_the_first_step_from_a_batch_is_the_policy_gradient(second, tmp_path):
    """Ratios are 1, and nothing is clipped; a sequence without advantage has no column."""
    changes = {**QUIET, "checkpoint": second.reference}
    plain, ratio = (executed(second.plan(tmp_path, second.first.after, loss, **changes)) for loss in (None, RATIO))
    assert ratio.step["loss"]["ratio"] == {"min": 1, "mean": 1, "max": 1}
    assert ratio.step["loss"]["clipped"] == 0
    for name in ("held_out", "self"):
        for field in ("contributions", "batch", "momentum", "decay", "realised"):
            a, b = (getattr(results[name], field) for results in (plain, ratio))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())


# ---------------------------------------------------------------------------------------------------------- a penalty


def test_a_penalty_has_a_term_of_its_own(study):
    _, results = study
    found = results["held_out"]
    total = found.batch + found.penalty + found.momentum + found.decay
    np.testing.assert_allclose(found.predicted, total, rtol=1e-6)
    assert np.linalg.norm(found.penalty) > 0.1 * np.linalg.norm(found.realised)
    assert found.calibration["predicted"].relative_error < 0.005
    assert results.step["loss"]["kl"] > 0
    np.testing.assert_allclose(found.contributions.sum(1), found.batch, rtol=1e-4, atol=1e-8)


def test_a_penalty_does_not_depend_on_a_requests_advantages(second, study, tmp_path):
    plan, results = study
    halves = dict(zip(second.first.batch.ids, (second.first.batch.advantages / 2).tolist(), strict=True))
    request = {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4, "advantages": halves}
    found = executed({**plan, "requests": [request], "analyses": {}, "out": str(tmp_path)} | QUIET)["held_out"]
    np.testing.assert_allclose(found.penalty, results["held_out"].penalty, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.batch, results["held_out"].batch / 2, rtol=1e-4, atol=1e-9)


def test_the_policy_gradient_with_a_penalty(second, tmp_path):
    """A first step, with another reference: its penalty is not zero."""
    batch, U = second.first.batch, second.first.batch.sequences
    mask, w = U.response_mask[:, 1:].bool(), torch.tensor([record.weight for record in batch])[:, None]
    with torch.no_grad():
        reference, old = (token_logp(checkpoint.load(x).model, U) for x in (second.one, second.first.before))

    def loss(model: Any) -> torch.Tensor:
        now = token_logp(model, U)
        d = reference - now
        each = -batch.advantages[:, None] * now + BETA * (now - old).exp() * (d.exp() - d - 1)
        return (w * torch.where(mask, each, 0.0)).sum()

    after = second.step("first-kl", loss, second.first.before)
    asked = {"kind": "policy_gradient", "kl": {"beta": BETA, "reference": {"path": str(second.one)}}}
    changes = {**QUIET, "checkpoint": second.reference}
    whole = second.plan(tmp_path / "a", after, asked, **changes)
    results, start = executed(whole), executed(at_start(whole))
    without = executed(second.plan(tmp_path / "b", after, None, **changes))
    for name in ("held_out", "self"):
        first = error(start[name])
        assert first < 0.03
        assert error(results[name]) < min(0.005, first)
        assert error(without[name]) > 3 * first
    assert "clipped" not in results.step["loss"]
    request = {"kind": "update", "advantages": "rloo"}
    own = executed(second.plan(tmp_path / "c", after, asked, **changes, requests=[request]))
    assert own["update"].penalty is not None  # signs may change: nothing here depends on them


# -------------------------------------------------------------------------------------------------------- preferences


@pytest.fixture(scope="module")
def preferences(second: Second, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    after = second.step("dpo", preferred(second, STRENGTH))
    update = {"kind": "from_file", "path": str(second.pairs)}
    plan = second.plan(tmp_path_factory.mktemp("dpo") / "out", after, preference(second), update=update)
    return plan, executed(plan)


def test_a_step_on_preferences_is_predicted(preferences):
    plan, results = preferences
    start = executed({**at_start(plan), "storage": QUIET["storage"]})
    for name in ("held_out", "self"):
        first = error(start[name])
        assert first < 0.03
        assert error(results[name]) < min(0.005, first)


def test_what_a_step_does_to_both_responses_is_readable(second, preferences):
    _, results = preferences
    found, pairs = results["self"], results.step["loss"]["pairs"]
    batch = load_batch(second.pairs)
    U, mask = batch.sequences, batch.sequences.response_mask[:, 1:]
    with torch.no_grad():
        now, base = ((token_logp(checkpoint.load(x).model, U) * mask).sum(1) for x in (second.one, second.first.before))
    place = {name: row for row, name in enumerate(batch.ids)}
    weights = torch.zeros(len(batch))
    for pair in pairs:
        c, r = place[pair["chosen"]], place[pair["rejected"]]
        assert batch.rewards[c] > batch.rewards[r]
        margin = float(STRENGTH * ((now - base)[c] - (now - base)[r]))
        assert pair["margin"] == pytest.approx(margin, abs=1e-4)
        weights[c] = STRENGTH / len(pairs) / (1 + np.exp(margin))
        weights[r] = -weights[c]
    assert len(pairs) == 4
    expected = found.kernel * (results.step["clip"] * weights).numpy()
    np.testing.assert_allclose(found.contributions, expected, rtol=1e-4, atol=1e-8)
    for pair in pairs:  # a step on DPO's loss raises the margin; each response may go either way
        c, r = found.row(pair["chosen"]), found.row(pair["rejected"])
        assert found.batch[c] > found.batch[r]
        assert {found.update[found.column(pair["chosen"])].advantage} == {1.0}


def test_pairs_may_be_named_and_shared(second, preferences, tmp_path):
    plan, results = preferences
    pairs = [[pair["chosen"], pair["rejected"]] for pair in results.step["loss"]["pairs"]]
    named = {**preference(second), "pairs": pairs}
    again = executed({**plan, "step": {**plan["step"], "loss": named}, "out": str(tmp_path / "a")} | QUIET)
    np.testing.assert_allclose(again["held_out"].batch, results["held_out"].batch, rtol=1e-4, atol=1e-9)
    twice = {**named, "pairs": [*pairs, pairs[0]]}
    found = executed({**plan, "step": {**plan["step"], "loss": twice}, "out": str(tmp_path / "b")} | QUIET)
    weight = {info.id: info.weight for info in found.update}
    once = {info.id: info.weight for info in results.update}
    assert weight[pairs[0][0]] == pytest.approx(2 * 4 / 5 * once[pairs[0][0]], rel=1e-4)
    assert weight[pairs[1][0]] == pytest.approx(4 / 5 * once[pairs[1][0]], rel=1e-4)


def test_pairs_may_be_written_in_a_plan(second, tmp_path):
    samples = [{"prompt": "3+4=", "response": text, "reward": reward} for text, reward in (("7", 1.0), ("8", 0.0))]
    update = {"kind": "payload", "samples": samples}
    found = executed(second.plan(tmp_path, None, preference(second), update=update, **QUIET))
    (pair,) = found.step["loss"]["pairs"]
    assert [info.response for info in found.update if info.id == pair["chosen"]] == ["7"]


def test_pairs_may_be_drawn(second, tmp_path):
    draw = {"kind": "update", "batch_size_prompts": 3, "completions_per_prompt": 2, "weights": None}
    update = {**draw, "reward": "tests.study.test_losses_plan.by_bytes", "advantage": None}
    plan = second.plan(tmp_path, None, preference(second), update=update)
    found = executed(plan)
    assert len(found.step["loss"]["pairs"]) == 3
    again = FisherKernelRunner(plan)
    np.testing.assert_array_equal(again.run()["self"].contributions, found["self"].contributions)
    assert again.workspace is not None
    assert again.workspace.gradients.computed == 0


def test_the_record_of_preferences_reproduces_them(preferences):
    """What is read back has weights that the loss has set; it is the same U."""
    plan, results = preferences
    batch = load_batch(plan["update"]["path"])
    runner = FisherKernelRunner({**plan, "update": {"kind": "payload", "batch": batch}})
    record = runner.plan.record()
    assert record["update"]["path"].endswith("workspace/batch")
    for asked in ({**plan, "update": {"kind": "payload", "batch": batch}}, record):
        again = FisherKernelRunner(asked)
        np.testing.assert_array_equal(again.run()["held_out"].contributions, results["held_out"].contributions)
        assert again.workspace is not None
        assert again.workspace.gradients.computed == 0


def unrewarded(batch: GeneratedBatch) -> GeneratedBatch:
    return replace(batch, records=tuple(replace(record, reward=None) for record in batch))


@pytest.mark.parametrize(
    ("change", "pairs", "message"),
    [
        (lambda b: b.clone_with_subset(b.ids[:3]), None, "one has 1: 'U-001-00'"),
        (lambda b: b.with_values("reward", torch.ones(8)), None, "U-000-00 and U-000-01 have the same reward, 1"),
        (
            unrewarded,
            None,
            "8 of 8 sequences have no reward",
        ),
        (lambda b: b, [["U-000-00", "U-000-01"]], "is in no pair"),
        (lambda b: b, [["U-000-00", "U-001-01"]], "answer different prompts"),
        (lambda b: b, [["U-000-00", "U-9"]], "There is no sequence 'U-9'"),
    ],
)
def test_pairs_that_cannot_be_told_are_said(second, tmp_path, change, pairs, message):
    batch = change(load_batch(second.pairs))
    loss = {**preference(second), "pairs": pairs}
    with pytest.raises(fk.RolloutError, match=message):
        executed(second.plan(tmp_path, None, loss, update={"kind": "payload", "batch": batch}, **QUIET))


# ----------------------------------------------------------------------------------------------------------- analyses


@pytest.fixture(scope="module")
def firsts(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same study at the checkpoint, without analyses."""
    plan, _ = study
    out = str(tmp_path_factory.mktemp("firsts") / "out")
    return executed(at_start({**plan, "analyses": {}, "storage": QUIET["storage"], "out": out}))


@pytest.mark.parametrize("name", ["held_out", "self"])
def test_analyses_are_of_the_loss(second, study, firsts, name):
    _, results = study
    found = results[name]
    ledger = found.analysis("ledger")
    parts = ("unclipped", "clipping", "momentum", "decay", "remainder")
    np.testing.assert_allclose(sum(ledger[part] for part in parts), found.realised, rtol=0, atol=1e-9)
    assert ledger.facts["error"] < 0.005
    for kind in ("kind", "layer"):
        np.testing.assert_allclose(
            found.analysis("parts")[f"{kind}_contributions"].sum(0), found.contributions, rtol=1e-4, atol=1e-9
        )
    same, half = (found.analysis(f"counterfactuals.{name}") for name in ("same", "half"))
    first = firsts[name]
    np.testing.assert_allclose(same["exact"], first.predicted, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(same["frozen"], first.predicted, rtol=1e-4, atol=1e-8)
    bent = np.linalg.norm(same["curvature"])
    assert np.linalg.norm(same["exact"] + same["curvature"] - found.predicted) < 0.1 * bent
    assert half.facts["clip"] == 1
    c = found.analysis("counterfactuals.without").facts["clip"] / results.step["clip"]
    rest = first.contributions[:, 3:].sum(1) * c + first.penalty * c + first.momentum + first.decay
    np.testing.assert_allclose(found.analysis("counterfactuals.without")["frozen"], rest, rtol=1e-3, atol=1e-7)
    entropy = found.analysis("observables.entropy")
    predicted = sum(entropy[part] for part in ("batch", "penalty", "momentum", "decay"))
    assert np.linalg.norm(predicted - entropy["realised"]) < 0.02 * np.linalg.norm(entropy["realised"])
    assert found.analysis("preconditioners").facts["agreement"]["post-step"]["of_batch"] > 0.999
    np.testing.assert_allclose(found.analysis("tokens")["logprob"].sum(1), found.predicted, rtol=1e-3, atol=1e-7)
    if name == "held_out":
        pair, u = found.analysis("tokens")["pair_0"], found.column("U-001-01")
        np.testing.assert_allclose(pair.sum(), found.contributions[0, u], rtol=1e-3)
        along, there = found.contributions[0, u], first.contributions[0, u]
        assert abs(pair.sum() - along) < 0.2 * abs(there - along)  # it is the path that is met, not the checkpoint
    sure = found.analysis("uncertainty")
    assert (sure["low"] <= sure["high"]).all()
    assert (sure["p"] == 1).all()
    assert (sure["top_p"] == 1).all()
    assert sure.facts["informative"] == [False] * 3


def test_u_itself_is_of_the_losss_columns(study):
    _, results = study
    assert 0.9 < results.analysis("structure").facts["alignment"] <= 1
    assert results.self_kernel.kernel[6:].any() == False  # noqa: E712 - no advantage, no column
    assert (results["self"].squared_norms > 0).all()  # rows are ∇S


# ----------------------------------------------------------------------------------------------------------- workspaces


def test_a_workspace_keeps_what_the_loss_made(second, study):
    plan, results = study
    again = FisherKernelRunner(plan)
    found = again.run()
    assert again.workspace is not None
    assert again.workspace.gradients.computed == 0
    assert found.step == results.step
    for name in ("batch", "penalty", "contributions", "realised"):
        np.testing.assert_array_equal(getattr(found["held_out"], name), getattr(results["held_out"], name))
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        assert workspace.loss is not None
        assert workspace.loss.facts == results.step["loss"]
        assert workspace.batch.checkpoint == checkpoint.load(second.first.before).provenance.fingerprint
        with pytest.raises(fk.PlanError, match="of the loss clipped_ratio, and not ∇S"):
            influence_of(workspace)


def test_a_workspace_in_memory_with_a_loss_can_be_written(second, study, tmp_path):
    from fkernel.study import serialize_workspace

    plan, results = study
    runner = FisherKernelRunner({**plan, "storage": QUIET["storage"]})
    with runner.prepare_update_workspace() as workspace:
        serialize_workspace(workspace, tmp_path / "kept")
    with load_workspace(tmp_path / "kept") as again:
        assert again.loss is not None
        assert again.loss.ratio is not None
        np.testing.assert_allclose(again.self_kernel(), results.self_kernel.kernel, rtol=1e-3, atol=1e-9)
        with pytest.raises(fk.PlanError, match="changes its sign"):
            again.weights_with({"U-000-00": 1.0})


def test_what_is_saved_is_what_is_read(study):
    plan, results = study
    read = FisherKernelResults.load(plan["out"])
    np.testing.assert_array_equal(read["held_out"].penalty, results["held_out"].penalty)
    assert read.step["loss"] == results.step["loss"]
    row = json.loads((Path(plan["out"]) / "results.json").read_text())["requests"]["held_out"]["evaluation"][0]
    assert row["penalty"] == pytest.approx(float(results["held_out"].penalty[0]))


def test_damage_to_what_the_loss_made_is_never_served(study, tmp_path):
    import shutil

    plan, _ = study
    place = tmp_path / "copy"
    shutil.copytree(f"{plan['out']}/workspace", place)
    content = bytearray((place / "loss.safetensors").read_bytes())
    content[len(content) // 2] ^= 0x41
    (place / "loss.safetensors").write_bytes(content)
    with pytest.raises(fk.StoreError, match="is not what was written"):
        load_workspace(place)


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_was_cut_off_goes_on(second, study, tmp_path, monkeypatch, after):
    from fkernel.engine.store import Store

    plan, results = study
    plan = {**plan, "numerics": {"microbatch": 2}, "out": str(tmp_path), "analyses": {}, "self_kernel": False}
    write, written = Store.write, []

    def stopping(self, i, handles):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(i)
        write(self, i, handles)

    monkeypatch.setattr(Store, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        executed(plan)
    monkeypatch.setattr(Store, "write", write)
    runner = FisherKernelRunner(plan)
    found = runner.run()["held_out"]
    np.testing.assert_allclose(found.batch, results["held_out"].batch, rtol=1e-3, atol=1e-7)
    assert runner.workspace is not None
    assert 0 < runner.workspace.gradients.computed < 9


def test_a_workspace_of_another_loss_is_not_served(second, study, tmp_path):
    plan, _ = study
    at = {"workspace": f"{plan['out']}/workspace", "pictures": False}
    others = {
        "low": {**RATIO, "low": 0.2, "kl": kl(second)},
        "kl": RATIO,
        "policies": {**RATIO, "kl": {**kl(second), "reference": {"path": str(second.one)}}},
    }
    for key, loss in others.items():
        changed = {**plan, "step": {**plan["step"], "loss": loss}, "storage": at, "out": str(tmp_path / key)}
        with pytest.raises(fk.StoreError, match=rf"is of something else: (.*; )?loss\.{key}"):
            executed(changed)
    changed = {**plan, "step": {**plan["step"], "loss": None}, "storage": at, "update": second.foreign()}
    with pytest.raises(fk.StoreError, match=r"is of something else: .*loss"):
        executed({**changed, "out": str(tmp_path / "none")})


def test_without_a_loss_nothing_is_asked_that_was_not(second, tmp_path):
    runner = FisherKernelRunner(second.first.plan(tmp_path))
    with runner.prepare_update_workspace() as workspace:
        assert workspace.loss is None
        known = ["checkpoint", "parameters", "optimizer", "update", "temperature", "dtype", "preconditioner", "step"]
        known += ["files"]
        assert sorted({*workspace.asked} - {"schema", "seal", "padding"}) == sorted(known)
        assert workspace.asked["step"] == {"max_norm": MAX_NORM, "clip": None}
    assert sorted(path.name for path in (tmp_path / "workspace").iterdir()) == [
        "asked.json",
        "batch",
        "complete.json",
        "gradients",
        "lock",
        "response.safetensors",
    ]
    assert set(json.loads((tmp_path / "workspace" / "complete.json").read_text())) == {
        "batch",
        "clip",
        "grad_norm",
        "sha256",
        "seal",
    }


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"requests": [{"kind": "update", "advantages": {"U-000-01": -1.0}}]},
            "advantage of U-000-01 is 0.015873, and",
        ),
        ({"requests": [{"kind": "update", "advantages": {"U-002-00": 1.0}}]}, "advantage of U-002-00 is 0, and"),
        ({"analyses": {"counterfactuals": [{"name": "a", "flip": ["U-001-*"]}]}}, "changes its sign"),
        ({"analyses": {"counterfactuals": [{"name": "a", "scale": {"U-000-00": -2.0}}]}}, "changes its sign"),
        ({"analyses": {"counterfactuals": [{"name": "a", "advantages": "raw"}]}}, "changes its sign"),
    ],
)
def test_advantages_that_change_their_signs_are_refused(second, tmp_path, changes, message):
    after = second.step("ratio", surrogate(second))
    with pytest.raises(fk.PlanError, match=message):
        executed(second.plan(tmp_path, after, RATIO, **{**QUIET, **changes}))


def test_only_u_may_be_of_another_policy(second, tmp_path):
    request = {"kind": "from_file", "path": str(second.first.update)}
    with pytest.raises(fk.RolloutError, match="another policy's"):
        executed(second.plan(tmp_path, None, RATIO, requests=[request], **QUIET))
    asked = {"kind": "policy_gradient", "kl": kl(second)}
    for loss in (None, asked):
        with pytest.raises(fk.RolloutError, match="another policy's"):
            executed(second.plan(tmp_path, None, loss, **QUIET))
        update = {"kind": "payload", "batch": second.first.batch}
        with pytest.raises(fk.PlanError, match="another policy's"):
            executed(second.plan(tmp_path, None, loss, update=update, **QUIET))


def test_old_is_the_policy_that_sampled(second, tmp_path):
    loss = {**RATIO, "old": {"path": str(second.one)}}
    with pytest.raises(fk.PlanError, match=r"step.loss.old is the checkpoint .* and U was written by"):
        executed(second.plan(tmp_path, None, loss, **QUIET))
    unknown = {"kind": "payload", "batch": replace(second.first.batch, checkpoint=None)}
    with pytest.raises(fk.RolloutError, match="Was it sampled from another checkpoint"):
        executed(second.plan(tmp_path, None, loss, update=unknown, **QUIET))
    known = [executed(second.plan(tmp_path, None, RATIO, **QUIET, **given)) for given in ({}, {"update": unknown})]
    np.testing.assert_array_equal(known[0]["held_out"].batch, known[1]["held_out"].batch)


@pytest.mark.filterwarnings("ignore:The sequences were sampled at temperature")
def test_records_are_no_log_probabilities_of_another_temperature(second, tmp_path):
    changes = {**QUIET, "numerics": {"temperature": 0.7}}
    with pytest.raises(fk.PlanError, match=r"at temperature 0.7, and U's records have them at 1; give step.loss.old"):
        executed(second.plan(tmp_path, None, RATIO, **changes))
    loss = {**RATIO, "old": second.reference}
    cold = executed(second.plan(tmp_path, None, loss, **changes))
    warm = executed(second.plan(tmp_path, None, loss, **QUIET))
    assert cold.step["loss"]["ratio"]["max"] > warm.step["loss"]["ratio"]["max"]


def test_loss_weights_below_zero_are_said(second, tmp_path):
    weights = torch.tensor([record.weight for record in second.first.batch])
    weights[3] *= -1
    update = {"kind": "payload", "batch": second.first.batch.with_values("weight", weights)}
    with pytest.raises(fk.RolloutError, match="these have w < 0: 'U-001-00'"):
        executed(second.plan(tmp_path, None, RATIO, update=update, **QUIET))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "ppo"}, "clipped_ratio"),
        ({"kind": "policy_gradient"}, "Field required"),
        ({"kind": "clipped_ratio", "low": 1.5}, "less than or equal to 1"),
        ({"kind": "clipped_ratio", "epsilon": 0.2}, "Extra inputs"),
        ({"kind": "sequence_ratio", "kl": {"beta": 0.1, "reference": {"path": "x"}}}, "say kl: {corrected: false}"),
        ({"kind": "preference", "beta": 0.0, "reference": {"path": "x"}}, "greater than 0"),
        ({"kind": "preference", "beta": 0.1}, "Field required"),
    ],
)
def test_mistakes_in_a_plan_are_said(second, tmp_path, loss, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        FisherKernelPlan.model_validate(second.plan(tmp_path, None, loss))


def test_a_draw_has_no_old_policy(second, tmp_path):
    draw = {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": None}
    with pytest.raises(pydantic.ValidationError, match=r"step.loss.old sampled U, and .* draws another U"):
        FisherKernelPlan.model_validate(second.plan(tmp_path, None, {**RATIO, "old": second.reference}, update=draw))


def test_missing_policies_are_said_with_their_place(second, tmp_path):
    gone = {"path": "nowhere"}
    loss = {**RATIO, "old": gone, "kl": {"beta": 0.1, "reference": gone}}
    with pytest.raises(fk.PlanError) as caught:
        check_inputs(FisherKernelPlan.model_validate(second.plan(tmp_path, None, loss)))
    assert str(caught.value).splitlines() == [
        f"step.loss.{place}.path: there is nothing at nowhere; expected a file or a directory."
        for place in ("old", "kl.reference")
    ]
