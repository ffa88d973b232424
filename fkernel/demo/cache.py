"""The cache of prepared policies: a directory named by a hash of everything that determines its contents.

<root>/<key>/
  model/            the policy before the last step: config, safetensors, tokenizer
  optimizer.pt      AdamW's state_dict before the last step, parameter names recorded
  update/           U: the last step's batch, with advantages and loss weights (`fkernel.rollout.load_batch`)
  train.jsonl       the training problems, one per line; test.jsonl the held-out ones
  after/model/      the policy after the last step
  step.json         the numbers of the run
  complete.json     sizes of all other files; written last
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from rich.progress import Progress

from fkernel.demo.export import write_json, write_prompts
from fkernel.demo.policy import PolicyConfig, SupervisionConfig, build_model, count_parameters, supervise
from fkernel.demo.task import TaskConfig, splits
from fkernel.demo.tokenizer import build_tokenizer
from fkernel.demo.training import ReinforceConfig, reinforce
from fkernel.io import (
    atomic_directory,
    check_writable,
    default_cache_root,
    hash_json,
    make_directory,
    parse_json,
    remove_directory,
)
from fkernel.rollout import SampleGenerator, Sampling

COMPLETE = "complete.json"
# Source files that do not affect the contents; all others are in the key.
AFTERWARDS = {"__init__.py", "analysis", "cli", "engine", "precond", "record", "report", "study"}
BESIDE = {"demo/explain.py", "demo/progress.py"}
PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class DemoConfig:
    """Everything that can be chosen about the demo's policy.

    Attributes:
        task: the problems.
        policy: the model.
        supervision: its training.
        reinforce: the RL steps.
        threads: torch threads. One, since tensors this small gain little from two, which are ten times slower on a
            busy machine, and so that sums do not depend on the number of cores.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    threads: int = 1


def seeded(seed: int) -> DemoConfig:
    """The default configuration with all of its seeds set to one number."""
    return DemoConfig(
        TaskConfig(seed=seed), PolicyConfig(seed=seed), SupervisionConfig(seed=seed), ReinforceConfig(seed=seed)
    )


def versions() -> dict[str, str]:
    """Versions of the packages that determine the contents."""
    return {name: metadata.version(name) for name in PACKAGES}


def sources() -> dict[str, str]:
    """Source text of the modules that determine the contents, by path in the package."""
    package = Path(__file__).parents[1]
    files = [path.relative_to(package) for path in package.rglob("*.py")]
    kept = [path for path in files if path.parts[0] not in AFTERWARDS and path.as_posix() not in BESIDE]
    return {path.as_posix(): (package / path).read_text(encoding="utf-8") for path in kept}


def cache_key(config: DemoConfig) -> str:
    """SHA-256 over the configuration, source text and packages' versions, in hex."""
    return hash_json({"config": asdict(config), "sources": sources(), "versions": versions()})


def is_complete(directory: Path) -> bool:
    """Whether a prepared directory has all files of `COMPLETE`, with their sizes."""
    try:
        sizes: dict[str, int] = parse_json((directory / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((directory / name).is_file() and (directory / name).stat().st_size == n for name, n in sizes.items())


def prepare(config: DemoConfig, cache_root: Path | None = None, progress: Progress | None = None) -> Path:
    """Train the policy, take the RL steps and save the last one; or return the cached directory.

    Files are written to a temporary sibling directory that is renamed when it is complete.

    Args:
        config: the configuration.
        cache_root: parent of prepared directories; `default_cache_root` if None.
        progress: progress bars; None for none.

    Returns:
        The prepared directory (its files are listed at the top of this module).

    Raises:
        DemoError: the policy missed its accuracy band, or the last batch has too little signal.
    """
    root = default_cache_root() if cache_root is None else cache_root
    key = cache_key(config)
    final = root / key
    if is_complete(final):
        return final
    check_writable(make_directory(root))
    try:
        with atomic_directory(final) as work:
            with _threads(config.threads):
                _make(config, work, key, progress)
            if final.exists() and not is_complete(final):  # damaged
                remove_directory(final)
    except OSError:  # another process may have completed it meanwhile
        if not is_complete(final):
            raise
    return final


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run the block on ``count`` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make(config: DemoConfig, directory: Path, key: str, progress: Progress | None) -> None:
    """Write all files of ``directory``, `COMPLETE` last."""
    prompts, tokenizer = splits(config.task), build_tokenizer()
    sampling = Sampling(config.reinforce.temperature, max_new_tokens=config.reinforce.max_new_tokens)
    model = build_model(config.policy, tokenizer)
    policy = SampleGenerator(model, tokenizer, prompts, sampling=sampling, template="bare", microbatch=256)
    began = time.perf_counter()
    supervised = supervise(policy, prompts, config.supervision, progress)
    supervised_at = time.perf_counter()
    steps = reinforce(policy, config.reinforce, directory, progress)
    write_prompts(directory, prompts)
    facts = {
        **asdict(steps[-1]),
        "steps_before": len(steps) - 1,
        "history": [asdict(step) for step in steps],
        "key": key,
        "config": asdict(config),
        "parameters": count_parameters(model),
        "supervision": asdict(supervised),
        "seconds": {"supervision": supervised_at - began, "reinforce": time.perf_counter() - supervised_at},
        "versions": versions(),
    }
    write_json(directory / "step.json", facts)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    write_json(directory / COMPLETE, {p.relative_to(directory).as_posix(): p.stat().st_size for p in files})
