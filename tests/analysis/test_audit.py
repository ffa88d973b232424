"""The audit: real AdamW steps of torch's, described rightly and in a dozen wrong ways, each named for what it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

import fkernel as fk
from fkernel import precond, tree
from fkernel.analysis import Audit, Described, audit, described_step

LR, NEXT, WEIGHT_DECAY, MAX_NORM = 1e-3, 10 / 11 * 1e-3, 0.1, 0.05
DECAYED = ("embed", "up", "head")
ONES = {"advantage": 1.0, "kl": 1.0}
Tree = dict[str, torch.Tensor]
Describe = Callable[..., Described]


def policy() -> Tree:
    torch.manual_seed(0)
    shapes = {"embed": (30, 20), "norm": (20,), "up": (40, 20), "head": (12, 40)}
    return {name: (0.5 * torch.randn(shape) + (name == "norm")).double() for name, shape in shapes.items()}


def losses(params: Tree, seed: int) -> dict[str, torch.Tensor]:
    """Two parts of a loss over a batch: rewarded answers, and a penalty that is about a third of it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 30, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 12, (64,), generator=generator)
    A = torch.randn(64, generator=generator, dtype=torch.float64)
    z = torch.tanh((x @ params["embed"]) * params["norm"] @ params["up"].T) @ params["head"].T
    log_p = z.log_softmax(-1)
    return {
        "advantage": -(A * log_p.gather(1, y[:, None]).squeeze(1)).mean(),
        "kl": 0.02 * z.square().sum(1).mean(),
    }


def gradients(params: Tree, seed: int) -> dict[str, Tree]:
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
    parts = losses(leaves, seed)
    pulled = {part: torch.autograd.grad(value, [*leaves.values()], retain_graph=True) for part, value in parts.items()}
    return {part: dict(zip(leaves, g, strict=True)) for part, g in pulled.items()}


def clipped(g: Tree, max_norm: float | None) -> tuple[Tree, float, float]:
    norm = float(tree.norm(g))
    c = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    return tree.scale(c, g), c, norm


def optimizer(params: Tree, lr: float = LR, weight_decay: float = WEIGHT_DECAY, maximize: bool = False) -> Any:
    groups = [
        {"params": [params[name] for name in params if name in DECAYED], "weight_decay": weight_decay},
        {"params": [params[name] for name in params if name not in DECAYED], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), maximize=maximize)


class Run(NamedTuple):
    """A training that has taken some steps: weights, the state of torch's own optimizer, and the next step's batch."""

    params: Tree
    state: dict[str, Any]
    steps: int

    @property
    def parts(self) -> dict[str, Tree]:
        """∇L of the next step, by part of the loss."""
        return gradients(self.params, self.steps)

    def adamw_state(self, lr: float = LR, weight_decay: float = WEIGHT_DECAY) -> precond.AdamWState:
        order = [name for name in self.params if name in DECAYED] + [n for n in self.params if n not in DECAYED]
        entries = {name: self.state["state"][i] for i, name in enumerate(order)}
        own = {name: weight_decay if name in DECAYED else 0.0 for name in self.params}
        made = precond.adamw_init(self.params, lr=lr)
        return replace(
            made,
            step=dict.fromkeys(self.params, self.steps),
            exp_avg={name: entries[name]["exp_avg"] for name in self.params},
            exp_avg_sq={name: entries[name]["exp_avg_sq"] for name in self.params},
            weight_decay=own,
        )

    def describing(self, parts: dict[str, Tree] | None = None, c: float = 1.0, **settings: Any) -> Describe:
        """The step that somebody says was taken, as fkernel computes it; of scales of the parts, all 1 by default."""
        given, state = self.parts if parts is None else parts, self.adamw_state(**settings)

        def describe(scales: Mapping[str, float] = ONES) -> Described:
            own = {part: tree.scale(c * scales[part], g) for part, g in given.items()}
            step = described_step(self.params, own, state)
            g = dict(tree.add(*own.values()))
            torch.testing.assert_close(
                tree.add(*step.batch.values()), precond.adamw_step(self.params, {**g}, state).batch
            )
            return step

        return describe

    def described(self, parts: dict[str, Tree] | None = None, c: float = 1.0, **settings: Any) -> Described:
        return self.describing(parts, c, **settings)()

    def executed(
        self, g: Tree | None = None, dtype: torch.dtype = torch.float64, fresh: bool = False, **settings: Any
    ) -> Tree:
        """The step that torch took: after minus before."""
        before = tree.cast(self.params, dtype)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in before.items()}
        taken = optimizer(leaves, **settings)
        if not fresh:
            state = copy.deepcopy(self.state)
            state["param_groups"] = taken.state_dict()["param_groups"]
            taken.load_state_dict(state)
        given = tree.add(*self.parts.values()) if g is None else g
        for name, leaf in leaves.items():
            leaf.grad = given[name].to(dtype)
        taken.step()
        return {name: leaf.detach().double() - before[name].double() for name, leaf in leaves.items()}


