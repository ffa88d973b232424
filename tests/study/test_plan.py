"""A plan says what is wrong with it in one line, with the place and the nearest valid name."""

from __future__ import annotations

import json

import pytest
import yaml

import fkernel as fk
from fkernel import checkpoint
from fkernel.study import TEMPLATE, FisherKernelPlan, check_inputs, parse_yaml, read_plan
from fkernel.study.config.base import CheckpointPlan


@pytest.fixture
def base():
    return {
        "checkpoint": {"path": "nowhere"},
        "update": {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2},
        "requests": [{"kind": "update"}],
        "out": "out",
    }


def said(tmp_path, plan) -> str:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    with pytest.raises(fk.PlanError) as caught:
        read_plan(file, FisherKernelPlan)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preconditoner": {}}, "preconditoner: there is no such key; did you mean 'preconditioner'?"),
        ({"preconditioner": {"form": "fozen"}}, "preconditioner.form: expected 'post-step', 'frozen' or 'identity'"),
        ({"preconditioner": {"form": "identity", "unseen": "zero"}}, "unseen has no meaning"),
        ({"step": {"max_norm": 1.0, "clip": 0.5}}, "max_norm and clip say the same in two ways"),
        ({"storage": {"persist": False, "workspace": "w"}}, "persist: false keeps none"),
        ({"numerics": {"memory": "8 gallons"}}, "expected bytes, or a size such as"),
        ({"numerics": {"dtype": "bfloat16"}}, "numerics.dtype: expected 'float32' or 'float64'"),
        ({"requests": [{"kind": "evaluations"}]}, "requests.0"),
        ({"requests": [{"kind": "evaluation"}]}, "requests.0.evaluation.batch_size_prompts: is missing."),
        (
            {"requests": [{"kind": "evaluation", "batch_size_prompts": 3, "completions_per_promt": 2}]},
            "completions_per_promt: there is no such key; did you mean 'completions_per_prompt'?",
        ),
        ({"requests": [{"kind": "update", "completions_per_prompt": 3}]}, "or neither for U itself"),
        ({"requests": [{"kind": "payload"}]}, "give exactly one of samples, callback and batch, not none"),
        ({"requests": [{"kind": "payload", "batch": 3}]}, "a batch is handed in from Python"),
        ({"requests": [{"kind": "update", "name": "a"}] * 2}, "two requests have the name 'a'"),
        ({"requests": [{"kind": "update", "name": "a b"}]}, "requests.0.update.name"),
        (
            {"requests": [{"kind": "payload", "samples": [{"name": "a", "prompt": "1", "response": "2"}] * 2}]},
            "two samples have the name 'a'",
        ),
        ({"requests": [{"kind": "update", "capture": {"topk": 3}}]}, "did you mean 'top_k'?"),
        ({"update": {"kind": "evaluation"}}, "update"),
        ({"out": 3}, "out: expected a valid string"),
        ({"capture": {"top_k": -1}}, "capture.top_k: expected greater than or equal to 0"),
        ({"out": ""}, "out: expected the path of a file or a directory"),
        ({"out": "a\0b"}, "out: expected the path of a file or a directory"),
        ({"storage": {"workspace": " "}}, "storage.workspace: expected the path"),
        ({"numerics": {"seed": True}}, "numerics: seed is true; expected a number or a text"),
        ({"step": {"microbatches": True}}, "step: microbatches is true"),
        ({"numerics": {"seed": 2**64}}, "numerics.seed is a number of 65 bits; expected one below 2⁶³"),
        ({"step": {"max_norm": float("inf")}}, "step.max_norm is inf; expected a finite number"),
        ({"correct": float("nan")}, "correct is nan"),
        (
            {"requests": [{"kind": "update", "advantages": {"U-000-00": float("nan")}}]},
            "requests.0.advantages.U-000-00 is nan",
        ),
        ({"analyses": {"sweep": {"scales": [1.0, float("inf")]}}}, "analyses.sweep.scales.1 is inf"),
        (
            {"analyses": {"counterfactuals": [{"name": "a", "scale": {"U-000-00": float("inf")}}]}},
            "analyses.counterfactuals.0.scale.U-000-00 is inf",
        ),
        (
            {
                "requests": [
                    {"kind": "custom_sequence", "prompt": "", "response": "1", "metadata": {"a": [float("nan")]}}
                ]
            },
            "requests.0.metadata.a.0 is nan",
        ),
        ({"requests": [{"kind": "update", "name": "."}]}, "requests.0.update.name: expected a name of letters, digits"),
        (
            {"requests": [{"kind": "update", "name": ".."}]},
            "requests.0.update.name: expected a name of letters, digits",
        ),
        ({"requests": [{"kind": "update", "name": "a" * 300}]}, "expected a name of at most 120 bytes"),
        (
            {"requests": [{"kind": "evaluation", "batch_size_prompts": 9, "completions_per_prompt": 10**9}]},
            "these are 9000000000 sequences; a batch has at most 1000000",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, base, changes, message):
    text = said(tmp_path, {**base, **changes})
    assert message in text, text
    assert len(text.splitlines()) == 1, text
    assert str(tmp_path / "plan.yaml") in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: a\nout: b", "line 2, column 1: no YAML (the key 'out' is there twice)"),
        ("step: {max_norm: 1, max_norm: 2}", "the key 'max_norm' is there twice"),
        ("out: !!python/name:os.system", "no YAML (the tag 'tag:yaml.org,2002:python/name:os.system' is not read"),
        ("a0: &a0 [1, 1]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]" for i in range(9)),
         "stands for more than 1000000 values"),
        ("out: &a [*a]", "an alias stands inside of what it names"),
        ("[" * 100_000, "no YAML (it is nested too deeply)"),
        ("? [a]\n: b", "a key is a list"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_what_it_seems_is_refused(tmp_path, text, message):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(fk.PlanError) as caught:
        read_plan(file, FisherKernelPlan)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"out": 1, "out": 2}', "the key 'out' is there twice"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("", ""),
    ],
)
def test_json_that_is_not_what_it_seems_is_refused(tmp_path, text, message):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(fk.PlanError) as caught:
        read_plan(file, FisherKernelPlan)
    assert f"no JSON ({message}" in str(caught.value)


