"""Checks before anything is computed: the files that a plan names, and its output directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from fkernel.checkpoint import STATE_PLACES, find_layout, has_no_optimizer
from fkernel.errors import FKernelError, PlanError, ResultsError, listing
from fkernel.io import check_writable, locked, make_directory, parse_json
from fkernel.rollout import GeneratedBatch, dotted
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import UpdateBatch
from fkernel.study.in_shards import does_not_go_in_shards
from fkernel.study.known_ids import ids_of, saved_batch, unknown_ids, unknown_tokens
from fkernel.study.outcome import RequestResult, info_of
from fkernel.study.results import BATCHES, OWN, FisherKernelResults
from fkernel.study.sources import dotted_names


def check_inputs(plan: FisherKernelPlan) -> None:
    """Find what can be found before anything is computed: files, functions, packages, checkpoints, batches, ids.

    Args:
        plan: as `as_recorded` returns it.

    Raises:
        PlanError: a line for everything that is wrong, with the key in the plan.
    """
    wrong = [
        *does_not_go_in_shards(plan),
        *_missing_files(plan),
        *_functions(plan),
        *_packages(plan),
        *_device(plan.numerics.device),
    ]
    gone = {line.partition(":")[0] for line in wrong}
    wrong += [line for line in _checkpoints(plan) if line.partition(":")[0] not in gone]
    vocabulary = _vocabulary(plan.checkpoint)
    ids, unreadable = dict[str, list[str] | None](), list[str]()
    sources = {"update": plan.update, **{f"requests.{i}": request for i, request in enumerate(plan.requests)}}
    for place, source in sources.items():
        ids[place] = None
        if f"{place}.path" in gone:
            continue
        try:
            saved = saved_batch(source, plan.checkpoint)
        except FKernelError as error:
            unreadable.append(f"{place}: {error}")
            continue
        ids[place] = ids_of(source, saved, ids["update"])
        if saved is not None and vocabulary is not None:
            unreadable += unknown_tokens(place, saved, vocabulary)
    wrong += unreadable
    wrong += unknown_ids(plan, ids["update"], [ids[f"requests.{i}"] for i in range(len(plan.requests))])
    if wrong:
        raise PlanError("\n".join(wrong))


def _missing_files(plan: FisherKernelPlan) -> list[str]:
    named = {"checkpoint.path": plan.checkpoint.place, "checkpoint.base": plan.checkpoint.base}
    named["checkpoint.model"] = plan.checkpoint.model
    named["checkpoint.names"] = names if isinstance(names := plan.checkpoint.names, str) else None
    if plan.step.after is not None:
        named["step.after.path"] = plan.step.after.place
    if plan.step.loss is not None:
        named |= {f"step.loss.{place}.path": one.place for place, one in plan.step.loss.checkpoints.items()}
    for i, prompts in enumerate(plan.prompts):
        named[f"prompts.{i}.jsonl"], named[f"prompts.{i}.dataset"] = prompts.jsonl, prompts.dataset
    every = {"analyses": plan.analyses, **{f"requests.{i}.analyses": r.analyses for i, r in enumerate(plan.requests)}}
    for place, analyses in every.items():
        for observable in () if analyses is None else analyses.observables:
            if observable.reference is not None:
                named[f"{place}.observables.{observable.name}.reference.path"] = observable.reference.place
    named["update.path"] = getattr(plan.update, "path", None)
    named |= {f"requests.{i}.path": getattr(request, "path", None) for i, request in enumerate(plan.requests)}
    return [
        f"{place}: there is nothing at {path}; expected a file or a directory."
        for place, path in named.items()
        if path is not None and not str(path).startswith("hub:") and not Path(path).exists()
    ]


def _functions(plan: FisherKernelPlan) -> list[str]:
    """Import the functions that a plan names, as the run will."""
    lines = []
    for name in sorted(dotted_names(plan.model_dump(mode="json"))):
        try:
            dotted(name, "a function that can be imported, as module.function, from the working directory or a package")
        except FKernelError as error:
            lines.append(str(error))
    return lines


def _packages(plan: FisherKernelPlan) -> list[str]:
    """Packages beyond a plain install that a plan cannot do without."""
    needed = dict[str, tuple[str, str]]()
    for i, prompts in enumerate(plan.prompts):
        if prompts.task is not None:
            needed[f"prompts.{i}.task"] = ("reasoning_gym", "rollout")
        if prompts.dataset is not None:
            needed[f"prompts.{i}.dataset"] = ("datasets", "rollout")
    drawn = {"update": plan.update, **{f"requests.{i}": request for i, request in enumerate(plan.requests)}}
    for place, source in drawn.items():
        own = isinstance(source, UpdateBatch) and source.is_own
        rewards = None if own else getattr(source, "reward", None)
        if rewards == "math" or (isinstance(rewards, dict) and "math" in rewards.values()):
            needed[f"{place}.reward"] = ("math_verify", "rollout")
    if (Path(plan.checkpoint.place) / "adapter_config.json").is_file():
        needed["checkpoint.path"] = ("peft", "peft")
    return [
        f"{place}: needs {package.replace('_', '-')}, which is not installed: pip install 'fkernel[{extra}]'."
        for place, (package, extra) in needed.items()
        if find_spec(package) is None
    ]


def _device(name: str) -> list[str]:
    """Whether a device is there, and computes."""
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        return [f"numerics.device: {name!r} computes nothing here ({reason}); expected cpu, cuda or cuda:0."]
    return []


def _checkpoints(plan: FisherKernelPlan) -> list[str]:
    """What the files of checkpoints tell without being loaded."""
    path, lines = plan.checkpoint.path, list[str]()
    after = plan.step.after
    if after is not None and after.path is not None:
        lines += _unrecognised("step.after.path", after.path)
    if path is None or path.startswith("hub:"):
        return lines
    if not Path(path).exists():
        return lines
    if found := _unrecognised("checkpoint.path", path):
        return lines + found
    layout, bare = find_layout(path), plan.preconditioner.form == "identity"
    if not bare and plan.step.optimizer is None and (not plan.checkpoint.optimizer or has_no_optimizer(layout, path)):
        inside = sorted((item.name for item in Path(path).glob("checkpoint-*") if item.is_dir()), key=_by_number)
        below = f" In it are {listing(inside)}: name the one before the step." if inside else ""
        lines.append(
            f"checkpoint.path: {path} has no optimizer state, and the preconditioner {plan.preconditioner.form!r} "
            f"needs one.{below} Expected {STATE_PLACES[0]} or the like; else give the optimizer of a run's first step "
            f"(step.optimizer), or preconditioner: {{form: identity}}."
        )
    if plan.template == "chat" and (place := _without_chat(layout.places, plan.checkpoint)):
        lines.append(f"template: the tokenizer at {place} has no chat template; choose gsm8k_r1 or bare.")
    return lines


def _unrecognised(place: str, path: str) -> list[str]:
    if path.startswith("hub:") or not Path(path).exists():
        return []
    try:
        find_layout(path)
    except FKernelError as error:
        return [f"{place}: {error}"]
    return []


def _without_chat(places: Iterable[Path], checkpoint: CheckpointPlan) -> Path | None:
    """Find the tokenizer's configuration where there is no chat template in or beside it; None where there is one."""
    folders = [*places, *(Path(each) for each in (checkpoint.base, checkpoint.model) if each is not None)]
    own = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    if not own:
        return None
    try:
        config = parse_json((own[0] / "tokenizer_config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    return None if config.get("chat_template") or any((own[0] / name).exists() for name in files) else own[0]


def _vocabulary(checkpoint: CheckpointPlan) -> int | None:
    """Tokens of the model by its config.json; None where only the model tells, as of an adapter, which may add some."""
    if checkpoint.path is None or checkpoint.base is not None or not Path(checkpoint.path).exists():
        return None
    try:
        folders = [*find_layout(checkpoint.path).places, *map(Path, filter(None, [checkpoint.model]))]
        own = [folder for folder in folders if (folder / "config.json").is_file()]
        if not own or any((folder / "adapter_config.json").is_file() for folder in folders):
            return None
        config = parse_json((own[0] / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"])
    except (FKernelError, OSError, ValueError, TypeError, KeyError):  # loading says what is wrong, in full
        return None


def _by_number(name: str) -> tuple[int, str]:
    return len(name), name


def missed_pairs(plan: FisherKernelPlan, requests: Mapping[str, RequestResult]) -> list[str]:
    """Warnings for the plan's pairs whose row is in no request."""
    rows = {entry.row for result in requests.values() for entry in result.selected}
    missed = sorted({row for row, _ in plan.capture.pairs} - rows)
    return [f"capture.pairs: no request has a sequence {row!r}; nothing was kept for it" for row in missed]


def check_out(plan: FisherKernelPlan, overwrite: bool = False) -> None:
    """Check that `out` does not hold another plan's results, and that it and the workspace can be written to.

    Raises:
        PlanError: the plan's `out` is a file, or holds results of another plan.
        StoreError: the disk is full, or does not let us write.
    """
    out = Path(plan.out)
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out} is a file; results need a directory (out:).")
    check_writable(out)
    if plan.storage.persist:
        check_writable(Path(plan.workspace_path))
    recorded = out / "environment.json"
    if overwrite or not recorded.is_file():
        return
    try:
        before = parse_json(recorded.read_text(encoding="utf-8")).get("plan_hash")
    except ValueError:
        before = None
    if before != plan.hash:
        raise PlanError(
            f"{out} holds results of another plan (hash {str(before)[:12]}, this one's is {plan.hash[:12]}); choose "
            f"another directory (--out, or out: in the plan), or replace them with --overwrite."
        )


@contextmanager
def claimed(plan: FisherKernelPlan, overwrite: bool = False) -> Iterator[Path]:
    """Hold a plan's `out` against other processes, and check that it does not hold another plan's results.

    Args:
        plan: whose.
        overwrite: whether other results may be replaced.

    Yields:
        The directory; it exists, and is locked within the block.

    Raises:
        PlanError: as `check_out`.
        StoreError: another process holds it, or it cannot be made.
    """
    check_out(plan, overwrite)
    with locked(out := make_directory(Path(plan.out)), "lock"):
        check_out(plan, overwrite)  # another process may have finished in between
        yield out


def check_saved_batch(place: str | Path, batch: GeneratedBatch) -> None:
    """Check that a saved batch is the one that the results beside it are about, by content and not only by ids.

    Args:
        place: where the batch was read from; outside a study's directory nothing is checked.
        batch: the batch.

    Raises:
        ResultsError: the results cannot be read, have no such request, or are about other sequences.
    """
    folder = Path(place).resolve()
    out, name = folder.parent.parent, folder.name
    if folder.parent.name != BATCHES or not (out / "plan.json").is_file():
        return
    results = FisherKernelResults.load(out)
    about = results.update if name == OWN else results.requests[name].evaluation if name in results.requests else ()
    if about != tuple(map(info_of, batch)):
        what = "are about other sequences" if about else f"have no request {name!r}"
        raise ResultsError(
            f"The batch at {place} is of another run than the results at {out}, which {what}. Run the plan again, and "
            f"both are of one run; or copy the batch elsewhere, to ask of it alone."
        )
