"""A cache of answers in the workspace: written as each is computed, read by later runs that ask the same.

<workspace>/kept/<hash of the key>/
  results.json, kernel.npz, …   one answer, as `FisherKernelResults.save_results` writes it
  batch/                        E of a request, as `save_batch` writes it
  kept.json                     the key, the time, certificates, and a checksum of every other file

An answer is of a request, of K_UU, or of an analysis of U. Its key is everything that determines it: the workspace's
spec, P's checksum, the request with every default filled in, prompts, sampling and seed or the given batch, hashes of
the functions and checkpoints that it names, the device, skipped certificates, and the versions of fkernel, torch and
transformers. So a plan with one more request computes only that one, and a rerun after a crash continues after the last
finished request. Microbatch, memory and threads are not in the key: they change rounding only.

Not cached: requests that name a function without a file, and answers with a failed analysis. A payload's callback is
called every time, since its batch is in the key. A folder is written to a temporary name and renamed; a damaged one is
computed again. It may be deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.errors import FKernelError, RolloutError
from fkernel.io import (
    atomic_directory,
    checksummed_json,
    checksums,
    hash_json,
    make_directory,
    read_checksummed,
    sweep,
    write_file,
)
from fkernel.rollout import GeneratedBatch, content_of_batch, load_batch, save_batch
from fkernel.study.analyses.registry import UPDATE_ANALYSES
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.directory import COMPLETE
from fkernel.study.outcome import AnalysisResult, RequestResult, SelfKernel, info_of
from fkernel.study.policy import identity_of_checkpoint
from fkernel.study.results import OWN, FisherKernelResults
from fkernel.study.sources import code_of, dotted_names, own_code, prompts_files, version
from fkernel.study.workspace import KernelWorkspace

SCHEMA = 1
KEPT, RECORD, BATCH = "kept", "kept.json", "batch"
PACKAGES = ("torch", "transformers", "numpy", "peft")
"""Packages whose versions are in the key, beside those of reasoning-gym and math-verify, which score rewards."""
FROM_SPLITS = ("update", "evaluation", "prompt_ids")


class Answer(NamedTuple):
    """One answer.

    Attributes:
        request: of a request; or None.
        batch: its E.
        self_kernel: K_UU; or None.
        analyses: of U.
        written: when an earlier run wrote it; None where this run computed it.
    """

    request: RequestResult | None = None
    batch: GeneratedBatch | None = None
    self_kernel: SelfKernel | None = None
    analyses: Mapping[str, AnalysisResult] = {}
    written: str | None = None


class AnswerCache(NamedTuple):
    """The cache of a workspace's answers.

    Attributes:
        place: the directory; None for no cache.
        common: the part of the key that all answers share.
        plan: as JSON.
        workspace: U.
        certificates: of this run; those of cached answers are appended when they are read.
    """

    place: Path | None
    common: Mapping[str, Any]
    plan: Mapping[str, Any]
    workspace: KernelWorkspace
    certificates: list[func.Certificate]


def answer_cache(
    plan: FisherKernelPlan, workspace: KernelWorkspace, certificates: list[func.Certificate]
) -> AnswerCache:
    """The cache in a workspace's directory; a workspace in memory has none."""
    if workspace.directory is None:
        return AnswerCache(None, {}, {}, workspace, certificates)
    after, numerics = plan.step.after, plan.numerics
    common = {
        "schema": SCHEMA,
        "fkernel": [version("fkernel"), own_code()],
        "versions": {name: version(name) for name in (*PACKAGES, "reasoning-gym", "math-verify")},
        "workspace": {**workspace.spec, "complete": read_checksummed(workspace.directory / COMPLETE)},
        "step": plan.step.model_dump(mode="json", exclude={"after", "loss"}),
        "after": None if after is None else identity_of_checkpoint(after, numerics.dtype),
        "numerics": numerics.model_dump(mode="json", include={"seed", "device", "skip_certificates"}),
    }
    return AnswerCache(workspace.directory / KEPT, common, plan.record(), workspace, certificates)


