"""A plan in shards gives the results of one process, from θ to the audit; what does not go in shards is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from fkernel import checkpoint
from fkernel.distributed import group_of, together
from fkernel.errors import PlanError
from fkernel.rollout import save_batch
from fkernel.study import FisherKernelPlan, FisherKernelResults, FisherKernelRunner, check_inputs
from tests.distributed.ranks import results
from tests.study.conftest import Run, made

SAMPLES = [{"prompt": p, "response": r} for p, r in (("3+4=", "7"), ("12+5=", " 17"), ("1", "2"))]
ANALYSES = {"ledger": True, "uncertainty": True, "parts": True, "covariates": True, "structure": {"clusters": 2}}
LOSS = {"kind": "policy_gradient", "entropy": {"coefficient": 0.01}}
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of the study's tests, its checkpoint as torch.distributed.checkpoint saves it."""
    place = tmp_path_factory.mktemp("shards")
    run = made(place)
    whole: Any = checkpoint.load(run.before)
    state = torch.load(run.before / "optimizer.pt")
    (group,) = state["param_groups"]
    names = group.pop("param_names")
    state = {
        "state": dict(zip(names, state["state"].values(), strict=True)),
        "param_groups": [{**group, "params": names}],
    }
    before = place / "step"
    whole.model.config.save_pretrained(before)
    whole.tokenizer.save_pretrained(before)
    save({"model": whole.model.state_dict(), "optimizer": state}, checkpoint_id=before, no_dist=True)
    known_by = checkpoint.load(before, model=before, dtype=torch.float64).provenance.fingerprint
    save_batch(replace(run.batch, checkpoint=known_by), place / "U")
    return run._replace(before=before, update=place / "U")


def plan_of(run: Run, out: Path, **numerics: Any) -> dict[str, Any]:
    """Every request and analysis that goes in shards, of a step that was really taken."""
    requests = [{"kind": "update", "name": "self"}, {"kind": "payload", "name": "probes", "samples": SAMPLES}]
    plan = run.plan(out, requests=requests, analyses=ANALYSES, numerics={"dtype": "float64", **numerics})
    plan["checkpoint"] |= {"model": str(run.before)}
    plan["step"] |= {"loss": LOSS}
    return plan


def saved(plan: dict[str, Any], mesh: Any = None) -> Path:
    """Run a plan, and save its results."""
    out = Path(plan["out"]) / ("alone" if mesh is None else str(mesh.get_local_rank()))
    FisherKernelRunner(plan, mesh=mesh).run().save_results(out)
    return out


def on_rank(mesh: Any, plan: dict[str, Any]) -> Path:
    with together(group_of(mesh), "fkernel run"):
        return saved(plan, mesh)


def numbers(value: Any, place: str = "") -> dict[str, float]:
    """Every number in a JSON value, by its place."""
    if isinstance(value, dict):
        return {at: n for key, inner in value.items() for at, n in numbers(inner, f"{place}/{key}").items()}
    if isinstance(value, list):
        return {at: n for i, inner in enumerate(value) for at, n in numbers(inner, f"{place}/{i}").items()}
    return {place: value} if isinstance(value, int | float) else {}


def state_of(ran: FisherKernelResults) -> Any:
    """The certificate of the optimizer's state."""
    (found,) = (one for one in ran.environment["certificates"] if one["name"] == "state")
    return found["error"]


@pytest.mark.turns(8)
def test_a_plan_in_shards_on_two_ranks_gives_the_results_of_one_process(run, tmp_path):
    alone = saved(plan_of(run, tmp_path))
    one = FisherKernelResults.load(alone)
    for place in results(2, on_rank, plan_of(run, tmp_path, shards=True)):
        two = FisherKernelResults.load(place)
        assert two.environment["fingerprint"] == one.environment["fingerprint"]
        with np.load(alone / "kernel.npz") as expected, np.load(place / "kernel.npz") as found:
            assert [*found] == [*expected]
            for name in (name for name in expected if expected[name].dtype.kind == "f"):
                there = np.isfinite(expected[name])
                size, apart = (float(np.linalg.norm(x[there])) for x in (expected[name], found[name] - expected[name]))
                left = name.endswith(("remainder", "unexplained"))  # which has the rounding of nats, not its own
                assert apart <= ROUNDING * (size if size and not left else 1.0), name
        facts, others = (numbers({"step": x.step, "state": state_of(x)}) for x in (one, two))
        assert facts.keys() == others.keys()
        for at, value in facts.items():
            fitted = "audit" in at or "state" in at
            assert others[at] == pytest.approx(value, rel=1e-6 if fitted else ROUNDING, abs=1e-9), at
    assert one.step["audit"]["findings"], "an entropy that the training did not have is found"


WRONG: dict[str, dict[str, Any]] = {
    "checkpoint.path: ": {"checkpoint": {"path": "before"}},
    "checkpoint.order: ": {"checkpoint": {"path": "before", "order": "trainer"}},
    "checkpoint: run is read whole": {"checkpoint": {"recording": "run", "step": 1}},
    "update: sampling": {"update": {"kind": "update", "batch_size_prompts": 1, "completions_per_prompt": 2}},
    "requests.0: sampling": {"requests": [{"kind": "evaluation", "batch_size_prompts": 1}]},
    "requests.0.callback: ": {"requests": [{"kind": "payload", "callback": "os.getcwd"}]},
    "parameters: ": {"parameters": ["*"]},
    "step.autocast: ": {"step": {"autocast": "bfloat16"}},
    "step.loss.old: ": {"step": {"loss": {"kind": "clipped_ratio", "old": {"path": "before"}}}},
    "capture.curvature: ": {"capture": {"curvature": True}},
    "analyses.tokens: ": {"analyses": {"tokens": True}},
    "analyses.structure.alignment: ": {"analyses": {"structure": {"alignment": True}}},
    "requests.0.analyses.sweep: ": {"requests": [{"kind": "update", "analyses": {"sweep": True}}]},
}


@pytest.mark.parametrize("line", WRONG)
def test_what_needs_a_whole_model_is_refused_by_its_key_before_anything_is_read(line, run, tmp_path):
    plan = plan_of(run, tmp_path, shards=True)
    for key, value in WRONG[line].items():
        plan[key] = value
    if plan["checkpoint"].get("path") == "before":
        plan["checkpoint"]["path"] = str(run.after.parent / "before")
    with pytest.raises(PlanError) as refused:
        check_inputs(FisherKernelPlan.model_validate(plan))
    (said,) = [each for each in str(refused.value).splitlines() if each.startswith(line)]
    assert said.endswith("(numerics.shards).")


def test_shards_without_ranks_are_refused_and_a_plan_that_goes_in_shards_is_not(run, tmp_path):
    plan = plan_of(run, tmp_path, shards=True)
    check_inputs(FisherKernelPlan.model_validate(plan))
    with pytest.raises(PlanError, match="several ranks are needed"):
        FisherKernelRunner(plan)