def trained(steps: int = 40) -> Run:
    params = policy()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    taken = optimizer(leaves)
    for step in range(steps):
        g, _, _ = clipped(tree.add(*gradients(leaves, step).values()), MAX_NORM if step % 2 else None)
        for name, leaf in leaves.items():
            leaf.grad = g[name]
        taken.step()
    return Run({name: leaf.detach() for name, leaf in leaves.items()}, copy.deepcopy(taken.state_dict()), steps)


@pytest.fixture(scope="module")
def run() -> Run:
    return trained()


@pytest.fixture(scope="module")
def late(run) -> Run:
    """The same run's state as if it were thousands of steps old: v' hardly depends on one gradient."""
    state = copy.deepcopy(run.state)
    for entry in state["state"].values():
        entry["step"] = torch.tensor(4000.0)
        entry["exp_avg_sq"] *= 25
    return run._replace(state=state, steps=4000)


def whole(run: Run) -> Tree:
    return tree.add(*run.parts.values())


def by_name(decay: float = WEIGHT_DECAY) -> dict[str, Any]:
    """What the optimizer's groups are told apart by."""
    names = [*DECAYED, "norm"]
    return {"lr": dict.fromkeys(names, LR), "weight_decay": {n: decay if n in DECAYED else 0.0 for n in names}}


def kinds(given: Audit) -> list[str]:
    return [each.kind for each in given.findings]


# ----------------------------------------------------------------------------------------------------- right ones


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_that_is_described_rightly_gives_no_finding(run, dtype):
    given = audit(run.described(), run.executed(dtype=dtype), **by_name(), clip=0.5, grad_norm=1.0, next_lr=NEXT)
    assert given.findings == ()
    assert given.fine
    assert given.verdict == "the step is the one described"
    assert given.overall.left < (1e-7 if dtype is torch.float64 else 2e-3)
    for fit in (given.overall, *given.groups.values()):
        told = [value for value in fit.coefficients.values() if value is not None]
        assert len(told) >= 3
        assert all(abs(value - 1) < (1e-7 if dtype is torch.float64 else 2e-3) for value in told)


def test_a_clipped_step_is_described_with_its_factor(run):
    g, c, norm = clipped(whole(run), MAX_NORM)
    assert c < 0.5
    assert audit(run.described(c=c), run.executed(g), clip=c, grad_norm=norm).fine


def test_the_first_step_has_no_momentum_and_a_run_may_have_no_decay():
    first = Run(policy(), {}, 0)
    state = precond.adamw_init(first.params, lr=LR, weight_decay=0.0)
    step = precond.adamw_step(first.params, dict(whole(first)), state)
    given = audit(step, first.executed(fresh=True, weight_decay=0.0))
    assert given.fine
    assert given.overall.coefficients["momentum"] is None
    assert given.overall.coefficients["decay"] is None
    assert given.overall.coefficients["batch"] == pytest.approx(1.0, abs=1e-6)


