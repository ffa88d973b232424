"""What is tortured: valid things of each kind, and how they are read."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

from fkernel import checkpoint
from fkernel.cli import app
from fkernel.errors import FKernelError
from fkernel.io import checksummed_json
from fkernel.record import Recording
from fkernel.report import effects_table, load_results
from fkernel.rollout import load_batch, read_probes
from fkernel.study import FisherKernelPlan, check_inputs, read_plan
from tests.bad_input.common import DTYPE, ENTRIES, plain, vectors
from tests.record import loops
from tests.study.conftest import Run, made
from tests.torture.grammar import TEXTS, junk, one_file, places, spoilt, spoilt_bytes
from tests.torture.public import public
from tests.torture.rightness import NotRightError, check_finite

Family = Callable[[random.Random], tuple[str, Callable[[], Any]]]


# ------------------------------------------------------------------------------------------------------ plans and files


def _run(place: Path) -> Run:
    (place / "run").mkdir()
    return made(place / "run")


def plans(place: Path) -> Family:
    """A plan with most of its keys, as YAML or JSON, or a line of its text; read, and checked."""
    run = _run(place)
    whole = run.plan(place / "out") | {
        "analyses": {"sweep": {"scales": [0.5, 1.0]}, "uncertainty": {"draws": 50}, "ledger": True},
        "numerics": {"seed": 3, "memory": "1GiB", "microbatch": 2, "dtype": "float32", "device": "cpu"},
        "storage": {"workspace": str(place / "workspace"), "pictures": False},
        "preconditioner": {"form": "post-step", "unseen": "eps"},
        "parameters": ["model.*"],
        "correct": 1.0,
    }
    whole["requests"] += [
        {"kind": "custom_sequence", "name": "probe", "prompt": "1", "response": "2", "metadata": {"a": 1}},
        {"kind": "update", "advantages": {run.batch.ids[0]: 0.5}, "sequence_ids": ["U-*"]},
        {"kind": "payload", "samples": [{"prompt": "1", "response": "2", "reward": 1.0, "name": "p"}]},
        {"kind": "from_file", "path": str(run.update), "capture": {"pairs": [["U-000-00", "U-000-01"]]}},
    ]

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        what, tree = spoilt(whole, draw)
        file = place / ("plan.json" if draw.random() < 0.4 else "plan.yaml")
        text = json.dumps(tree) if file.suffix == ".json" else yaml.safe_dump(tree, allow_unicode=True)
        data = text.encode(errors="surrogatepass")
        if draw.random() < 0.2:
            what, data = spoilt_bytes(data, draw)
        file.write_bytes(data)

        def call() -> None:
            plan = read_plan(file, FisherKernelPlan)
            check_inputs(plan)
            check_finite(json.loads(json.dumps(plan.record())))

        return what, call

    return family


def _files(original: Path, place: Path, read: Callable[[Path], Any]) -> Family:
    """A directory of which one file is spoilt: its bytes, or its JSON, which is sealed again where it was."""

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        copy = place / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        file = one_file(copy, draw)
        data = file.read_bytes()
        what = ""
        if file.suffix in (".json", ".jsonl") and draw.random() < 0.7:
            lines = [data] if file.suffix == ".json" else data.splitlines()
            number = draw.randrange(len(lines))
            tree = json.loads(lines[number])
            sealed = isinstance(tree, dict) and tree.pop("seal", None) is not None
            if [*places(tree)]:
                what, tree = spoilt(tree, draw)
                try:
                    text = checksummed_json(tree) if sealed else json.dumps(tree).encode()
                except (TypeError, ValueError):  # is no JSON: written as Python would
                    text = json.dumps({**tree, "seal": "x"}).encode()
                lines[number] = text
                data = b"\n".join(lines)
        if not what:
            what, data = spoilt_bytes(data, draw)
        file.write_bytes(data)
        return f"{file.relative_to(copy)}: {what}", lambda: check_finite(read(copy))

    return family


def batches(place: Path) -> Family:
    """A saved batch."""
    return _files(_run(place).update, place, lambda path: [asdict(record) for record in load_batch(path)])


def recordings(place: Path) -> Family:
    """A recorded run of two steps."""
    model = loops.gpt2()
    loops.train(place / "recording", range(2), model, loops.adamw(model), snapshots=1)

    def read(path: Path) -> Any:
        recording = Recording.open(path)
        steps = [recording.step(step) for step in recording.steps]
        return [[asdict(record) for record in step.batch] for step in steps], recording.summary()

    return _files(place / "recording", place, read)


def results(place: Path) -> Family:
    """A study's results, read and shown."""
    from tests.bad_input.test_hostile_files import some_results

    some_results().save_results(place / "results")

    def read(path: Path) -> Any:
        loaded: Any = load_results(path)
        for result in loaded.requests.values():
            effects_table(result, 3)
        return [vars(result) for result in loaded.requests.values()]

    return _files(place / "results", place, read)