def own_answer(
    cache: AnswerCache,
    plan: FisherKernelPlan,
    self_kernel: Callable[..., SelfKernel],
    analyses: Callable[[], dict[str, AnalysisResult]],
) -> Answer:
    """K_UU and the analyses of U that a plan asks for, cached or computed.

    Args:
        cache: the cache.
        plan: the plan.
        self_kernel: computes K_UU.
        analyses: runs the analyses of U.
    """
    answer = Answer()
    if plan.self_kernel:
        options = {"capture_full": plan.capture.kernel}
        answer = kept_or_computed(cache, {"self_kernel": options}, lambda: Answer(self_kernel=self_kernel(**options)))
        own = answer.self_kernel
        if own is not None and answer.written is not None:  # requests find the norms that they found in the run before
            cache.workspace.learn(func.SquaredNorms(*map(torch.from_numpy, (own.squared_norms, own.diagonal))))
    configs = plan.analyses.model_dump(mode="json", include={*UPDATE_ANALYSES})
    if any(configs.values()):
        analysed = kept_or_computed(cache, {"analyses": configs}, lambda: Answer(analyses=analyses()))
        answer = answer._replace(analyses=analysed.analyses, written=answer.written or analysed.written)
    return answer


def answers(
    cache: AnswerCache,
    plan: FisherKernelPlan,
    generate: Callable[[Any, KernelWorkspace], GeneratedBatch],
    evaluate: Callable[..., RequestResult],
    batches: dict[str, GeneratedBatch],
) -> dict[str, Answer]:
    """The answers of a plan's requests, cached or computed in order.

    Args:
        cache: the cache.
        plan: the plan.
        generate: returns the batch of a request that does not sample: from a file, from Python, by a callback.
        evaluate: evaluates a request on `batch`, or on one that it samples; it stores the batch in `batches`.
        batches: {name: E}; batches of cached answers are added.
    """
    by_request = dict[str, Answer]()
    for request in plan.requests:
        sampled = all(getattr(request, name, None) is None for name in ("path", "batch", "callback"))
        given = None if sampled else generate(request, cache.workspace)
        key = None if cache.place is None else request_key(plan, request, given)

        def compute(request: Any = request, given: GeneratedBatch | None = given) -> Answer:
            result = evaluate(request, batch=given)
            return Answer(result, batches[result.name])

        name, answer = str(request.name), kept_or_computed(cache, key, compute)
        assert answer.batch is not None
        by_request[name], batches[name] = answer, answer.batch
    return by_request


def earlier(own: Answer, requests: Mapping[str, Answer]) -> dict[str, str]:
    """Which answers came from the cache: {name: when they were written}."""
    return {name: answer.written for name, answer in {OWN: own, **requests}.items() if answer.written is not None}


def results_of(
    plan: FisherKernelPlan,
    workspace: KernelWorkspace,
    facts: dict[str, Any],
    own: Answer,
    requests: Mapping[str, Answer],
    environment: dict[str, Any],
) -> FisherKernelResults:
    """Assemble the results; `facts` are of the step."""
    return FisherKernelResults(
        plan=plan.record(),
        environment=environment,
        update=tuple(map(info_of, workspace.batch)),
        step=facts,
        self_kernel=own.self_kernel,
        requests={
            name: replace(answer.request, facts={**answer.request.facts, "correct": plan.right_from})
            for name, answer in requests.items()
            if answer.request is not None
        },
        analyses=dict(own.analyses),
    )