def test_columns_that_depend_on_each_other_have_no_coefficient_of_their_own(run):
    step = run.described()
    given = audit(step._replace(momentum=tree.scale(2.0, step.batch["kl"])), run.executed())
    assert given.overall.coefficients["kl"] is None
    assert given.overall.coefficients["momentum"] is None
    assert given.overall.coefficients["advantage"] is not None


def test_it_is_the_least_squares_of_whole_vectors(run):
    step, Δ = run.described(), run.executed(tree.scale(1.3, whole(run)))
    columns = [*step.batch.values(), step.momentum, step.decay]
    C = torch.stack([torch.cat([column[name].flatten() for name in Δ]) for column in columns], 1)
    y = torch.cat([leaf.flatten() for leaf in Δ.values()])
    a = torch.linalg.lstsq(C, y[:, None]).solution[:, 0]
    fit = audit(step, Δ).overall
    torch.testing.assert_close(torch.tensor([*fit.coefficients.values()], dtype=torch.float64), a)
    rest = y - C @ a
    assert fit.left == pytest.approx(float(rest.norm() / y.norm()), rel=1e-6)
    covariance = torch.linalg.inv(C.T @ C) * float(rest.square().sum()) / (len(y) - C.shape[1])
    errors = torch.tensor([*fit.errors.values()], dtype=torch.float64)
    torch.testing.assert_close(errors, covariance.diagonal().sqrt())


# --------------------------------------------------------------------------------------------- wrong descriptions

Told = tuple[Describe, Tree, dict[str, Any]]
"""(the step as it is described, of scales; Δθ as torch took it; what else is known)"""


def scaled(k: float) -> Callable[[Run], Told]:
    return lambda run: (run.describing(), run.executed(tree.scale(k, whole(run))), {})


def unclipped(run: Run) -> Told:
    _, c, norm = clipped(whole(run), MAX_NORM)
    return run.describing(c=c), run.executed(), {"clip": c, "grad_norm": norm}


def clipped_after_all(run: Run) -> Told:
    g, _, norm = clipped(whole(run), MAX_NORM)
    return run.describing(), run.executed(g), {"grad_norm": norm}


def without_kl(run: Run) -> Told:
    return run.describing(), run.executed(run.parts["advantage"]), {}


def twice_the_kl(run: Run) -> Told:
    parts = run.parts
    return run.describing(), run.executed(tree.axpy(2.0, parts["kl"], parts["advantage"])), {}


def another_batch(run: Run) -> Told:
    return run.describing(gradients(run.params, 1000)), run.executed(), {}


def other_weights(run: Run) -> Told:
    return trained(run.steps - 25).describing(), run.executed(), {}


def without_momentum(run: Run) -> Told:
    step = run.described()
    return run.describing(), tree.add(*step.batch.values(), step.decay), {}


def miscounted(run: Run) -> Told:
    """AdamW written by hand, without bias correction."""
    early = run.adamw_state()
    early = replace(early, step=dict.fromkeys(early.step, 4))
    late = precond.adamw_step(run.params, dict(whole(run)), early)
    return run.describing(), late.total, {}


def taken(**settings: Any) -> Callable[[Run], Told]:
    return lambda run: (run.describing(), run.executed(**settings), {"lr": LR, "next_lr": NEXT})


