"""What a plan names is told by its content: an edited function, model file or prompt is never served as the old one."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fkernel as fk
from fkernel.checkpoint import find_layout
from fkernel.study import FisherKernelRunner
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.sources import code_of, describing_files, dotted_names, own_code
from tests.formats.family import copied
from tests.formats.places import place_of
from tests.study.conftest import Run
from tests.study.test_workspace import asking

REWARD = "def reward(prompt, response):\n    return float(len(response) % {})\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own modules; what is imported from it is forgotten afterwards."""
    before = {*sys.modules}
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second of the same size is not seen there
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (tmp_path / "code").mkdir()
    yield tmp_path / "code"
    for name in {*sys.modules} - before:
        del sys.modules[name]


def edit(folder: Path, name: str, source: str) -> None:
    """Write a module, and import it anew if it was."""
    place = folder.joinpath(*name.split(".")).with_suffix(".py")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(source)
    importlib.invalidate_caches()
    if name in sys.modules:
        importlib.reload(sys.modules[name])


def drawing(run: Run, out: Path, reward: str, **changes: Any) -> dict[str, Any]:
    """A plan that draws U with a reward of the user's own."""
    update = {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": reward}
    step = {"max_norm": 0.05}
    return asking(run, out, **{"update": update, "requests": [], "self_kernel": False, "step": step, **changes})


def executed(plan: dict[str, Any]) -> list[float | None]:
    return [info.reward for info in FisherKernelRunner(plan).run().update]


def test_an_edited_reward_is_not_served_the_old_ones_workspace(run, tmp_path, folder):
    edit(folder, "my_rewards", REWARD.format(7))
    plan = drawing(run, tmp_path / "out", "my_rewards.reward")
    before = executed(plan)
    assert executed(plan) == before
    edit(folder, "my_rewards", REWARD.format(3))
    with pytest.raises(fk.StoreError, match=r"of something else: update\.code\.my_rewards: stored"):
        executed(plan)
    assert executed({**plan, "out": str(tmp_path / "other")}) != before


def test_an_edited_helper_counts_and_a_module_that_is_not_imported_does_not(run, tmp_path, folder):
    edit(folder, "shared.scale", "FACTOR = 2.0\n")
    edit(folder, "unrelated", "x = 1\n")
    edit(folder, "helped", "from shared import scale\n\n\ndef reward(prompt, response):\n    return scale.FACTOR\n")
    plan = drawing(run, tmp_path / "out", "helped.reward", update={**drawing(run, tmp_path, "")["update"],
                   "reward": "helped.reward", "advantage": "raw"})  # fmt: skip
    assert {*executed(plan)} == {2.0}
    edit(folder, "unrelated", "x = 2\n")
    assert {*executed(plan)} == {2.0}
    edit(folder, "shared.scale", "FACTOR = 3.0\n")
    with pytest.raises(fk.StoreError, match=r"update\.code\.shared\.scale: stored"):
        executed(plan)


def test_a_file_that_was_edited_behind_this_process_is_refused(folder):
    edit(folder, "stale", REWARD.format(7))
    code_of(["stale.reward"])
    (folder / "stale.py").write_text(REWARD.format(3))
    with pytest.raises(fk.PlanError, match=r"The file of stale was edited .* importlib\.reload"):
        code_of(["stale.reward"])
    importlib.reload(sys.modules["stale"])
    assert code_of(["stale.reward"])["stale"]


def typed(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Make a module without a file, as a notebook's is."""
    module = ModuleType("typed_in")
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, "typed_in", module)


def test_a_function_without_a_file_is_asked_again(run, tmp_path, monkeypatch):
    typed(monkeypatch, REWARD.format(7))
    plan = drawing(run, tmp_path / "out", "typed_in.reward")
    before = executed(plan)
    typed(monkeypatch, "def reward(prompt, response):\n    x = len(response)\n    return float(x % 7)\n")
    assert executed(plan) == before
    typed(monkeypatch, "def reward(prompt, response):\n    return 0.25\n")
    with pytest.raises(fk.PlanError, match=r"The reward of U-000-0\d by typed_in\.reward is 0\.25, and the workspace"):
        executed(plan)


def test_an_advantage_rule_without_a_file_is_asked_again(run, tmp_path, monkeypatch):
    typed(monkeypatch, "def rule(rewards, groups):\n    return rewards * 1.0\n")
    plan = drawing(run, tmp_path / "out", "tests.study.conftest.brevity")
    plan["update"]["advantage"] = "typed_in.rule"
    executed(plan)
    typed(monkeypatch, "def rule(rewards, groups):\n    return rewards * 2.0\n")
    with pytest.raises(fk.PlanError, match=r"The advantage of U-000-00 by typed_in\.rule"):
        executed(plan)


def test_files_beside_the_parameters_count(run, tmp_path):
    shutil.copytree(run.before, tmp_path / "before")
    plan = drawing(run, tmp_path / "out", "tests.study.conftest.brevity", checkpoint={"path": str(tmp_path / "before")})
    executed(plan)
    config = tmp_path / "before" / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-3}))  # no parameter says so
    with pytest.raises(fk.StoreError, match=r"files\.checkpoint\.config\.json: stored"):
        executed(plan)


