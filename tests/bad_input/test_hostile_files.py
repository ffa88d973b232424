"""Every file that is read may be hostile: nothing in it is executed, and none takes all memory or leads elsewhere.

Each reader is given, in place of each of its files, a pickle that would run code, archives that unpack to more than
they are, headers that claim 10 GB, deep nesting, tags. A module that begins to read files is to be added here.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

import fkernel as fk
from fkernel import checkpoint
from fkernel.checkpoint.weights import read_safetensors
from fkernel.engine.store import open_store
from fkernel.record import Recording
from fkernel.record.dumps import Options, locate
from fkernel.report import load_results
from fkernel.rollout import jsonl, load_batch, read_probes
from fkernel.study import (
    FisherKernelPlan,
    FisherKernelResults,
    FisherKernelRunner,
    RequestResult,
    SequenceInfo,
    entry_of,
    load_workspace,
    read_plan,
)
from tests import offline
from tests.checkpoint.writers import WRITERS, qwen2
from tests.formats.archives import unpack
from tests.formats.places import load as load_packed
from tests.record import dumped, loops
from tests.rollout.conftest import byte_tokenizer
from tests.store.common import GROUPS, IDENTITY, fill
from tests.study.conftest import made

SOURCE = Path(fk.__file__).parent
ROOM = 400 << 20
"""Bytes that reading a hostile file may take."""
CLAIM = 10**10
DEEPSPEED, FSDP = "deepspeed_zero2_fp32", "accelerate_fsdp2_ranks"


class Code:
    """What a hostile pickle runs."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


class Case(NamedTuple):
    """A reader and its files."""

    place: Path
    read: Callable[[Path], Any]


# ------------------------------------------------------------------------------------------------------------- readers

MODULES = {
    "checkpoint": ("checkpoint/files.py", "checkpoint/model.py", "checkpoint/weights.py", "checkpoint/arguments.py"),
    "distributed": (
        *("checkpoint/distributed.py", "checkpoint/skeleton.py"),
        *("checkpoint/shards.py", "checkpoint/in_shards.py"),
    ),
    "formats": (
        *("checkpoint/formats/deepspeed/places.py", "checkpoint/formats/fsdp/places.py"),
        *("checkpoint/formats/fsdp/reading.py", "record/policy.py"),
    ),
    "batch": ("rollout/files.py", "io/checksummed.py", "io/documents.py"),
    "prompts": ("rollout/prompts.py",),
    "dump": ("record/dumps/lines.py", "record/dumps/open_instruct.py", "record/dumps/trl.py"),
    "store": ("engine/store/directory.py", "engine/store/journal.py", "io/direct.py"),
    "recording": ("record/directory.py",),
    "results": ("study/sealed.py",),
    "plan": ("study/config/io.py", "study/checks.py", "rollout/probes.py"),
    "workspace": ("study/directory.py", "study/accounts/stopped.py"),
}
OWN = {
    "cli/writing.py": "the names in its own results, read by the same parser",
    "demo/cache.py": "its own source and sizes",
    "demo/explain.py": "its own plan",
    "distributed/agreement.py": "what rank 0 sent, through the group that the ranks made",
    "distributed/launcher.py": "/proc",
    "engine/planning/machine.py": "its own rates, read by the same parser; /proc",
    "io/atomic.py": "opens to flush",
    "io/lines.py": "looks for the end of its own lines",
    "io/locks.py": "a lock's process id",
    "io/temporary.py": "/proc",
    "report/page/document.py": "its own scripts",
    "study/accounts/results.py": "opens to write",
    "study/sources.py": "hashes Python files",
}
READING = {
    *("open", "read_text", "read_bytes", "load_file", "load_tensors", "safe_open", "read_table", "read_schema"),
    *("from_pretrained", "load_from_disk", "ZipFile", "Unpickler", "_Restricted", "memmap", "fromfile", "loadtxt"),
    *("torch.load", "np.load", "pickle.load", "pickle.loads", "json.load", "yaml.safe_load", "yaml.load", "os.preadv"),
}


def test_every_module_that_reads_files_is_known():
    known = {*OWN, *(module for modules in MODULES.values() for module in modules)}
    reading = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if calls_of(path) & READING}
    assert reading - known == set(), "say above which case reads its files, or whose they are"
    assert known - reading - {"io/checksummed.py", "io/documents.py"} == set()


