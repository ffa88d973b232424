"""Certificates: what the engine checks of itself on the user's own model, and mistakes that only they catch."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fkernel as fk
from fkernel import func, precond
from fkernel.func.trust import comparisons
from fkernel.func.trust.comparisons import NAMES, rows_against_sum
from tests import oracle
from tests.cases import EXAMPLES
from tests.laws import close, rows
from tests.mutants import Mutation, load

DTYPE = torch.float64
GPT2 = EXAMPLES[1]


def computed(package: Any, case: Any) -> dict[str, torch.Tensor]:
    """Everything that the engine computes of a case, with what plain autograd has for it."""
    S, params, E, U = case.engine(package)
    v = {name: 0.05 * leaf for name, leaf in case.tree(7).items()}
    effect, _ = package.explain_step(S, params, E, U, case.weights, case.state(package))
    return {
        "values": package.func.evaluate(S)(params, U),
        "gradients": rows(package.func.per_sequence_grad(S)(params, U)),
        "jvp": package.func.jvp(S)(params, E, v),
        "curvature": package.func.curvature(S)(params, E, v),
        "predicted": effect.predicted,
    }


@pytest.fixture(scope="module")
def right():
    return computed(fk, GPT2)


MISTAKES = [
    (
        "rows",
        Mutation(
            "a captured layer's gradient is twice what it is", "", "func/taps/listening.py",
            "return Factored(right, left) if", "return Factored(right, 2 * left) if",
        ),
    ),
    (
        "rows",
        Mutation(
            "what a pass brings back is a tenth short", "", "func/taps/plan.py",
            "total = tape.values.sum() +", "total = 0.9 * tape.values.sum() +",
        ),
    ),
    (
        "values",
        Mutation(
            "the functional copy has another temperature", "", "func/functional.py",
            "return logits_of(self.module, params, input_ids, attention_mask)",
            "return 1.01 * logits_of(self.module, params, input_ids, attention_mask)",
        ),
    ),
    (
        "company",
        Mutation(
            "S counts the width of its batch", "", "func/logprob.py",
            "return _tokens(apply, temperature, params, batch).sum(1)",
            "return _tokens(apply, temperature, params, batch).sum(1) * (1 + 0.01 * batch.input_ids.shape[1])",
        ),
    ),
    (
        "forward",
        Mutation(
            "fused normalizations in nested forward mode", "", "func/trust/primitives.py",
            "if func in (F.layer_norm, torch.layer_norm):", "if func in ():",
        ),
    ),
    (
        "derivative",
        Mutation(
            "a tenth of the logits is held constant in backward", "", "func/functional.py",
            "return z[:, -t:]", "return 0.9 * z[:, -t:] + 0.1 * z[:, -t:].detach()",
        ),
    ),
]  # fmt: skip
"""(certificate, a mistake that it catches and no other does)."""


@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids=[mistake.name for _, mistake in MISTAKES])
def test_a_mistake_that_only_one_certificate_catches(name, mistake, right):
    """With it: an error, or a warning and the right numbers. Without it, with all others: wrong without a word."""
    mutant = load(mistake)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if name in ("values", "company"):
            with pytest.raises(mutant.ModelError):
                computed(mutant, GPT2)
        else:
            found = computed(mutant, GPT2)
            assert any(issubclass(one.category, mutant.ModelWarning) for one in heard)
            # What is held constant belongs to U's gradients, as it was trained: E's derivative is tried below.
            repaired = {"rows": [*right], "forward": ["jvp", "curvature"], "derivative": []}[name]
            for what in repaired:
                close(found[what], right[what], 1e-6)
    with mutant.func.skip_certificates(name), warnings.catch_warnings():
        warnings.simplefilter("error", mutant.ModelWarning)
        wrong = computed(mutant, GPT2)
    assert any(float((wrong[what] - right[what]).norm() / right[what].norm()) > 1e-3 for what in right)


def test_the_state_certificate_catches_what_calibration_cannot_see():
    """A wrong bias correction: the executed step is wrong in the same way, and agrees with itself."""
    mutant = load(
        Mutation(
            "no bias correction of m",
            "",
            "precond/adaptive.py",
            "return state.lr[name] / (1 - state.beta1[name] ** (state.step[name] + 1))",
            "return state.lr[name]",
        )
    )
    S, params, _, U = GPT2.engine(mutant)
    before = {name: leaf.clone() for name, leaf in params.items()}
    state = GPT2.state(mutant, lr=1e-4, weight_decay=0.0)
    g, _, _ = mutant.loss_gradient(S, params, U, GPT2.weights)
    step = mutant.precond.adamw_step(params, {**g}, state).total
    executed = {name: before[name] + step[name] for name in before}
    assert mutant.state_against_step(step, before, executed).error < 1e-9  # against itself
    optimizer = oracle_step(before, g, state)
    assert mutant.state_against_step(step, before, optimizer).passed is False
    assert fk.state_against_step(step, before, None).passed is None
    assert "self-consistent" in fk.state_against_step(step, before, None).detail


def oracle_step(before, g, state):
    """torch's own AdamW, one step on from a state."""
    leaves = {name: nn.Parameter(leaf.clone()) for name, leaf in before.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for name, leaf in leaves.items():
        optimizer.state[leaf] = {
            "step": torch.tensor(float(state.step[name])),
            "exp_avg": state.exp_avg[name].clone(),
            "exp_avg_sq": state.exp_avg_sq[name].clone(),
        }
        leaf.grad = g[name].clone()
    optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_a_sound_model_passes_all_of_them_without_a_warning(case):
    with warnings.catch_warnings(), func.made_certificates() as made:
        warnings.simplefilter("error")
        computed(fk, case)
    assert {one.name for one in made} == {*NAMES}
    assert all(one.passed for one in made if one.name != "derivative")
    assert all(one.passed is not False for one in made)
    assert all(one.error < 1e-6 for one in made if one.name != "derivative")


def test_certificates_are_made_once_for_a_kind_of_batch_and_again_for_a_wider_one():
    S, params, E, U = GPT2.engine(fk)
    with func.made_certificates() as made:
        func.per_sequence_grad(S)(params, U)
        first = len(made)
        func.per_sequence_grad(S)(params, U)
        func.vjp(S)(params, U, GPT2.weights)
        assert len(made) == first > 0
        func.evaluate(S)(params, func.pad([[1] * 8], [[2] * 8]))
        assert len(made) > first
    assert {one.name for one in func.certificates(S)} == {"rows", "values", "company"}
    del E


def test_certificates_are_left_out_by_name_only():
    S, params, _, U = GPT2.engine(fk)
    with func.skip_certificates("rows", "company"), func.made_certificates() as made:
        func.per_sequence_grad(S)(params, U)
    assert {one.name for one in made} == {"values"}
    with pytest.raises(fk.ModelError, match="no certificate 'everything'; name some of rows, values"):
        func.skip_certificates("everything").__enter__()


class Counting(nn.Module):
    """A model that remembers how often it ran, and lets it show."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.seen = nn.Embedding(7, 4), nn.Linear(4, 7), 0

    def forward(self, input_ids, attention_mask):
        self.seen += 1
        return self.head(self.embed(input_ids)) * (1 + 0.01 * self.seen)


class Bidirectional(nn.Module):
    """Every token sees every other, padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return self.head(x + x.mean(1, keepdim=True))


RAGGED = ([[1, 2], [3]], [[4, 5, 6], [2, 1]])


@pytest.mark.parametrize("model", [Counting, Bidirectional])
def test_a_model_whose_values_depend_on_what_else_is_computed_is_refused(model):
    apply, params = func.make_functional(model().double())
    S = func.sequence_logprob(apply)
    for compute in (func.evaluate(S), func.per_sequence_grad(S)):
        with (
            func.skip_certificates("values"),  # which the first of them fails, too
            pytest.raises(fk.ModelError, match=r"depends on what else is in its batch: .* apart.*own_width=True"),
        ):
            compute(params, func.pad(*RAGGED))


def test_or_every_sequence_gets_its_own_width():
    """Said so, a model that looks at the whole width is right: alone is how it is scored."""
    model = Bidirectional().double()
    apply, params = func.make_functional(model, own_width=True)
    S, U = func.sequence_logprob(apply), func.pad([*RAGGED[0], [6], [2]], [*RAGGED[1], [1, 1], [3, 4]])
    pairs = [([1, 2], [4, 5, 6]), ([3], [2, 1]), ([6], [1, 1]), ([2], [3, 4])]
    expected = oracle.logprobs(model, pairs, 1.0)
    close(S(params, U), expected)
    close(func.evaluate(S, 2)(params, U), expected)
    close(func.evaluate(func.token_logprobs(apply), 2)(params, U).sum(1), expected)
    J = rows(func.per_sequence_grad(S, 3)(params, U))
    loop = torch.stack(
        [torch.cat([g.reshape(-1) for g in oracle.gradient(model, pair, 1.0).values()]) for pair in pairs]
    )
    close(J, loop)
    w = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=DTYPE)
    close(fk.kernel(S, params, U, U, precond.identity(), microbatch=2), loop @ loop.T)
    close(fk.influence(S, params, U, U, precond.identity(), w), loop @ loop.T @ w)