def checkpoints(place: Path) -> Family:
    """A checkpoint: configurations and tensors; and its optimizer's state, number by number."""
    run = _run(place)
    state = torch.load(run.before / "optimizer.pt", weights_only=True)

    def read(path: Path) -> Any:
        loaded = checkpoint.load(path)
        return {name: leaf.detach() for name, leaf in loaded.model.named_parameters()}, loaded.optimizer

    files = _files(run.before, place, read)

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        if draw.random() < 0.4:
            return files(draw)
        copy = place / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run.before, copy)
        what, tree = spoilt(state, draw)
        torch.save(tree, copy / "optimizer.pt")
        return f"optimizer.pt: {what}", lambda: check_finite(read(copy))

    return family


def probes(place: Path) -> Family:
    """A file of probes, of texts and of tokens."""
    run = _run(place)
    texts = {
        "name": "a",
        "prompt": "1+1=",
        "response": "2",
        "raw": True,
        "ended": True,
        "reward": 1,
        "metadata": {"k": 1},
    }
    tokens = {"id": "a", "prompt_ids": [40, 41], "response_ids": [42, 1], "reward": 0.5}
    plan = FisherKernelPlan.model_validate(run.plan(place / "out"))
    generator = plan.generator(plan.checkpoint.load(), plan.sources())
    file = place / "probes.jsonl"

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        row = draw.choice((texts, tokens))
        what, tree = spoilt([row, {**row, "id" if "id" in row else "name": "b"}], draw)
        data = "\n".join(json.dumps(row) for row in tree).encode()
        if draw.random() < 0.2:
            what, data = spoilt_bytes(data, draw)
        file.write_bytes(data)
        return what, lambda: check_finite([asdict(record) for record in read_probes(file, generator)])

    return family


# ---------------------------------------------------------------------------------------------- commands and functions


