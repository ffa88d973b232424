"""A prepared directory is made once, keyed by all that determines it, and never half there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fkernel.demo import DemoConfig, cache_key, default_cache_root, prepare
from fkernel.demo import cache as cache_module
from tests.test_structure import imported_modules


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A cache of one's own that holds the tiny run."""
    shutil.copytree(prepared, tmp_path / prepared.name)
    return tmp_path


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(cache_module, "_make", never)


def test_the_second_call_makes_nothing(root: Path, tiny: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    assert prepare(tiny, root) == root / cache_key(tiny)


def test_the_layout_is_complete(prepared: Path) -> None:
    files = {p.relative_to(prepared).as_posix() for p in prepared.rglob("*") if p.is_file()}
    assert files >= {
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "optimizer.pt",
        "update/manifest.json",
        "train.jsonl",
        "test.jsonl",
        "step.json",
        "after/model/model.safetensors",
        "complete.json",
    }
    assert [p.name for p in prepared.parent.iterdir()] == [prepared.name]


def test_any_change_of_configuration_changes_the_key(tiny: DemoConfig) -> None:
    variants = [
        tiny,
        replace(tiny, task=replace(tiny.task, seed=1)),
        replace(tiny, policy=replace(tiny.policy, seed=1)),
        replace(tiny, supervision=replace(tiny.supervision, lr=1.0)),
        replace(tiny, reinforce=replace(tiny.reinforce, lr=1.0)),
        replace(tiny, threads=2),
    ]
    assert len({cache_key(v) for v in variants}) == len(variants)
    assert cache_key(tiny) == cache_key(replace(tiny))


def test_source_and_versions_belong_to_the_key(tiny: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache_key(tiny)}
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "versions", lambda: {"torch": "0"})
        keys.add(cache_key(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "sources", lambda: {"task": ""})
        keys.add(cache_key(tiny))
    assert len(keys) == 3


def test_whatever_a_source_imports_is_a_source_too() -> None:
    """So that an edit of anything that decides what is computed makes the policy again."""
    texts = cache_module.sources()
    assert {"demo/policy.py", "demo/training.py", "rollout/sampling.py", "func/inputs/batch.py"} <= texts.keys()
    rooms = {
        (place.split("/")[0], module.split(".")[1])
        for place, text in texts.items()
        if place != "__main__.py"  # starts the commands, and is imported by nothing
        for _, module in imported_modules(text, f"fkernel.{place.removesuffix('.py').replace('/', '.')}")
        if module.startswith("fkernel.")
    }
    outside = {pair for pair in rooms if pair[1] in cache_module.AFTERWARDS}
    assert outside <= {
        ("checkpoint", "precond"),
        ("checkpoint", "engine"),
    }  # the optimizer's state, and what a run costs


def test_a_run_that_fails_leaves_nothing(root: Path, tiny: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: DemoConfig, directory: Path, *_: object) -> None:
        (directory / "optimizer.pt").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "_make", interrupted)
    before = sorted(root.iterdir())
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(tiny, threads=2), root)
    assert sorted(root.iterdir()) == before


def test_a_half_written_sibling_is_ignored(root: Path, tiny: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    half = root / f"{cache_key(tiny)[:12]}.partial-killed"
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    forbid(monkeypatch)
    assert prepare(tiny, root) == root / cache_key(tiny)


@pytest.mark.parametrize("damage", ["missing", "short", "unmarked"])
def test_a_damaged_directory_is_made_again(
    root: Path, tiny: DemoConfig, monkeypatch: pytest.MonkeyPatch, damage: str, prepared: Path
) -> None:
    final = root / cache_key(tiny)
    if damage == "missing":
        (final / "optimizer.pt").unlink()
    elif damage == "short":
        (final / "optimizer.pt").write_bytes(b"half")
    else:
        (final / "complete.json").unlink()
    assert not cache_module.is_complete(final)

    def copied(config: DemoConfig, directory: Path, *_: object) -> None:
        shutil.copytree(prepared, directory, dirs_exist_ok=True)

    monkeypatch.setattr(cache_module, "_make", copied)
    assert prepare(tiny, root) == final
    assert cache_module.is_complete(final)


def test_the_same_configuration_makes_the_same_bytes(prepared: Path, tiny: DemoConfig, tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = prepare(tiny, tmp_path)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for name in (
        "update/records.jsonl",
        "update/tokens.safetensors",
        "test.jsonl",
        "model/model.safetensors",
        "after/model/model.safetensors",
    ):
        assert (again / name).read_bytes() == (prepared / name).read_bytes(), name


def test_the_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FKERNEL_CACHE", str(tmp_path))
    assert default_cache_root() == tmp_path
    monkeypatch.delenv("FKERNEL_CACHE")
    assert default_cache_root() == Path.home() / ".cache" / "fkernel"