def request_key(plan: FisherKernelPlan, request: Any, given: GeneratedBatch | None) -> dict[str, Any] | None:
    """The request's part of the key; None where a function that it names has no file.

    Args:
        plan: for defaults, prompts and sampling.
        request: one of the plan's.
        given: E, where it is not sampled.
    """
    spec = request.model_dump(mode="json", exclude={"batch", "path", "callback"})
    strict = bool(request.capture or request.analyses)
    capture, analyses = request.capture or plan.capture, request.analyses or plan.analyses
    spec |= {"capture": capture.model_dump(mode="json"), "analyses": analyses.model_dump(mode="json")}
    code = code_of(dotted_names(spec))
    if None in code.values():
        return None
    references = {one.name: one.reference for one in analyses.observables if one.reference is not None}
    key = {"request": spec, "strict": strict, "code": code}
    key |= {"references": {name: identity_of_checkpoint(one, plan.numerics.dtype) for name, one in references.items()}}
    if given is not None:
        return key | {"batch": content_of_batch(given, scores=False)}
    prompts = [one for one in plan.prompts if request.kind in FROM_SPLITS and one.split == request.dataset_split]
    key |= {"prompts": [one.model_dump(mode="json") for one in prompts], "files": prompts_files(prompts)}
    return key | {"sampling": plan.sampling.model_dump(mode="json"), "template": plan.template}


def kept_or_computed(cache: AnswerCache, key: Mapping[str, Any] | None, compute: Callable[[], Answer]) -> Answer:
    """Read an answer from the cache; else compute and write it.

    Args:
        cache: the cache.
        key: the answer's own part of the key; None for an answer that cannot be cached.
        compute: computes it.

    Raises:
        FKernelError: as `compute`; or the answer cannot be written.
    """
    if cache.place is None or key is None:
        return compute()
    whole = json.loads(json.dumps({**cache.common, **key}))
    place = cache.place / hash_json(whole)[:32]
    answer = _read(cache, place, whole)
    if answer is None:
        answer = compute()
        if _failed(answer):
            return answer  # not cached: the next run tries again
        with suppress(RolloutError):  # raised for metadata that is not JSON
            _write(cache, place, whole, answer)
    return answer


def _failed(answer: Answer) -> bool:
    """Whether an analysis raised an error, rather than lacking an input."""
    results = [*answer.analyses.values(), *({} if answer.request is None else answer.request.analyses).values()]
    return any((result.skipped or "").startswith("it failed") for result in results)


def _write(cache: AnswerCache, place: Path, key: Mapping[str, Any], answer: Answer) -> None:
    assert cache.place is not None
    sweep(make_directory(cache.place))
    with atomic_directory(place, replace=True) as work:  # an existing folder is damaged
        request, U = answer.request, tuple(map(info_of, cache.workspace.batch))
        requests = {} if request is None else {request.name: request}
        own, analyses = answer.self_kernel, dict(answer.analyses)
        FisherKernelResults(dict(cache.plan), {}, U, {}, own, requests, analyses).save_results(work)
        if answer.batch is not None:
            save_batch(answer.batch, work / BATCH)
        record = {
            "key": key,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "certificates": [
                c._asdict() | {"error": c.error if isfinite(c.error) else None} for c in cache.certificates
            ],
            "sha256": _checksums(work),
        }
        write_file(work / RECORD, [checksummed_json(record)])


def _read(cache: AnswerCache, place: Path, key: Mapping[str, Any]) -> Answer | None:
    """Read an answer; None where there is none, or a checksum differs."""
    try:
        record = read_checksummed(place / RECORD)
        if record["key"] != key or record["sha256"] != _checksums(place):
            return None
        results = FisherKernelResults.load(place)
        batch = load_batch(place / BATCH) if (place / BATCH).exists() else None
        certificates = [
            func.Certificate(**c | {"error": inf if c["error"] is None else c["error"]}) for c in record["certificates"]
        ]
    except (OSError, ValueError, KeyError, TypeError, FKernelError):
        return None
    cache.certificates.extend(certificates)
    request = next(iter(results.requests.values()), None)
    return Answer(request, batch, results.self_kernel, results.analyses, record["written"])


def _checksums(place: Path) -> dict[str, str]:
    return {name: digest for name, digest in checksums(place).items() if name != RECORD}