WRONG: dict[str, tuple[Callable[[Run], Told], str, str]] = {
    "gradient accumulation twice": (
        scaled(0.5),
        "batch_scale",
        "batch 0.5000: the loss was divided by gradient accumulation twice, or half of the micro-batches are missing",
    ),
    "accumulation of eight, not divided": (
        scaled(8.0),
        "batch_scale",
        "batch 8.0000: the loss was not divided by gradient accumulation, or the described batch is 1/8 of the step's",
    ),
    "another normaliser": (scaled(0.83), "batch_scale", "batch 0.8300: the loss has another scale (its normaliser, "),
    "no gradient at all": (scaled(0.0), "batch_missing", "batch 0.0000: the batch's gradient was not in the step"),
    "the other sign": (
        scaled(-1.0),
        "sign",
        "batch -1.0000: the optimizer maximizes, or the advantages have the other",
    ),
    "clipping was not applied": (unclipped, "clipping", ": gradient clipping was not applied (1/c is "),
    "clipping was applied": (clipped_after_all, "clipping", ": the gradient was clipped, at max_norm 0.05"),
    "the next step's learning rate": (
        taken(lr=NEXT),
        "learning_rate",
        "momentum and batch 0.9091: the learning rate is the next step's",
    ),
    "another learning rate": (
        taken(lr=3 * LR),
        "learning_rate",
        "momentum and batch 3.0000: the learning rate is 3 times the described one",
    ),
    "steps miscounted": (miscounted, "bias_correction", "decay 1.0000: bias correction was left out, or counts other"),
    "no weight decay": (
        taken(weight_decay=0.0),
        "no_decay",
        "decay 0.0000: weight decay was not applied to these parameters",
    ),
    "half the weight decay": (
        taken(weight_decay=WEIGHT_DECAY / 2),
        "decay",
        "decay 0.5000: weight decay was 0.5 times the described one",
    ),
    "a fresh optimizer": (
        taken(fresh=True),
        "reset",
        "every weight moved by one learning rate against its gradient: the optimizer's state was reset",
    ),
    "no momentum": (
        without_momentum,
        "reset",
        "momentum 0.0000: the optimizer's state was reset, or this was its first",
    ),
    "no KL term": (without_kl, "part_missing", "kl 0.0000: the kl term was not in the loss"),
    "twice the KL term": (twice_the_kl, "part_scale", "kl 2.0000: the kl term was 2 times as large in the loss"),
    "another batch": (another_batch, "left", " %: another batch, or other weights ("),
    "other weights": (other_weights, "left", " %: another batch, or other weights ("),
    "nothing moved": (
        lambda run: (run.describing(), tree.zeros_like(run.params), {}),
        "still",
        "no weight moved: the checkpoint after is the one before, or the step is below the weights' precision",
    ),
    "before and after swapped": (
        lambda run: (run.describing(), tree.scale(-1.0, run.executed()), {}),
        "opposite",
        "the executed step is the opposite: before and after are swapped",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_descriptions_are_named(run, name):
    make, kind, sentence = WRONG[name]
    describe, executed, known = make(run)
    given = audit(describe(), executed, respond=describe, **known)
    assert kinds(given) == [kind]
    assert sentence in given.verdict.replace("-0.0000", "0.0000")
    assert not given.fine
    assert json.loads(json.dumps(given.summary(), allow_nan=False))["findings"][0]["kind"] == kind


@pytest.mark.parametrize("name", WRONG)
def test_with_the_optimizers_groups_they_are_told_once(run, name):
    make, kind, _ = WRONG[name]
    describe, executed, known = make(run)
    given = audit(describe(), executed, respond=describe, **{**known, **by_name()})
    assert {*kinds(given)} == {kind}
    if kind in ("no_decay", "decay"):
        assert given.findings[0].group == "lr 0.001, weight decay 0.1"
        assert "(3 parameters, 'embed', 'up' and 1 more): decay" in given.verdict
    elif kind != "left":
        assert [each.group for each in given.findings] == [None]


EARLY_ONLY = ("another batch", "other weights", "accumulation of eight, not divided")
"""The first two are of weights and batches of step 40; a gradient eight times as large changes v at any time."""


@pytest.mark.parametrize("name", [name for name in WRONG if name not in EARLY_ONLY])
def test_late_in_a_run_they_are_named_without_a_response(late, name):
    """One gradient then hardly changes v, and the described columns are enough."""
    make, kind, _ = WRONG[name]
    describe, executed, known = make(late)
    assert kinds(audit(describe(), executed, **known)) == [kind]


def test_a_group_with_a_learning_rate_of_its_own_is_named(run):
    executed = run.executed()
    executed["norm"] = 10 * executed["norm"]
    given = audit(run.described(), executed, **by_name())
    assert kinds(given) == ["learning_rate"]
    assert given.findings[0].group == "lr 0.001, weight decay 0"
    assert "(1 parameters, 'norm'): momentum and batch 10.0000" in given.verdict


def test_a_frozen_group_is_named(run):
    executed = run.executed()
    executed["norm"] = torch.zeros_like(executed["norm"])
    given = audit(run.described(), executed, **by_name())
    assert kinds(given) == ["still"]
    assert given.findings[0].group == "lr 0.001, weight decay 0"


def test_what_float32_rounds_away_is_no_mistake(run):
    """A step of 1e-6 on weights near 1: several per cent of it are rounding, of which the weights tell."""
    describe, trained_as = run.describing(lr=1e-6), tree.cast(run.params, torch.float32)
    executed = run.executed(dtype=torch.float32, lr=1e-6)
    assert kinds(audit(describe(), executed, **by_name())) == ["left"]
    given = audit(describe(), executed, params=trained_as, **by_name())
    assert given.fine
    for fit in (given.overall, *given.groups.values()):
        assert 0.5 * fit.left < fit.rounding < 2 * fit.left
    wrong = run.executed(dtype=torch.float32, lr=2e-6)
    assert kinds(audit(describe(), wrong, params=trained_as, **by_name())) == ["learning_rate"]


def test_weights_that_are_too_coarse_for_the_step(run):
    coarse = tree.cast(run.params, torch.bfloat16)
    after = {name: (leaf.double() + run.executed()[name]).bfloat16() for name, leaf in coarse.items()}
    executed = {name: after[name].double() - coarse[name].double() for name in coarse}
    small = audit(run.described(), executed)
    assert 0.02 < small.overall.moved < 0.98
    given = audit(
        run.described(lr=1e-6), {n: torch.where(torch.rand(x.shape) < 0.02, x, 0.0) for n, x in executed.items()}
    )
    assert kinds(given) == ["precision"]
    assert "of the weights moved of those that the step moves: it is below their precision" in given.verdict


@pytest.mark.parametrize("k", [0.25, 0.5, 3.0])
def test_an_early_step_needs_the_response_to_a_scale(k):
    """In the first steps a scale of the gradient hardly shows in the coefficients; the response to it finds it."""
    early = trained(3)
    describe, executed, _ = scaled(k)(early)
    alone = audit(describe(), executed)
    assert not alone.fine
    assert alone.overall.coefficients["advantage"] != pytest.approx(k, rel=0.1)
    given = audit(describe(), executed, respond=describe)
    assert kinds(given) == ["batch_scale"]
    assert given.overall.coefficients["advantage"] == pytest.approx(k, rel=1e-3)
    assert given.overall.left < 1e-3 < alone.overall.left


def test_the_response_is_not_asked_for_where_nothing_is_off(run):
    def respond(scales: Mapping[str, float]) -> Described:
        raise AssertionError

    assert audit(run.described(), run.executed(), respond=respond).fine


# ------------------------------------------------------------------------------------------------------ bad input


def test_names_that_one_side_lacks_are_findings(run):
    executed = run.executed()
    norm = executed.pop("norm")
    given = audit(run.described(), executed)
    assert kinds(given) == ["names"]
    assert given.verdict == "the executed step lacks 'norm', which the step moves: they are left out"
    given = audit(run.described(), {**executed, "norm": norm, "gate": norm})
    assert given.verdict == "'gate' moved, and the step does not have them: they were trained as well"


def test_what_cannot_be_compared_is_an_error(run):
    step, executed = run.described(), run.executed()
    with pytest.raises(fk.TreeError, match="executed has no parameter of the step, which moves 'embed'"):
        audit(step, {"other": executed["up"]})
    with pytest.raises(
        fk.TreeError, match=r"executed\['up'\] has shape \[20, 40\], step.advantage\['up'\] has \[40, 20\]"
    ):
        audit(step, {**executed, "up": executed["up"].T})
    with pytest.raises(fk.NonFiniteError, match=r"executed\['up'\] holds 800 non-finite"):
        audit(step, {**executed, "up": executed["up"] * float("nan")})
    with pytest.raises(fk.TreeError, match="groups lacks 'norm', which executed has"):
        audit(step, executed, groups=dict.fromkeys(DECAYED, "decayed"))