def commands(place: Path) -> Family:
    """Arguments of commands that end before they compute."""
    run = _run(place)
    (place / "plan.yaml").write_text(yaml.safe_dump(run.plan(place / "out")))
    from tests.bad_input.test_hostile_files import some_results

    some_results().save_results(place / "results")
    known = {"PLAN": place / "plan.yaml", "RESULTS": place / "results", "RUN": run.before, "BATCH": run.update}
    lines = (
        "plan check PLAN --json", "show RESULTS --rows 3 --request held_out", "show RESULTS --json", "report RESULTS",
        "explain RUN --batch BATCH --max-norm 1.0 --set step.path=start --log minimal",
        "account RUN --probes PLAN --out OUT --steps 1:2 --dtype float32", "recording show RUN --json",
        "replay RUN --probes PLAN --drop U-* --weigh a=1 --part kl=0 --upto 2", "influence RESULTS --rows 2",
        "query RESULTS a b", "ask RESULTS --rows 2", "plan init OUT/plan.yaml", "run PLAN --log x --rows 1",
        "sample PLAN",
        "estimate PLAN/x --n-u 0 --tokens 4 --memory 8GiB",
    )  # fmt: skip

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        given = [str(known.get(word, word)).replace("OUT", str(place / "new")) for word in draw.choice(lines).split()]
        for _ in range(draw.choice((1, 1, 2))):
            i = draw.randrange(1, len(given))
            word = draw.choice(TEXTS).replace("hub:", "hub-").encode(errors="replace").decode()
            if draw.random() < 0.6:
                given[i] = draw.choice((word, "nan", "-1", "10000000000000000000000", "1e999", str(known["RUN"])))
            else:
                given.insert(i, word)

        def call() -> None:
            result = CliRunner().invoke(app, given)
            raised = result.exception
            if raised is not None and not isinstance(raised, SystemExit):
                raise raised
            if "Traceback" in result.output or "\x1b]" in result.output:
                raise NotRightError("RAW output", result.output[-300:])
            if result.exit_code not in (0, 1, 2):
                raise NotRightError("RAW exit", f"exit code {result.exit_code}: {result.output[-200:]}")
            if result.exit_code:
                raise FKernelError(result.output or "no message")

        return " ".join(given)[:200], call

    return family


def _tensor(leaf: torch.Tensor, draw: random.Random) -> tuple[str, Any]:
    """Spoil a tensor: numbers, shape, dtype, kind."""
    changed = leaf.clone()
    most = torch.finfo(leaf.dtype).max if leaf.is_floating_point() else 0
    numbers = {"nan": math.nan, "inf": -math.inf, "huge": most, "tiny": 1e-320}
    others: dict[str, Callable[[], Any]] = {
        "short": lambda: changed.reshape(-1)[:-1],
        "long": lambda: torch.cat([changed.reshape(-1)] * 2),
        "flat": lambda: changed.reshape(-1),
        "deep": lambda: changed[None],
        "int": changed.long,
        "half": changed.half,
        "float32": changed.float,
        "complex": lambda: changed.to(torch.complex128),
        "meta": lambda: changed.to("meta"),
        "sparse": changed.to_sparse,
        "list": changed.tolist,
        "empty": lambda: changed.reshape(-1)[:0],
        "text": lambda: "x",
        "none": lambda: None,
    }
    how = draw.choice([*numbers, *others] if leaf.is_floating_point() else [*others])
    if how in others:
        return how, others[how]()
    changed.view(-1)[draw.randrange(changed.numel())] = numbers[how]
    return how, changed


def functions(place: Path) -> Family:
    """Transforms, kernels and steps, whose parameters, batch or microbatch is spoilt; held against plain autograd."""
    params = {"w": torch.linspace(-1, 1, 3, dtype=DTYPE), "b": torch.zeros((), dtype=DTYPE) + 0.1}

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        entry = draw.choice([*ENTRIES])
        given: dict[str, Any] = {"w": params["w"], "b": params["b"], "batch": vectors(), "microbatch": 2}
        name = draw.choice([*given])
        if name == "microbatch":
            how, given[name] = "value", junk(draw)
        elif name != "batch" and draw.random() < 0.2:
            how, _ = "gone", given.pop(name)
        else:
            how, given[name] = _tensor(given[name], draw)

        def call() -> None:
            own = {key: given[key] for key in ("w", "b") if key in given}
            found = ENTRIES[entry](plain, own, given["batch"], vectors(), given["microbatch"])
            check_finite(found)
            if entry == "per_sequence_grad":
                check_against(found, own, given["batch"])

        return f"{entry}: {how} {name}", call

    return family


def check_against(found: dict[str, torch.Tensor], params: dict[str, torch.Tensor], batch: Any) -> None:
    """Compare gradients with a loop of plain autograd."""
    for i, row in enumerate(batch):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        plain(leaves, row[None]).sum().backward()
        for name, leaf in leaves.items():
            truth = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if not torch.allclose(found[name][i], truth, rtol=1e-6 if leaf.dtype == DTYPE else 1e-3, atol=1e-9):
                raise NotRightError("OTHER", f"the gradient of {name!r} of sequence {i} is another")