def test_json_of_files_has_one_parser():
    """Others take the last of two keys, and raise RecursionError."""
    copies = "json.loads(json.dumps("
    for path in SOURCE.rglob("*.py"):
        text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if ">>>" not in line)
        own = text.count("json.loads(") - text.count(copies)
        assert own == (path.name == "documents.py"), path


def test_code_that_came_with_a_model_is_never_executed_unasked():
    """Whoever loads by transformers passes on what the user said; by default that is no."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") in ("trust_remote_code", "False"), ast.unparse(node)
                assert "local_files_only" in given
            if isinstance(node, ast.arg | ast.keyword) and node.arg == "trust_remote_code":
                assert "True" not in ast.unparse(node)
    plan = FisherKernelPlan.model_validate(
        {"checkpoint": {"path": "x"}, "update": {"kind": "from_file", "path": "y"}, "out": "z"}
    )
    assert plan.checkpoint.trust_remote_code is False


def calls_of(path: Path) -> set[str]:
    """The names of functions that a module calls, with and without what they are of."""
    nodes = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = {ast.unparse(node) for node in nodes} - {"Recording.open"}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) in names}


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def cases(place) -> dict[str, Case]:
    return made_cases(place)


def made_cases(place: Path) -> dict[str, Case]:
    """Each reader, with files as they should be."""
    (place / "run").mkdir()
    run = made(place / "run")
    WRITERS["distributed"](place / "distributed")
    lines = place / "lines"
    lines.mkdir()
    shutil.copy(run.train, lines / "train.jsonl")
    dumped.open_instruct(place / "dump", 1, dumped.some_rows())
    options = Options(tokenizer=byte_tokenizer(), vocabulary=300, max_new_tokens=8)
    model = loops.gpt2()
    loops.train(place / "recording", range(2), model, loops.adamw(model), snapshots=1)
    with open_store(place / "store", IDENTITY, GROUPS) as store:
        fill(store)
    (place / "results").mkdir()
    some_results().save_results(place / "results")
    (place / "plan").mkdir()
    (place / "plan" / "plan.yaml").write_text(yaml.safe_dump(run.plan(place / "out")))
    (place / "plan" / "plan.json").write_text(json.dumps(run.plan(place / "out")))
    (place / "plan" / "probes.jsonl").write_text('{"prompt_ids": [3], "response_ids": [4]}\n')
    runner = FisherKernelRunner(run.plan(place / "out"))
    with runner.prepare_update_workspace():
        generator = runner.generator
    packed = {name: unpack(name, place / name) / "checkpoint" for name in (DEEPSPEED, FSDP)}
    return {
        "checkpoint": Case(run.before, checkpoint.load),
        "distributed": Case(place / "distributed", lambda path: checkpoint.load(path, model=qwen2())),
        "deepspeed": Case(packed[DEEPSPEED], lambda path: load_packed(DEEPSPEED, path)),
        "fsdp": Case(packed[FSDP], lambda path: load_packed(FSDP, path)),
        "batch": Case(run.update, load_batch),
        "prompts": Case(lines, lambda path: [*jsonl(path / "train.jsonl")]),
        "dump": Case(place / "dump", lambda path: locate(path, 1).batch(options)),
        "recording": Case(place / "recording", _read_recording),
        "store": Case(place / "store", _read_store),
        "results": Case(place / "results", load_results),
        "plan": Case(place / "plan", lambda path: _read_plans(path, generator)),
        "workspace": Case(place / "out" / "workspace", _read_workspace),
    }


def some_results() -> FisherKernelResults:
    """Results of one sequence."""
    info = SequenceInfo("E-000-00", "1+1=", "2", -1.0)
    one = np.ones(1, dtype=np.float32)
    found = RequestResult("held_out", "evaluation", (info,), (info,), batch=one, realised=one)
    plan = {"preconditioner": {"calibrated": True}}
    return FisherKernelResults(plan, {}, (info,), {"clip": 1.0, "grad_norm": 1.0}, None, {"held_out": found})


def _read_recording(path: Path) -> None:
    recording = Recording.open(path)
    for step in recording.steps[:1]:
        assert recording.step(step).batch
    recording.snapshot(recording.snapshots[0])


def _read_store(path: Path) -> None:
    with open_store(path, IDENTITY, GROUPS) as store:
        for i in range(len(GROUPS)):
            store.read(i)


def _read_plans(path: Path, generator: Any) -> None:
    read_plan(path / "plan.yaml", FisherKernelPlan)
    read_plan(path / "plan.json", FisherKernelPlan)
    read_probes(path / "probes.jsonl", generator)


def _read_workspace(path: Path) -> None:
    with load_workspace(path) as workspace:
        entry_of(workspace, *(workspace.cache(name) for name in workspace.batch.ids[:2]))


CASES = ("checkpoint", "distributed", "deepspeed", "fsdp", "batch", "prompts", "dump", "recording", "store", "results")
CASES += ("plan", "workspace")


# -------------------------------------------------------------------------------------------------------------- attacks


def zipped(names: dict[str, bytes], how: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return file.getvalue()


def attacks(marker: Path) -> dict[str, bytes]:
    """{what a file holds: its bytes}."""
    saved, arrays = io.BytesIO(), io.BytesIO()
    torch.save({"state": {}, "param_groups": [], "code": Code(marker)}, saved)
    np.savez(arrays, kernel=np.array([Code(marker)], dtype=object), allow_pickle=True)
    header = json.dumps({"x": {"dtype": "F32", "shape": [CLAIM], "data_offsets": [0, 4 * CLAIM]}}).encode()
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "<f8", "fortran_order": False, "shape": (CLAIM,)})
    bomb = bytes(64 << 20)
    return {
        "pickle": pickle.dumps(Code(marker)),
        "torch": saved.getvalue(),
        "numpy": arrays.getvalue(),
        "zip bomb": zipped({"archive/data.pkl": bomb, "kernel.npy": bomb}, zipfile.ZIP_DEFLATED),
        "large array": zipped({"kernel.npy": npy.getvalue()}, zipfile.ZIP_STORED),
        "large header": (CLAIM).to_bytes(8, "little") + b"{}",
        "large tensor": len(header).to_bytes(8, "little") + header,
        "deep": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000,
        "tags": f"!!python/object/apply:os.mkdir [{str(marker)!r}]".encode(),
        "empty": b"",
        "no text": b"\xff\xfe\x00\x80" * 9,
    }


SHARES = 4


def outcome(case: Case, place: Path) -> str:
    """What is wrong with how a reader takes its files; "" where it refuses them by an error of ours, or reads them."""
    try:
        case.read(place)
    except fk.FKernelError as error:
        return "" if str(error) else "no message"
    except Exception as error:
        return f"{type(error).__name__} {error}"[:400]
    return ""


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused(cases, name, tmp_path):
    """Whatever a file holds in place of its own content, reading ends in an error of ours, or needs it not.

    Each file has its share of the attacks here, and `make torture` tries all of them.
    """
    case, marker = cases[name], tmp_path / "executed"
    copy = tmp_path / "copy"
    shutil.copytree(case.place, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.read(copy)  # it is fine as it is
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        every = [*attacks(marker).items()]
        for number, file in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
            content = file.read_bytes()
            for what, hostile in every[number % SHARES :: SHARES]:
                file.write_bytes(hostile)
                assert outcome(case, copy) == "", f"{file.relative_to(copy)} as {what}"
                assert not marker.exists(), f"{file.relative_to(copy)} as {what} was executed"
            file.write_bytes(content)
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) < ROOM


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", 3, "a\0b"]
)
def test_an_index_names_files_of_its_own_directory_only(cases, tmp_path, name):
    model = tmp_path / "run" / "model"
    shutil.copytree(cases["checkpoint"].place / "model", model)
    shutil.move(model / "model.safetensors", tmp_path / "run" / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(fk.ModelError, match=r"no index of weights"):
        checkpoint.load(tmp_path / "run")
    with pytest.raises(fk.CheckpointError, match="cannot be read"):
        read_safetensors(model)


def test_a_trainer_s_note_names_no_other_directory(cases, tmp_path):
    place = cases["deepspeed"].place
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    (copy / "latest").write_text("../../elsewhere")
    with pytest.raises(fk.CheckpointError, match="which is not in its directory"):
        load_packed(DEEPSPEED, copy)


def test_nothing_reaches_another_machine():
    """The whole suite runs so; `tests/conftest.py` says how."""
    with pytest.raises(AssertionError, match="reached for"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(AssertionError, match="reached for"):
        socket.getaddrinfo("example.org", 80)
    assert offline.REACHED == ["192.0.2.1", "example.org"]
    offline.REACHED.clear()
