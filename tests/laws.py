"""The laws of the engine. Each takes the package (the real one, or a mutant) and a case, and asserts.

They hold in float64: identities to 1e-10, central differences to 1e-6 (curvature 1e-4). The oracle they are compared
with imports nothing from the library.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fkernel.engine.by_layer
import fkernel.func.layers.cutting  # noqa: F401
from tests import oracle
from tests.cases import Case

IDENTITY = 1e-10
Law = Callable[[Any, Case], None]


def close(actual: Tensor, expected: Tensor, tolerance: float = IDENTITY, floor: float = 1e-300) -> None:
    """Assert ‖actual − expected‖ ≤ tolerance · ‖expected‖."""
    error = float((actual - expected).norm())
    size = max(float(expected.norm()), floor)
    assert error <= tolerance * size, f"relative error {error / size:.2e} exceeds {tolerance:.0e}"


def close_trees(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = IDENTITY) -> None:
    assert list(actual) == list(expected)
    close(flat(actual), flat(expected), tolerance)


def flat(x: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in x.values()])


def rows(J: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in J.values()], dim=1)


def gradients_equal_a_loop_of_autograd(fk: Any, case: Case) -> None:
    S, params, _, U = case.engine(fk)
    J = fk.func.per_sequence_grad(S, case.microbatch)(params, U)
    loop = [oracle.gradient(case.model, pair, case.temperature) for pair in case.U]
    for i, expected in enumerate(loop):
        close_trees({name: leaf[i] for name, leaf in J.items()}, expected)
    g = fk.func.vjp(S, case.microbatch)(params, U, case.weights)
    close(flat(g), case.weights @ torch.stack([flat(x) for x in loop]))


def derivatives_agree_with_central_differences(fk: Any, case: Case) -> None:
    S, params, E, U = case.engine(fk)
    v, h = case.tree(11), 1e-5

    def at(amount: float, pairs: list[oracle.Pair]) -> Tensor:
        return oracle.logprobs(oracle.moved(case.model, v, amount), pairs, case.temperature)

    jvp = fk.func.jvp(S, case.microbatch)
    close(jvp(params, E, v), (at(h, case.E) - at(-h, case.E)) / (2 * h), 1e-6)
    slopes = case.weights * (at(h, case.U) - at(-h, case.U)) / (2 * h)
    error = flat(fk.func.vjp(S)(params, U, case.weights)) @ flat(v) - slopes.sum()
    assert abs(float(error)) <= 1e-6 * float(slopes.norm()), f"of the sum, whose terms may cancel: {float(error):.2e}"
    plus, minus = ({name: p + s * h * v[name] for name, p in params.items()} for s in (1, -1))
    second = (jvp(plus, E, v) - jvp(minus, E, v)) / (2 * h)
    close(fk.func.curvature(S, case.microbatch)(params, E, v), second, 1e-4)


def influence_equals_kernel_times_weights(fk: Any, case: Case) -> None:
    S, params, E, U = case.engine(fk)
    P = fk.precond.diagonal({name: leaf.abs() + 0.1 for name, leaf in case.tree(12).items()})
    J_E, J_U = (fk.func.per_sequence_grad(S)(params, batch) for batch in (E, U))
    expected = fk.func.contract(J_E, P(J_U)) @ case.weights
    J_E_P_JtA = fk.func.jvp(S)(params, E, P(fk.func.vjp(S)(params, U, case.weights)))
    close(J_E_P_JtA, expected)
    close(fk.influence(S, params, E, U, P, case.weights, microbatch=case.microbatch), expected)
    K = fk.kernel(S, params, E, U, P, microbatch=case.microbatch)
    close(K @ case.weights, expected)
    close(rows(J_E) @ rows(P(J_U)).T, K)
    shards = [left @ right.T for _, left, right in fk.tree.shards(J_E, P(J_U), columns=5)]
    close(torch.stack(shards).sum(0), K)


def held_gradients_give_what_passes_give(fk: Any, case: Case) -> None:
    """Jᵀw and the norms of handles are those of another pass, whatever the handles are made of."""
    S, params, _, U = case.engine(fk)
    D = {name: leaf.abs() + 0.1 for name, leaf in case.tree(15).items()}
    J = rows(fk.func.per_sequence_grad(S)(params, U))
    handles = fk.func.per_sequence_handles(S, case.microbatch)(params, U)
    close_trees(fk.func.weighted_sum(handles, case.weights), fk.func.vjp(S)(params, U, case.weights))
    plain, weighted = fk.func.squared_norms(handles, diagonal=D)
    close(plain, J.square().sum(1))
    close(weighted, J.square() @ flat(D))
    close(fk.func.squared_norms(handles).weighted, plain)
    # Models this small are written out; factors and rows are taken apart by themselves.
    draw = torch.Generator().manual_seed(case.seed)
    a, delta, moves = (torch.randn(3, 4, k, generator=draw, dtype=torch.float64) for k in (5, 6, 5))
    ids, w = torch.randint(6, (3, 4), generator=draw), torch.randn(3, generator=draw, dtype=torch.float64)
    dense = torch.einsum("nto,nti->noi", delta, a)
    for n, t in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        dense[n, ids[n, t]] += moves[n, t]
    tied = {"w": fk.func.Sum((fk.func.Factored(a, delta), fk.func.SparseRows(ids, moves, 6)))}
    close(fk.func.weighted_sum(tied, w)["w"], torch.einsum("n,noi->oi", w, dense))
    close(fk.func.squared_norms(tied).plain, dense.square().sum((1, 2)))


def self_kernel_is_symmetric_and_positive_semidefinite(fk: Any, case: Case) -> None:
    S, params, _, U = case.engine(fk)
    P = fk.precond.diagonal({name: leaf.abs() for name, leaf in case.tree(13).items()})
    K = fk.kernel(S, params, U, U, P, microbatch=case.microbatch)
    close(K, K.T)
    assert float(torch.linalg.eigvalsh((K + K.T) / 2)[0]) >= -IDENTITY * float(K.diagonal().max())


def company_changes_nothing(fk: Any, case: Case) -> None:
    """Padding, microbatch size, batch order and batch companions change no value."""
    S, params, _, U = case.engine(fk)
    v = case.tree(14)
    gradient, jvp, curvature = fk.func.per_sequence_grad(S), fk.func.jvp(S), fk.func.curvature(S)
    wider = fk.func.Sequences(
        torch.nn.functional.pad(U.input_ids, (0, 3), value=1),
        torch.nn.functional.pad(U.attention_mask, (0, 3)),
        torch.nn.functional.pad(U.response_mask, (0, 3)),
    )
    wider = fk.func.Sequences(*(leaf[:, :16] for leaf in wider))
    order = torch.arange(len(case.U)).flip(0)
    shuffled = fk.func.Sequences(*(leaf[order] for leaf in U))
    for fn in (S, lambda p, b: rows(gradient(p, b)), lambda p, b: jvp(p, b, v), lambda p, b: curvature(p, b, v)):
        whole = fn(params, U)
        close(fn(params, wider), whole)
        close(fn(params, shuffled), whole[order])
        for i, pair in enumerate(case.U):
            close(fn(params, case.batch(fk, [pair])), whole[i : i + 1])
    for size in (1, 2, case.microbatch):
        close(rows(fk.func.per_sequence_grad(S, size)(params, U)), rows(gradient(params, U)))
        close(fk.func.jvp(S, size)(params, U, v), jvp(params, U, v))
        close(fk.func.curvature(S, size)(params, U, v), curvature(params, U, v))
        whole = fk.func.vjp(S)(params, U, case.weights)
        close_trees(fk.func.vjp(S, size)(params, U, case.weights), whole)


def left_padding_is_refused(fk: Any, case: Case) -> None:
    S, params, _, U = case.engine(fk)
    left = fk.func.Sequences(*(torch.nn.functional.pad(leaf, (1, 0)) for leaf in U))
    for call in (S, fk.func.per_sequence_grad(S)):
        message = "nothing was raised"
        try:
            call(params, left)
        except fk.BatchError as error:
            message = str(error)
        assert "right-padded" in message, message


def effects_are_linear_in_the_advantages(fk: Any, case: Case) -> None:
    S, params, E, U = case.engine(fk)
    P = fk.precond.adam(case.state(fk))

    def effect(w: Tensor) -> Tensor:
        return fk.influence(S, params, E, U, P, w, microbatch=case.microbatch)

    a, b = case.weights, case.weights.flip(0) ** 2
    size = float(effect(a).norm() + effect(b).norm())
    close(effect(2.0 * a - 3.0 * b), 2.0 * effect(a) - 3.0 * effect(b), IDENTITY, floor=size)


def three_terms_are_the_step_that_torch_takes(fk: Any, case: Case) -> None:
    """Five successive steps of torch.optim.AdamW with two groups, clipping and a parameter without gradient."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {name: torch.nn.Parameter(draw(*s)) for name, s in (("a", (3, 2)), ("b", (4,)), ("c", (2,)), ("d", ()))}
    groups = [
        {"params": [params["a"], params["d"]], "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1},
        {"params": [params["b"], params["c"]], "lr": 3e-3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    of = {"a": groups[0], "d": groups[0], "b": groups[1], "c": groups[1]}
    for step in range(6):
        raw = {name: draw(*p.shape) * 10.0 ** (1 - step) for name, p in params.items()}
        silent = {"c"} if step != 3 else set()
        grads = {name: None if name in silent else g for name, g in raw.items()}
        clip = fk.precond.clip_factor({k: g for k, g in grads.items() if g is not None}, 1.0)
        for name, p in params.items():
            p.grad = None if name in silent else raw[name].clone()
        past = {name: optimizer.state.get(p, {}) for name, p in params.items()}
        zero = {name: torch.zeros_like(p) for name, p in params.items()}
        state = fk.precond.AdamWState(
            step={name: int(past[name].get("step", 0)) for name in params},
            exp_avg={name: past[name].get("exp_avg", zero[name]).clone() for name in params},
            exp_avg_sq={name: past[name].get("exp_avg_sq", zero[name]).clone() for name in params},
            lr={name: of[name]["lr"] for name in params},
            beta1={name: of[name]["betas"][0] for name in params},
            beta2={name: of[name]["betas"][1] for name in params},
            eps={name: of[name]["eps"] for name in params},
            weight_decay={name: of[name]["weight_decay"] for name in params},
        )
        before = {name: p.detach().clone() for name, p in params.items()}
        clipped = {name: None if g is None else clip * g for name, g in grads.items()}
        parts = fk.precond.adamw_step(before, clipped, state)
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        for name, p in params.items():
            error = (sum(part[name] for part in parts) - (p.detach() - before[name])).abs().max()
            assert float(error) <= 1e-12, f"step {step}, {name}: {float(error):.1e}"
        response = fk.precond.adamw_response(state, clipped)
        moved = {name: torch.zeros_like(before[name]) if g is None else -g for name, g in clipped.items()}
        for name, part in response(moved).items():
            assert float((part - parts.batch[name]).abs().max()) <= 1e-12


def contributions_momentum_and_decay_are_the_jvp_of_the_step(fk: Any, case: Case) -> None:
    """At every node of the path: what the contraction adds up to is what forward mode has there, part by part."""
    S, params, E, U = case.engine(fk)
    apart = 3**0.5 / 6
    for path, nodes in (("start", (0.0,)), ("midpoint", (0.5,)), ("gauss2", (0.5 - apart, 0.5 + apart))):
        effect, step = fk.explain_step(
            S, params, E, U, case.weights, case.state(fk), path=path, max_norm=0.5, microbatch=case.microbatch
        )
        assert effect.path == path
        assert effect.clip < 1 or effect.grad_norm <= 0.5

        def along(direction: Any, step: Any = step, nodes: tuple[float, ...] = nodes) -> Tensor:
            found = [fk.func.jvp(S)(fk.tree.axpy(s, step.total, params), E, direction) for s in nodes]
            return torch.stack(found).mean(0)

        close(effect.predicted, along(step.total))
        close(effect.batch, along(step.batch))
        close(effect.momentum, along(step.momentum))
        close(effect.decay, along(step.decay))
        close(effect.kernel * effect.clip * case.weights, effect.contributions)


def contributions_add_up_to_the_change_that_happened(fk: Any, case: Case) -> None:
    """Along the path: the error shrinks as lr² (start), lr³ (midpoint), lr⁵ (two nodes); the optimizer is torch's own.

    The order is the median sequence's, over many: in a single one two orders can cancel at one of the two steps, and
    in a norm over all, that one can be the largest.
    """
    S, params, _, U = case.engine(fk)
    E = case.batch(fk, [*case.E, *case.U, *case.others])
    for path, bound, order in (("start", 0.05, 1.75), ("midpoint", 1e-3, 3.5), ("gauss2", 1e-6, 12.0)):
        large, small = (_left_by_the_step(fk, case, S, params, E, U, path, lr) for lr in (4e-3, 1e-3))
        assert float(small.norm()) <= bound, f"{path}: relative error {float(small.norm()):.2e}"
        ratio = float((large / small).abs().median().sqrt())
        assert ratio >= order, f"{path}: half the step divides the relative error by {ratio:.2f}"


def _left_by_the_step(fk: Any, case: Case, S: Any, params: Any, E: Any, U: Any, path: str, lr: float) -> Tensor:
    """[n_E]: error of what the contributions, the momentum and the decay add up to, relative to all that happened."""
    realised = _really_step(fk, case, lr, max_norm=0.5)
    effect, _ = fk.explain_step(S, params, E, U, case.weights, case.state(fk, lr=lr), path=path, max_norm=0.5)
    added_up = effect.contributions.sum(1) + effect.momentum + effect.decay
    return (added_up - realised) / realised.norm()


def _really_step(fk: Any, case: Case, lr: float, max_norm: float) -> Tensor:
    """Execute torch.optim.AdamW on a copy of the model, and difference the oracle's log-probabilities."""
    model, state = copy.deepcopy(case.model), case.state(fk, lr=lr)
    scores = torch.stack([oracle.logprob(model, pair, case.temperature) for pair in case.U])
    loss = -(case.weights @ scores)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=state.weight_decay[state.names[0]]
    )
    for name, p in model.named_parameters():
        m, v = state.exp_avg[name].clone(), state.exp_avg_sq[name].clone()
        optimizer.state[p] = {"step": torch.tensor(float(state.step[name])), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    pairs = [*case.E, *case.U, *case.others]
    return oracle.logprobs(model, pairs, case.temperature) - oracle.logprobs(case.model, pairs, case.temperature)


def preconditioner_stands_on_one_side(fk: Any, case: Case) -> None:
    """K = gᵀ P g', never gᵀ P² g': against a double loop with the diagonal written out."""
    S, params, E, U = case.engine(fk)
    state = case.state(fk)
    D = {name: 1 / ((v / (1 - 0.95**7)).sqrt() + 1e-8) for name, v in state.exp_avg_sq.items()}
    grads_E, grads_U = (
        [oracle.gradient(case.model, pair, case.temperature) for pair in pairs] for pairs in (case.E, case.U)
    )
    expected = oracle.kernel(grads_E, grads_U, D)
    close(fk.kernel(S, params, E, U, fk.precond.adam(state), microbatch=case.microbatch), expected)


def scores_are_tempered_sums_over_the_response(fk: Any, case: Case) -> None:
    """S, its tokens and their entropies, at the temperature, on the response with its last token (the EOS)."""
    apply, params = fk.func.make_functional(case.model)
    U = case.batch(fk, case.U)
    S = fk.func.sequence_logprob(apply, case.temperature)(params, U)
    close(S, oracle.logprobs(case.model, case.U, case.temperature))
    tokens = fk.func.token_logprobs(apply, case.temperature)(params, U)
    entropy = fk.func.token_entropy(apply, case.temperature)(params, U)
    for i, (prompt, response) in enumerate(case.U):
        span = slice(len(prompt), len(prompt) + len(response))
        with torch.no_grad():
            log_p = oracle.log_distributions(case.model, case.U[i], case.temperature)
            close(entropy[i, span], oracle.entropies(case.model, case.U[i], case.temperature))
        close(tokens[i, span], log_p.gather(1, torch.tensor(response)[:, None])[:, 0])
        outside = torch.ones(tokens.shape[1], dtype=torch.bool)
        outside[span] = False
        assert bool((tokens[i, outside] == 0).all())
        assert bool((entropy[i, outside] == 0).all())
    holes = U.response_mask & (
        torch.rand(U.response_mask.shape, generator=torch.Generator().manual_seed(case.seed)) < 0.6
    )
    holes[torch.arange(len(case.U)), torch.tensor([len(prompt) for prompt, _ in case.U])] = True
    masked = fk.func.sequence_logprob(apply, case.temperature)(params, U._replace(response_mask=holes))
    close(masked, torch.where(holes, tokens, 0.0).sum(1))


def frozen_and_post_step_agree_as_beta2_nears_one(fk: Any, case: Case) -> None:
    """At a large step count the two diagonals differ by O(1−β2)."""
    g, ones = case.tree(15), {name: torch.ones_like(p) for name, p in case.tree(15).items()}
    gaps = []
    for k in (4, 5):
        state = case.state(fk, step=10 ** (k + 2), beta2=1 - 10.0**-k)
        frozen, post = fk.precond.adam(state)(ones), fk.precond.adam(state, g)(ones)
        gaps.append(float((flat(frozen) - flat(post)).norm() / flat(frozen).norm()))
    assert gaps[0] < 1e-2
    assert 9.0 < gaps[0] / gaps[1] < 11.0, f"the gap fell by {gaps[0] / gaps[1]:.2f}, expected 10"
    v_hat = {name: (leaf.abs() + 0.1) ** 2 for name, leaf in case.tree(5).items()}
    close_trees(fk.precond.adam(case.state(fk))(ones), {name: 1 / (v.sqrt() + 1e-8) for name, v in v_hat.items()})


def every_strategy_gives_the_same_kernel(fk: Any, case: Case) -> None:
    """Held or streamed, written out or in factors, from memory or from disk, in parts of any size: K is K."""
    S, params, E, U = case.engine(fk)
    D = {name: leaf.abs() + 0.1 for name, leaf in case.tree(21).items()}
    P, T = fk.precond.diagonal(D), E.input_ids.shape[1]
    J = [
        torch.stack([flat(oracle.gradient(case.model, x, case.temperature)) for x in side]) for side in (case.E, case.U)
    ]
    K = J[0] @ (flat(D) * J[1]).T
    for name, held, tile, block, tokens in (
        ("sequences", "U", None, T, T),
        ("sequences", "E", None, T, 2 * T),
        ("sequences", "U", T, T, T),
        ("layers", "E", None, None, 0),
        ("store", "E", T, T, T),
    ):
        with tempfile.TemporaryDirectory() as disk:
            for _ in range(2 if name == "store" else 1):  # the second time it is read
                strategy = fk.Strategy(name, held, tile, block, tokens)
                close(fk.kernel(S, params, E, U, P, strategy=strategy, store=disk), K)


def rounding_stays_within_its_bound(fk: Any, case: Case) -> None:
    """Gradients kept in half the bits: every entry of K within its own bound, and the bound no empty promise."""
    S, params, E, U = case.engine(fk)
    D = {name: leaf.abs() + 0.1 for name, leaf in case.tree(21).items()}
    rounded = fk.low_precision_kernel(S, params, E, U, fk.precond.diagonal(D), dtype=torch.bfloat16)
    error = (rounded.values - fk.kernel(S, params, E, U, fk.precond.diagonal(D))).abs()
    assert bool((error <= rounded.bound).all()), f"{float((error / rounded.bound).max()):.2f} times its bound"
    assert float((error / rounded.bound).max()) > 1e-3


def layers_give_what_the_whole_gives(fk: Any, case: Case) -> None:
    """A kernel contracted layer by layer, its rows along a path of two nodes, the head by narrow tiles."""
    S, params, E, U = case.engine(fk)
    E, U = (fk.func.inputs.take(batch, fk.func.inputs.by_length(batch)) for batch in (E, U))
    v, nodes = case.tree(11, 0.05), ((0.3, 0.0), (0.7, 0.5))
    source = fk.func.inputs.source
    cut = fk.func.layers.cut_of(S, params, U)
    assert not isinstance(cut, str), cut
    by_layer = fk.engine.by_layer
    path = by_layer.Side(E, tuple((q, source.moved(params, v, s)) for q, s in nodes))
    here = by_layer.Side(U, ((1.0, source.plain(params)),))
    K = torch.zeros(len(case.E), len(case.U), dtype=torch.float64)
    with patch.object(fk.func.handles.head, "LOGITS_BYTES", 512):
        for shard in by_layer.shards(cut, path, here, every=2, tokens=24):
            for rows, handles in shard.streamed:
                K[:, rows] += fk.func.contract(shard.held, handles)
    pairs_E, pairs_U = (sorted(pairs, key=lambda pair: -len(pair[0] + pair[1])) for pairs in (case.E, case.U))

    def gradients(s: float, pairs: list[oracle.Pair]) -> Tensor:
        model = oracle.moved(case.model, v, s)
        return torch.stack([flat(oracle.gradient(model, pair, case.temperature)) for pair in pairs])

    J_E = torch.stack([q * gradients(s, pairs_E) for q, s in nodes]).sum(0)
    close(K, J_E @ gradients(0.0, pairs_U).T)


def rows_find_their_sequence_wherever_they_went(fk: Any, case: Case) -> None:
    """Parameters that are computed with before they are used, experts that gather rows from everywhere: one pass."""
    draw = torch.Generator().manual_seed(case.seed)
    shapes = {"norm": (4,), "gate": (4, 3), "up": (3, 5, 4), "down": (3, 4, 5), "bias": (3, 4), "sinks": (1, 4)}
    shapes["turned"] = (4, 4)
    params = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(4, 6, 4, generator=draw, dtype=torch.float64)

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = (x * (1.0 + p["norm"].exp())).flatten(0, 1)
        scores, chosen = (h @ p["gate"]).softmax(-1).topk(2)
        out = torch.zeros_like(h)
        for e in range(3):
            token, k = torch.where(chosen == e)
            a = torch.nn.functional.linear(h[token], p["up"][e]).tanh()
            y = (torch.nn.functional.linear(a, p["down"][e]) + p["bias"][e]) * scores[token, k, None]
            out.index_add_(0, token, y)
        y = (out @ p["turned"].T + h).view_as(x)
        return torch.cat([y, p["sinks"][None].expand(len(x), -1, -1)], 1).softmax(1).square().sum((1, 2))

    plan = fk.func.taps.batched.batch_plan(f, params, x[:1])
    assert plan is not None
    handles, _ = fk.func.taps.handles_of(f, params, x, plan)
    for i in range(len(x)):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        expected = torch.autograd.grad(f(leaves, x[i : i + 1]).sum(), [*leaves.values()])
        own = torch.eye(len(x), dtype=torch.float64)[i]
        close_trees(fk.func.weighted_sum(handles, own), dict(zip(leaves, expected, strict=True)))


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        gradients_equal_a_loop_of_autograd,
        derivatives_agree_with_central_differences,
        influence_equals_kernel_times_weights,
        held_gradients_give_what_passes_give,
        self_kernel_is_symmetric_and_positive_semidefinite,
        company_changes_nothing,
        left_padding_is_refused,
        effects_are_linear_in_the_advantages,
        three_terms_are_the_step_that_torch_takes,
        contributions_momentum_and_decay_are_the_jvp_of_the_step,
        contributions_add_up_to_the_change_that_happened,
        preconditioner_stands_on_one_side,
        scores_are_tempered_sums_over_the_response,
        frozen_and_post_step_agree_as_beta2_nears_one,
        every_strategy_gives_the_same_kernel,
        rounding_stays_within_its_bound,
        layers_give_what_the_whole_gives,
        rows_find_their_sequence_wherever_they_went,
    )
}