def test_numbers_and_dates_of_yaml_are_what_json_would_have():
    assert parse_yaml("{lr: 1e-5, day: 2024-05-01, n: 3, yes: yes}") == {
        "lr": 1e-5,
        "day": "2024-05-01",
        "n": 3,
        True: True,
    }


def test_missing_files_are_said_with_their_place(base):
    plan = FisherKernelPlan.model_validate(
        base | {"requests": [{"kind": "from_file", "path": "no/batch"}], "prompts": [{"jsonl": "no.jsonl"}]}
    )
    with pytest.raises(fk.PlanError) as caught:
        check_inputs(plan)
    assert str(caught.value).splitlines() == [
        "checkpoint.path: there is nothing at nowhere; expected a file or a directory.",
        "prompts.0.jsonl: there is nothing at no.jsonl; expected a file or a directory.",
        "requests.0.path: there is nothing at no/batch; expected a file or a directory.",
    ]


def test_defaults_are_filled_in_and_the_record_is_a_fixed_point(base):
    plan = FisherKernelPlan.model_validate(base)
    record = plan.record()
    assert record["preconditioner"] == {"form": "post-step", "calibrated": True, "unseen": None}
    assert record["requests"][0]["name"] == "update"
    assert json.loads(json.dumps(record)) == record
    assert FisherKernelPlan.model_validate(record).record() == record
    assert FisherKernelPlan.model_validate(record).hash == plan.hash
    assert FisherKernelPlan.model_validate(base | {"out": "elsewhere"}).hash == plan.hash
    assert FisherKernelPlan.model_validate(base | {"self_kernel": False}).hash != plan.hash


def test_requests_of_one_kind_are_numbered(base):
    plan = FisherKernelPlan.model_validate(base | {"requests": [{"kind": "update"}, {"kind": "update"}]})
    assert [request.name for request in plan.requests] == ["update-1", "update-2"]


def test_what_a_checkpoint_is_loaded_with_is_passed_on(base, tmp_path, monkeypatch):
    given = []

    def load(path, **how):
        given.append(how)
        return checkpoint.Checkpoint(None, None, None, None, checkpoint.Provenance(path, "none", ""))

    monkeypatch.setattr(checkpoint, "load", load)
    groups, file = [["w", "b"], ["head"]], tmp_path / "names.json"
    file.write_text(json.dumps(["w", "b", "head"]))
    CheckpointPlan.model_validate({"path": "run", "names": groups, "optimizer": False}).load()
    CheckpointPlan.model_validate({"path": "run", "names": str(file)}).load()
    CheckpointPlan.model_validate({"path": "run", "names": str(file)}).load_weights()
    assert given[0]["names"] == (("w", "b"), ("head",))
    assert given[0]["optimizer"] is False
    assert given[1]["names"] == ["w", "b", "head"]
    assert given[1]["optimizer"] is True
    assert given[2]["names"] is None
    assert given[2]["optimizer"] is False
    with pytest.raises(fk.CheckpointError, match="names of the optimizer's parameters"):
        CheckpointPlan.model_validate({"path": "run", "names": str(tmp_path / "none.json")}).load()
    plan = FisherKernelPlan.model_validate(base | {"checkpoint": {"path": str(tmp_path), "names": "no.json"}})
    with pytest.raises(fk.PlanError, match=r"checkpoint\.names: there is nothing at no\.json"):
        check_inputs(plan)


def test_the_template_is_a_plan():
    plan = FisherKernelPlan.model_validate(yaml.safe_load(TEMPLATE))
    assert [request.name for request in plan.requests] == ["self", "held_out", "probe"]


def test_a_plan_is_frozen(base):
    plan = FisherKernelPlan.model_validate(base)
    with pytest.raises(ValueError, match="frozen"):
        plan.out = "elsewhere"


def test_the_schema_names_every_key_and_kind():
    schema = json.dumps(FisherKernelPlan.model_json_schema())
    kinds = ["update", "evaluation", "prompt_ids", "custom_prompts", "custom_sequence", "from_file", "payload"]
    for word in [*FisherKernelPlan.model_fields, *kinds]:
        assert f'"{word}"' in schema