def test_a_models_own_code_counts_where_it_may_be_executed(run, tmp_path):
    shutil.copytree(run.before, tmp_path / "before")
    (tmp_path / "before" / "model" / "modeling_own.py").write_text("x = 1\n")
    path = str(tmp_path / "before")
    assert "modeling_own.py" not in describing_files(CheckpointPlan.model_validate({"path": path}))
    spec = CheckpointPlan.model_validate({"path": path, "trust_remote_code": True})
    before = describing_files(spec)["modeling_own.py"]
    (tmp_path / "before" / "model" / "modeling_own.py").write_text("x = 2\n")
    assert describing_files(spec)["modeling_own.py"] != before


@pytest.mark.parametrize(("kind", "beside"), [("verl_fsdp2", "huggingface"), ("nemo_v2", "../../tokenizer")])
def test_a_trainers_folders_count(kind, beside, tmp_path):
    """The configuration and the tokenizer lie elsewhere than the weights; and count there too."""
    root, _ = copied(kind, tmp_path)
    spec = CheckpointPlan.model_validate({"path": str(place_of(kind, root))})
    folder = find_layout(spec.place).model / beside
    folder.mkdir(exist_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text("{}")
    before = describing_files(spec)
    file.write_text('{"eos_token": "."}')
    after = describing_files(spec)
    assert [name for name in after if after[name] != before[name]] == ["tokenizer_config.json"]


def test_rewards_and_weights_of_a_given_u_count(run, tmp_path):
    """Advantages and tokens may be the same where rewards are not."""
    plan = asking(run, tmp_path / "out", update={"kind": "payload", "batch": run.batch}, requests=[])
    executed(plan)
    other = run.batch.with_values("reward", 2 * run.batch.rewards)
    with pytest.raises(fk.StoreError, match=r"update\.batch: stored"):
        executed({**plan, "update": {"kind": "payload", "batch": other}})


def test_what_is_followed_and_what_is_not(folder):
    edit(folder, "pack.__init__", "")
    edit(folder, "pack.inner", "VALUE = 1\n")
    edit(folder, "pack.lazy", "import torch\n")
    edit(folder, "pack.rewards", "import json\nimport torch\nimport fkernel\nfrom .inner import VALUE\n\n\n"
         "def reward(prompt, response):\n    from pack import lazy\n    return VALUE\n")  # fmt: skip
    assert {*code_of(["pack.rewards.reward"])} == {"pack", "pack.inner", "pack.lazy", "pack.rewards"}
    assert code_of(["builtins.len"]) == {"builtins": None}
    assert None not in code_of(["fkernel.rollout.rewards.exact"]).values()
    with pytest.raises(fk.RolloutError, match="no_such"):
        code_of(["no_such.module"])


def test_names_are_found_wherever_a_plan_has_them():
    others = [{"advantages": "c.rule"}, {"advantages": {"U-000-00": 1.0}}]
    analyses = {"observables": [{"function": "b.make"}], "counterfactuals": others}
    record = {"reward": "math", "advantage": "a.rule", "analyses": analyses, "path": "d.json"}
    assert dotted_names(record) == {"a.rule", "b.make", "c.rule"}
    assert len(own_code()) == 64
