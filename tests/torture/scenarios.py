"""What is stopped: every command and function that writes, on small inputs. Each takes a folder, and goes on there.

`make` prepares inputs, once; `begin` a folder that is not empty; `act` is what is stopped and begun again. All run in
processes of their own. What needs long and decides no file (the hash of the package's code, a plan's estimate) `warm`
computes once, in the process that forks them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fkernel import study
from fkernel.cli.writing import execute
from fkernel.demo import prepare
from fkernel.record import Recording
from fkernel.report import draw_all, write_page
from fkernel.study import FisherKernelPlan, FisherKernelResults, SamplePlan, account_recording, sampled
from fkernel.study.accounts.stopped import KeptSweep
from fkernel.study.sources import own_code
from tests.demo.conftest import TINY
from tests.record.loops import adamw, gpt2, train
from tests.study.conftest import Run, made
from tests.test_interrupted import STRATEGIES, computed, f

HELD_OUT = {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 2}
PROBE = {"kind": "custom_sequence", "name": "probe", "prompt": "3+4=", "response": "7"}


class Scenario(NamedTuple):
    """One of them.

    Attributes:
        act: (inputs, folder), what is stopped.
        make: prepares inputs in a folder.
        begin: (inputs, folder), what is there before.
        warm: what the forks inherit.
    """

    act: Callable[[Path, Path], Any]
    make: Callable[[Path], Any] = lambda inputs: None
    begin: Callable[[Path, Path], Any] = lambda inputs, root: None
    warm: Callable[[Path], Any] = lambda inputs: None


def _training(inputs: Path) -> None:
    run = made(inputs / "training")
    (inputs / "paths.json").write_text(json.dumps([str(each) for each in run[:5]]))


def _plan(inputs: Path, root: Path) -> FisherKernelPlan:
    run = Run(*map(Path, json.loads((inputs / "paths.json").read_text())), batch=None)  # pyright: ignore
    more = {"analyses": {"ledger": True}, "self_kernel": True, "storage": {"pictures": False}}
    plan = run.plan(root / "out", requests=[HELD_OUT, PROBE], **more)
    return FisherKernelPlan.model_validate(plan)


def _estimated(inputs: Path) -> None:
    """The estimate, which writes nothing, takes two thirds of a run so small: it is made once."""
    own_code()
    expected = study.forecast(_plan(inputs, inputs))
    study.forecast = lambda plan, loaded=None: expected


def _run(inputs: Path, root: Path) -> None:
    execute(_plan(inputs, root), overwrite=False, log="minimal")


def _studied(inputs: Path) -> None:
    _training(inputs)
    plan = _plan(inputs, inputs)
    execute(plan.model_copy(update={"requests": plan.requests[:1]}), overwrite=False, log="minimal", page=False)


def _report(inputs: Path, root: Path) -> None:
    results = FisherKernelResults.load(inputs / "out")
    draw_all(results, root / "pictures")
    write_page(results, root / "report.html")
    results.save_results(root / "copy")


def _sample(inputs: Path, root: Path) -> None:
    run = json.loads((inputs / "paths.json").read_text())
    request = {"kind": "evaluation", "dataset_split": "test", "batch_size_prompts": 3}
    plan: dict[str, Any] = {"checkpoint": {"path": run[0]}, "prompts": [{"jsonl": run[4], "split": "test"}]}
    plan |= {"template": "bare", "sampling": {"max_new_tokens": 6}, "request": request, "out": str(root / "sampled")}
    if not (root / "sampled").exists():  # a sample that is there is an error
        sampled(SamplePlan.model_validate(plan))


def _record(inputs: Path, root: Path) -> None:
    model = gpt2()
    train(root / "recording", range(3), model, adamw(model), snapshots="every")


def _record_another(inputs: Path, root: Path) -> None:
    model = gpt2()
    train(root / "recording", range(3), model, adamw(model, 0.02), snapshots="every", resume="replace")


def _recorded(inputs: Path) -> None:
    model = gpt2()
    train(inputs / "recording", range(4), model, adamw(model))


def _account(inputs: Path, root: Path, **more: Any) -> None:
    KeptSweep.__init__.__defaults__ = (0.0, None)  # after every step, and not every 30 seconds
    recording = Recording.open(inputs / "recording")
    account_recording(recording, recording.step(0).batch, root / "account", p_values=False, **more)


def _account_in_little_room(inputs: Path, root: Path) -> None:
    """Three states of the run at a time: one that is kept is deleted when the walk has passed it."""
    _account(inputs, root, disk=3 * 3 * 4 * sum(leaf.numel() for leaf in gpt2().parameters()))


def _store(inputs: Path, root: Path) -> None:
    computed(f, STRATEGIES[2], root / "store")


def _demo(inputs: Path, root: Path) -> None:
    prepare(TINY, root / "cache")


def _copied(inputs: Path, root: Path) -> None:
    shutil.copytree(inputs / "recording", root / "recording")


SCENARIOS = {
    "store": Scenario(_store),
    "record": Scenario(_record),
    "record, another run": Scenario(_record_another, lambda inputs: _record(inputs, inputs), _copied),
    "sample": Scenario(_sample, _training),
    "account": Scenario(_account, _recorded, warm=lambda inputs: own_code()),
    "account, little room": Scenario(_account_in_little_room, _recorded, warm=lambda inputs: own_code()),
    "report": Scenario(_report, _studied),
    "run": Scenario(_run, _training, warm=_estimated),
    "demo": Scenario(_demo),
}
