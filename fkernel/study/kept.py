"""Answers that earlier runs computed: kept in the workspace as they end, and read where the same is asked again.

<workspace>/kept/<hash of the key>/
  results.json, kernel.npz, …   one answer, as `FisherKernelResults.save_results` writes it
  batch/                        E of a request, as `save_batch` writes it
  kept.json                     the key, when it was written, certificates, and a checksum of every other file

An answer is a request's, U's with itself, or an analysis of U. Its key is everything that decides it: what the
workspace is of, P's checksum, the request with every default filled in, prompts, sampling and seed or the batch that is
given, the code of functions that it names, checkpoints that it names, the device, the certificates that are left out,
and fkernel, torch and transformers. So a plan with one request more computes that one alone, and a run that was killed
goes on behind the last request that had ended. Microbatch, memory and threads are not in the key: they change the last
digits only.

What names a function without a file is not kept, and neither is an answer with an analysis that failed. A payload's
callback is called every time: its batch is in the key. A folder is written beside its place and moved there; one that
is damaged is computed again. It may be deleted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from fkernel import func
from fkernel.errors import FKernelError, RolloutError
from fkernel.io import PARTIAL, atomic_directory, checksummed_json, checksums, hash_json, plain_errors, read_checksummed
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
"""Whose versions may change numbers; with reasoning-gym's and math-verify's, whose scorers give rewards."""
FROM_SPLITS = ("update", "evaluation", "prompt_ids")


class Answer(NamedTuple):
    """One answer.

    Attributes:
        request: a request's; or None.
        batch: its E.
        self_kernel: U with itself; or None.
        analyses: of U.
        written: when an earlier run kept it; None where this one computed it.
    """

    request: RequestResult | None = None
    batch: GeneratedBatch | None = None
    self_kernel: SelfKernel | None = None
    analyses: Mapping[str, AnalysisResult] = {}
    written: str | None = None


class AnswerCache(NamedTuple):
    """Where answers about a workspace are kept.

    Attributes:
        place: the directory; None where nothing is kept.
        common: the part of the key that all answers share.
        plan: as JSON.
        workspace: U.
        certificates: those of this run, to which the certificates of what is read are added.
    """

    place: Path | None
    common: Mapping[str, Any]
    plan: Mapping[str, Any]
    workspace: KernelWorkspace
    certificates: list[func.Certificate]


def answer_cache(
    plan: FisherKernelPlan, workspace: KernelWorkspace, certificates: list[func.Certificate]
) -> AnswerCache:
    """Find where answers about a workspace are kept: in its directory; nowhere, where it is held in memory."""
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
    """Read what a plan asks of U itself, or compute and keep it.

    Args:
        cache: where it is kept.
        plan: which asks.
        self_kernel: computes U with itself.
        analyses: makes the analyses of U.
    """
    found = Answer()
    if plan.self_kernel:
        spec = {"capture_full": plan.capture.kernel}
        found = kept_or_computed(cache, {"self_kernel": spec}, lambda: Answer(self_kernel=self_kernel(**spec)))
    spec = plan.analyses.model_dump(mode="json", include={*UPDATE_ANALYSES})
    if any(spec.values()):
        more = kept_or_computed(cache, {"analyses": spec}, lambda: Answer(analyses=analyses()))
        found = found._replace(analyses=more.analyses, written=found.written or more.written)
    return found


def answers(
    cache: AnswerCache,
    plan: FisherKernelPlan,
    generate: Callable[[Any, KernelWorkspace], GeneratedBatch],
    evaluate: Callable[..., RequestResult],
    batches: dict[str, GeneratedBatch],
) -> dict[str, Answer]:
    """Read the answers of a plan's requests, or compute and keep them, one after the other; nothing is drawn twice.

    Args:
        cache: where they are kept.
        plan: with the requests.
        generate: makes the batch of a request that is given one: from a file, from Python, by a callback.
        evaluate: computes the answer of a request, of `batch`, or of one that it draws; it notes it in `batches`.
        batches: {name: E}, where batches of answers that are read are noted as well.
    """
    found = dict[str, Answer]()
    for request in plan.requests:
        from_elsewhere = (getattr(request, name, None) for name in ("path", "batch", "callback"))
        given = None if all(one is None for one in from_elsewhere) else generate(request, cache.workspace)
        key = None if cache.place is None else request_key(plan, request, given)

        def compute(request: Any = request, given: GeneratedBatch | None = given) -> Answer:
            result = evaluate(request, batch=given)
            return Answer(result, batches[result.name])

        name, answer = str(request.name), kept_or_computed(cache, key, compute)
        assert answer.batch is not None
        found[name], batches[name] = answer, answer.batch
    return found


def earlier(own: Answer, requests: Mapping[str, Answer]) -> dict[str, str]:
    """Tell which answers earlier runs had computed: {name: when}."""
    return {name: one.written for name, one in {OWN: own, **requests}.items() if one.written is not None}


def results_of(
    plan: FisherKernelPlan,
    workspace: KernelWorkspace,
    facts: dict[str, Any],
    own: Answer,
    requests: Mapping[str, Answer],
    environment: dict[str, Any],
) -> FisherKernelResults:
    """Put answers together; `facts` are of the step."""
    return FisherKernelResults(
        plan=plan.record(),
        environment=environment,
        update=tuple(map(info_of, workspace.batch)),
        step=facts,
        self_kernel=own.self_kernel,
        requests={name: one.request for name, one in requests.items() if one.request is not None},
        analyses=dict(own.analyses),
    )


def request_key(plan: FisherKernelPlan, request: Any, given: GeneratedBatch | None) -> dict[str, Any] | None:
    """List what decides a request's answer, beside what all answers share; None where a function has no file.

    Args:
        plan: whose defaults, prompts and sampling the request has.
        request: one of the plan's.
        given: E, where it is not drawn.
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
    """Read an answer that an earlier run computed; or compute it, and keep it.

    Args:
        cache: where answers are kept.
        key: what decides this one, beside what all share; None where that cannot be told, and nothing is kept.
        compute: computes it.

    Raises:
        FKernelError: as `compute`; or the answer cannot be written.
    """
    if cache.place is None or key is None:
        return compute()
    whole = json.loads(json.dumps({**cache.common, **key}))
    place = cache.place / hash_json(whole)[:32]
    found = _read(cache, place, whole)
    if found is None:
        found = compute()
        if _failed(found):
            return found  # and is tried, and warned of, again
        with plain_errors("write to", cache.place), suppress(RolloutError):  # metadata that is no JSON is not kept
            _write(cache, place, whole, found)
    return found


