"""Models and batches of the tests on several processes, made alike on every rank, and what is computed of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

import fkernel as fk
from fkernel.distributed import group_of, shard_tree
from fkernel.engine.over_ranks import whole_tree
from tests.cases import Case

LENGTHS_U = ((3, 4), (1, 6), (5, 2), (2, 2), (4, 5), (1, 1), (2, 3))
LENGTHS_E = ((2, 3), (4, 4), (1, 7), (3, 1), (6, 2))
CASES = {
    "own": Case("own", 1, LENGTHS_U, LENGTHS_E, 0.7, 2),
    "gpt2": Case("gpt2", 2, LENGTHS_U, LENGTHS_E, 1.3, 1),
    "lora": Case("gpt2", 4, LENGTHS_U, LENGTHS_E, 0.7, 2),
    "few": Case("own", 3, LENGTHS_U[:2], LENGTHS_E[:1], 1.0, 8),
}


def inputs(name: str) -> tuple[Any, dict[str, torch.Tensor], Any, Any, Case]:
    """(S, params, E, U, case) of one of CASES; "lora" trains adapters alone."""
    if name == "lora":
        return _lora()
    case = replace(CASES[name])  # with a model of its own
    return *case.engine(fk), case


def _lora() -> tuple[Any, dict[str, torch.Tensor], Any, Any, Case]:
    from peft import LoraConfig, get_peft_model

    case = replace(CASES["lora"])
    whole = case.model
    torch.manual_seed(4)
    config = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model: Any = get_peft_model(whole, config)  # pyright: ignore[reportArgumentType]
    apply, params = fk.func.make_functional(model.double().eval())
    return fk.func.sequence_logprob(apply), params, case.batch(fk, case.E), case.batch(fk, case.U), case


def two_steps(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take two steps of AdamW; what `torch.distributed.checkpoint` saves of the model, and of its optimizer."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        ids = torch.arange(6).view(1, 6) + 3
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_state_dict(model, optimizer)


def diagonal(params: dict[str, torch.Tensor], salt: int = 7) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(salt)
    return {name: torch.rand(leaf.shape, generator=draw, dtype=leaf.dtype) + 0.1 for name, leaf in params.items()}


def state_of(params: dict[str, torch.Tensor]) -> Any:
    m = {name: leaf - 0.5 for name, leaf in diagonal(params, 8).items()}
    v = {name: leaf**2 for name, leaf in diagonal(params, 9).items()}
    state = fk.precond.adamw_init(params, lr=1e-3, weight_decay=0.1)
    return fk.precond.AdamWState(**{**vars(state), "exp_avg": m, "exp_avg_sq": v, "step": dict.fromkeys(params, 7)})


def symmetric(params: dict[str, torch.Tensor]) -> Any:
    """A linear map that is no diagonal: D + a rank-one part."""
    d, a = diagonal(params, 10), diagonal(params, 11)

    def P(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        along = sum((leaf * a[name]).flatten(1).sum(1) for name, leaf in x.items())
        return {
            name: leaf * d[name] + torch.as_tensor(along).view(-1, *[1] * a[name].ndim) * a[name]
            for name, leaf in x.items()
        }

    return P


STRATEGIES = {
    "held E": None,
    "tiles of E": fk.Strategy("sequences", "E", 12, 20, 7),
    "tiles of U": fk.Strategy("sequences", "U", 12, 20, 7),
}


def step_of_shards(mesh: Any, name: str) -> dict[str, torch.Tensor]:
    """A step explained with a state of shards; Δθ of shards put together. Without a mesh, of the whole state."""
    S, params, E, U, _ = inputs(name)
    state, found = state_of(params), dict[str, torch.Tensor]()
    if mesh is not None:
        group = group_of(mesh)
        own = {each: shard_tree(group, getattr(state, each)) for each in ("exp_avg", "exp_avg_sq")}
        state = replace(state, **own)
    layers = fk.Strategy("layers", "E", None, None, 0)
    for rows, columns, max_norm, how in ((E, U, 1e-2, None), (U, E, None, None), (E, U, 1.0, layers)):
        weights = torch.linspace(-1, 2, len(columns.input_ids), dtype=torch.float64)
        given = (rows, columns, weights, state)
        with planned(how):
            effect, step = fk.explain_step(S, params, *given, max_norm=max_norm, microbatch=2, mesh=mesh)
        key = f"{len(rows.input_ids)} {max_norm}"
        found |= {f"{key} {part}": torch.as_tensor(v) for part, v in effect._asdict().items() if part != "path"}
        total = step.total if mesh is None else whole_tree(step.total, group_of(mesh), params)
        found |= {f"{key} {part}": leaf for part, leaf in total.items()}
    return found


@contextmanager
def planned(how: Any) -> Iterator[None]:
    """Have `explain_step` compute by a strategy that it would choose for other inputs."""
    if how is None:
        yield
        return
    with patch("fkernel.engine.step.choose", lambda *args: how):
        yield


def answers(mesh: Any, name: str) -> dict[str, torch.Tensor]:
    """Everything that the engine computes of one case, with a mesh or without."""
    S, params, E, U, case = inputs(name)
    P, w = fk.precond.diagonal(diagonal(params)), case.weights
    found = {
        what: fk.kernel(S, params, E, U, P, strategy=how, microbatch=case.microbatch, mesh=mesh)
        for what, how in STRATEGIES.items()
    }
    found["K_UU"] = fk.kernel(S, params, U, U, P, microbatch=1, mesh=mesh)
    found["K_UU in tiles"] = fk.kernel(S, params, U, U, P, strategy=STRATEGIES["tiles of E"], mesh=mesh)
    found["general P"] = fk.kernel(S, params, E, U, symmetric(params), microbatch=2, mesh=mesh)
    found["influence"] = fk.influence(S, params, E, U, P, w, microbatch=2, mesh=mesh)
    found["in little memory"] = fk.kernel(S, params, E, U, P, memory="80MiB", mesh=mesh)
    paths: list[tuple[Any, Any, float | None]] = [("midpoint", (E, U), None), ("gauss2", (U, E), 1e-3)]
    for path, (rows, columns), max_norm in paths:  # whichever batch is smaller is held
        weights = torch.linspace(-1, 2, len(columns.input_ids), dtype=torch.float64)
        given = (rows, columns, weights, state_of(params))
        effect, step = fk.explain_step(S, params, *given, path=path, max_norm=max_norm, microbatch=2, mesh=mesh)
        found |= {f"{path} {key}": torch.as_tensor(value) for key, value in effect._asdict().items() if key != "path"}
        found |= {f"{path} step {key}": leaf for key, leaf in step.total.items()}
    return found