def test_rows_that_add_up_in_no_way_are_an_error():
    def f(p, x):  # a sequence is worth what its batch is wide: rows are not parts of the sum
        return (x @ p["w"]) * (1 + 0.1 * (len(x) > 1))

    with (
        func.skip_certificates("company"),
        pytest.warns(fk.ModelWarning, match="one sequence at a time"),
        pytest.raises(fk.ModelError, match=r"do not add up to its gradient.*treat every sequence by itself"),
    ):
        func.per_sequence_grad(f)({"w": torch.ones(3, dtype=DTYPE)}, torch.randn(4, 3, dtype=DTYPE))


def test_ones_would_miss_what_random_weights_find():
    J = {"w": torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=DTYPE)}  # the sum is right, the rows are not

    def f(p, x):
        return x @ p["w"]

    found = rows_against_sum(f, {"w": torch.zeros(2, dtype=DTYPE)}, torch.eye(2, dtype=DTYPE), J)
    assert found.certificate.passed is False
    assert found.failing == ["w"]


def test_a_forward_pass_that_runs_another_module_s_parameters_is_said():
    """As a patch that closes over the module does: the copy's parameters are then used by nobody."""
    model = Bidirectional().double()
    patched = model.forward
    model.forward = lambda input_ids, attention_mask: patched(input_ids, attention_mask)  # pyright: ignore
    apply, params = func.make_functional(model, own_width=True)
    with pytest.warns(fk.ModelWarning, match="does not depend on any of the 3 parameters.*patched"):
        func.per_sequence_grad(func.sequence_logprob(apply))(params, func.pad(*RAGGED))