def steps(place: Path) -> Family:
    """Optimizers' states, preconditioners and steps, whose tensors or settings are spoilt."""
    from fkernel import precond

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        params = {"w": torch.linspace(-1, 1, 3, dtype=DTYPE), "v": torch.ones(2, 2, dtype=DTYPE)}
        grads = pytree.tree_map(lambda leaf: leaf + 0.5, params)
        named: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        name, how = draw.choice(("params", "grads", "setting")), ""
        if name == "setting":
            key = draw.choice([*named])
            how, named[key] = key, junk(draw)
        else:
            tree: dict[str, Any] = params if name == "params" else grads
            key = draw.choice([*tree])
            if draw.random() < 0.2:
                how, _ = f"no {key}", tree.pop(key)
            else:
                how, tree[key] = _tensor(tree[key], draw)
        which = draw.choice(("adamw_step", "adam", "adamw_response", "diagonal", "clip_factor"))

        def call() -> None:
            if which == "diagonal":
                made = precond.diagonal(params)(grads)  # a linear map: a NaN that goes in comes out
                return check_finite({} if how in ("nan", "inf", "huge") else made)
            if which == "clip_factor":
                return check_finite(precond.clip_factor(grads, named["lr"]))
            state = precond.adamw_init(params, **named)
            if which == "adamw_step":
                return check_finite(tuple(precond.adamw_step(params, grads, state)))
            P = precond.adam(state, grads) if which == "adam" else precond.adamw_response(state, grads)
            return check_finite(P(grads))

        return f"{which}: {name} {how}", call

    return family


def analyses(place: Path) -> Family:
    """Questions to a kernel, whose numbers or options are spoilt."""
    from fkernel import analysis, engine

    predicted, realised = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.1, 3.9])
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "calibrate": (engine.calibrate, {"predicted": predicted, "realised": realised}),
        "kernel_pca": (analysis.kernel_pca, {"K": torch.eye(4, dtype=DTYPE)}),
        "resamplings": (analysis.resamplings, {"groups": torch.tensor([0, 0, 1]), "draws": 20, "seed": 0}),
    }

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        which = draw.choice([*calls])
        function, arguments = calls[which]
        given = dict(arguments)
        key = draw.choice([*given])
        if isinstance(given[key], torch.Tensor):
            how, given[key] = _tensor(given[key], draw)
        else:
            how, given[key] = "value", junk(draw)
        return f"{which}: {how} {key}", lambda: check_finite(function(*given.values()))

    return family


def hostile(place: Path) -> Family:
    """Files that would run code or take all memory; see `tests/bad_input/test_hostile_files.py`."""
    from tests.bad_input import test_hostile_files as files

    cases = files.made_cases(place)
    marker = place / "executed"
    every = files.attacks(marker)

    def family(draw: random.Random) -> tuple[str, Callable[[], Any]]:
        name, attack = draw.choice(files.CASES), draw.choice([*every])
        copy = place / "hostile"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(cases[name].place, copy)
        file = one_file(copy, draw)
        file.write_bytes(every[attack])

        def call() -> None:
            try:
                cases[name].read(copy)
            finally:
                if marker.exists():
                    raise NotRightError("EXECUTED", "a file was executed")

        return f"{name}/{file.relative_to(copy)}: {attack}", call

    return family


FAMILIES: dict[str, tuple[int, Callable[[Path], Family]]] = {
    "plans": (30, plans),
    "batches": (10, batches),
    "probes": (10, probes),
    "recordings": (8, recordings),
    "results": (10, results),
    "checkpoints": (8, checkpoints),
    "hostile files": (3, hostile),
    "commands": (6, commands),
    "functions": (15, functions),
    "steps": (15, steps),
    "analyses": (10, analyses),
    "public functions": (50, public),
}
"""{name: (its share of the trials, what makes it)}."""