def _failed(answer: Answer) -> bool:
    """Whether an analysis was left out since something went wrong in it, and not for want of what it needs."""
    results = [*answer.analyses.values(), *({} if answer.request is None else answer.request.analyses).values()]
    return any((one.skipped or "").startswith("it failed") for one in results)


def _write(cache: AnswerCache, place: Path, key: Mapping[str, Any], answer: Answer) -> None:
    assert cache.place is not None
    cache.place.mkdir(exist_ok=True)
    for left in cache.place.glob(f"*{PARTIAL}"):  # by a run that was killed: the workspace is this process's alone
        shutil.rmtree(left)
    with atomic_directory(place, replace=True) as work:  # one that is there is damaged
        request, U = answer.request, tuple(map(info_of, cache.workspace.batch))
        requests = {} if request is None else {request.name: request}
        own, analyses = answer.self_kernel, dict(answer.analyses)
        FisherKernelResults(dict(cache.plan), {}, U, {}, own, requests, analyses).save_results(work)
        if answer.batch is not None:
            save_batch(answer.batch, work / BATCH)
        record = {
            "key": key,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "certificates": [one._asdict() | {"error": _or_none(one.error)} for one in cache.certificates],
            "sha256": _checksums(work),
        }
        (work / RECORD).write_bytes(checksummed_json(record))


def _read(cache: AnswerCache, place: Path, key: Mapping[str, Any]) -> Answer | None:
    """Read an answer; None where there is none, or it is not what was written."""
    try:
        record = read_checksummed(place / RECORD)
        if record["key"] != key or record["sha256"] != _checksums(place):
            return None
        results = FisherKernelResults.load(place)
        batch = load_batch(place / BATCH) if (place / BATCH).exists() else None
        certificates = [func.Certificate(**one | {"error": _or_inf(one["error"])}) for one in record["certificates"]]
    except (OSError, ValueError, KeyError, TypeError, FKernelError):
        return None
    cache.certificates.extend(certificates)
    request = next(iter(results.requests.values()), None)
    return Answer(request, batch, results.self_kernel, results.analyses, record["written"])


def _checksums(place: Path) -> dict[str, str]:
    return {name: digest for name, digest in checksums(place).items() if name != RECORD}


def _or_none(error: float) -> float | None:
    return error if -inf < error < inf else None


def _or_inf(error: float | None) -> float:
    return inf if error is None else error