def held(p, x):
    """½ of what it says in backward."""
    y = x @ p["w"]
    return y * y.detach()


def straight_through(p, x):
    y = x @ p["w"]
    return y + (torch.tanh(3 * y) - y).detach()


class Halved(torch.autograd.Function):
    """A backward rule that is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 0.5 * grads[0]


def halved(p, x):
    return (x @ Halved.apply(p["w"])).sin()


def unrecorded(p, x):
    with torch.no_grad():
        c = x @ p["w"]
    return (x @ p["w"]) * c.cos()


@pytest.mark.parametrize("f", [held, straight_through, unrecorded])
def test_the_derivative_of_E_looks_through_what_training_holds_constant(f):
    params = {"w": torch.tensor([0.4, -0.3], dtype=DTYPE)}
    E, U = torch.eye(2, dtype=DTYPE), torch.tensor([[1.0, 0.5], [0.2, -1.0]], dtype=DTYPE)
    state, weights = precond.adamw_init(params, lr=1e-4, weight_decay=0.0), torch.tensor([1.0, -0.5], dtype=DTYPE)
    with pytest.warns(fk.ModelWarning, match="holds something constant in its backward pass"):
        effect, step = fk.explain_step(f, params, E, U, weights, state)
    realised = fk.realised_change(f, params, fk.tree.add(params, step.total), E)
    close(effect.predicted, realised, 1e-4)
    backward = torch.func.vmap(torch.func.grad(lambda p, x: f(p, x[None])[0]), (None, 0))(params, U)["w"]
    g, _, _ = fk.loss_gradient(f, params, U, weights)
    close(g["w"], -(weights @ backward))  # U's is what backward() gives


def test_a_custom_backward_rule_cannot_be_looked_through_and_is_said():
    params = {"w": torch.tensor([0.4, -0.3], dtype=DTYPE)}
    E = torch.eye(2, dtype=DTYPE)
    state = precond.adamw_init(params, lr=1e-4, weight_decay=0.0)
    with pytest.warns(fk.ModelWarning) as heard:
        fk.explain_step(halved, params, E, E, torch.ones(2, dtype=DTYPE), state)
    words = " ".join(str(one.message) for one in heard)
    assert "moves otherwise than its derivative says" in words
    assert "custom" in words


def test_no_grad_is_looked_through_too():
    def f(p, x):
        with torch.no_grad():
            c = x @ p["w"]
        return (x @ p["w"]) * c

    params, v, x = ({"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, -1.0])}, torch.eye(2))
    close(func.jvp(func.through_detach(f))(params, x, v), torch.tensor([4.0, -2.0]))
    close(func.per_sequence_grad(func.through_detach(f))(params, x)["w"], torch.diag(torch.tensor([4.0, 2.0])))


def test_a_step_on_weights_that_are_not_finite_is_not_compared():
    def f(p, x):
        return (x @ p["w"]).log()

    params = {"w": torch.tensor([-1.0, 1.0])}
    with pytest.raises(fk.NonFiniteError, match="sequence 0"):
        func.per_sequence_grad(f)(params, torch.eye(2))


def test_a_batch_that_cannot_be_compared_does_not_count_as_certified():
    def f(p, x):
        return (x @ p["w"]).log()

    good = {"w": torch.tensor([1.0, 2.0])}
    with func.made_certificates() as made:
        with pytest.raises(fk.NonFiniteError):
            func.evaluate(f)({"w": torch.tensor([-1.0, 2.0])}, torch.eye(2))
        assert not made
        func.evaluate(f)(good, torch.eye(2))
    assert [one.name for one in made] == ["company"]


def test_a_model_that_takes_one_sequence_only_is_refused_and_an_error_of_f_s_own_is_left_alone():
    def raises(error):
        def f(p, x):
            if len(x) > 1:
                raise error
            return x @ p["w"]

        return f

    for error, kind, words in (
        (RuntimeError("no broadcast"), fk.ModelError, "of two together it fails: no broadcast"),
        (fk.BatchError("these two differ"), fk.BatchError, "^these two differ$"),
    ):
        with pytest.raises(kind, match=words):
            func.evaluate(raises(error))({"w": torch.ones(2)}, torch.eye(2))


def test_one_place_along_the_step_is_there_at_a_time(monkeypatch):
    """θ + s Δθ is as large as θ: the last one is let go before the next is made."""
    places = list[weakref.ref[Any]]()

    def watched(*args: Any) -> Any:
        assert not any(place() is not None for place in places)
        leaves = made(*args)
        places.append(weakref.ref(leaves.trained["w"].untyped_storage()))
        return leaves

    def f(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (x @ params["w"]).sin()

    made = comparisons.leaves_of
    monkeypatch.setattr(comparisons, "leaves_of", watched)
    θ, v = {"w": torch.ones(3, dtype=DTYPE)}, {"w": torch.full((3,), 0.01, dtype=DTYPE)}
    assert comparisons.derivative_against_difference(f, θ, torch.eye(3, dtype=DTYPE), v).passed
    assert len(places) >= 4
