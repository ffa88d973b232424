"""One tiny prepared run for the whole folder."""

from pathlib import Path

import pytest

from fkernel.demo import DemoConfig, PolicyConfig, ReinforceConfig, SupervisionConfig, TaskConfig, prepare

# Eighteen problems with few answers: a tiny policy is right often enough for a gradient.
TINY = DemoConfig(
    task=TaskConfig(low=10, high=12, held_out=4),
    policy=PolicyConfig(layers=2, width=32, heads=2, mlp=64),
    supervision=SupervisionConfig(batch=32, lr=3e-3, warmup=5, max_steps=60, check_every=30, band=(0.0, 1.0)),
    reinforce=ReinforceConfig(steps=2, prompts=4, completions=6, min_groups=1),
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny() -> DemoConfig:
    return TINY


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(TINY, tmp_path_factory.mktemp("cache"))
