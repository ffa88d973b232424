"""Run a plan: prepare the workspace once, then evaluate every request against it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fkernel import func
from fkernel.checkpoint import Checkpoint
from fkernel.distributed import group_of
from fkernel.engine import check_side, mean_of
from fkernel.errors import PlanError
from fkernel.precond import AdamWStep
from fkernel.rollout import GeneratedBatch, SampleGenerator, save_batch
from fkernel.study.analyses.context import UpdateContext
from fkernel.study.analyses.runner import update_results
from fkernel.study.certified import along, findings, skipping
from fkernel.study.checks import check_inputs, missed_pairs
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import UpdateBatch
from fkernel.study.draws import BatchSource
from fkernel.study.evaluation import Question, evaluate
from fkernel.study.facts import facts_of_step
from fkernel.study.from_recording import as_recorded
from fkernel.study.gradients import GradientCache
from fkernel.study.in_shards import check_has_ranks, drawn_by, loaded_by
from fkernel.study.kept import answer_cache, answers, earlier, own_answer, results_of
from fkernel.study.log import LOGGER, Tick, doing, phase, say, shown
from fkernel.study.outcome import AnalysisResult, Entry, RequestResult, SelfKernel
from fkernel.study.policy import after_of, policy_of
from fkernel.study.prepare import adopted, prepared
from fkernel.study.provenance import environment
from fkernel.study.questions import entry_of, influence_of, self_kernel_of
from fkernel.study.results import FisherKernelResults
from fkernel.study.rows import MemoryBudget, Policy, grant_of, self_strategy
from fkernel.study.taken import StepTaken, step_taken
from fkernel.study.workspace import KernelWorkspace, named_errors, selected, tokens_of


class FisherKernelRunner:
    """Executes a plan, or single requests against its workspace.

    Attributes:
        plan: the plan.
        logger: for progress messages.
        workspace: the one prepared last; None before.
    """

    def __init__(
        self,
        config: FisherKernelPlan | Mapping[str, Any],
        logger: logging.Logger | None = None,
        on_progress: Tick = lambda what, n, total: None,
        mesh: Any = None,
    ) -> None:
        """Take a plan, or its keys and values; nothing is loaded yet.

        Args:
            config: the plan.
            logger: from `logging`; by default the one named `fkernel`.
            on_progress: called as sequences are done, for a progress bar.
            mesh: a one-dimensional `torch.distributed.DeviceMesh`, whose ranks all run the same plan: rank 0 draws, all
                compute, in memory, and each has the results. A plan in shards needs it.
        """
        self.mesh, self.group = mesh, None if mesh is None else group_of(mesh)
        self.logger, self.on_progress = logger or LOGGER, on_progress
        self._take(config if isinstance(config, FisherKernelPlan) else FisherKernelPlan.model_validate(config))

    def _take(self, plan: FisherKernelPlan) -> None:
        """Reset to a new plan."""
        self.plan = as_recorded(plan)
        check_has_ranks(self.plan, self.mesh)
        self.workspace: KernelWorkspace | None = None
        self._step: AdamWStep | None = None
        self._prepared: Policy | None = None
        self._of_E: Policy | None = None
        self._of_step: StepTaken | None = None
        self._batches: dict[str, GeneratedBatch] = {}
        self._drawn = ("sampling", 0)
        for loaded in ("checkpoint", "generator", "policy"):
            self.__dict__.pop(loaded, None)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, loaded on first use."""
        name, place = "loading the checkpoint", self.plan.checkpoint.place
        with shown(self.on_progress), doing(name), phase(self.logger, name, path=place) as facts:
            loaded = loaded_by(self.plan, self.mesh)
            facts["fingerprint"] = loaded.provenance.fingerprint[:12]
        return loaded

    @cached_property
    def generator(self) -> SampleGenerator:
        """The sample generator of U and E, created on first use."""
        report = lambda n: self.on_progress(self._drawn[0], n, self._drawn[1])  # noqa: E731
        return self.plan.generator(self.checkpoint, self.plan.sources(), on_progress=report)

    @cached_property
    def policy(self) -> Policy:
        """The checkpoint as the engine's inputs; S at the plan's temperature, by default the one U was sampled at."""
        spec = self._given(None).spec
        policy = self._prepared or policy_of(self.plan, self.checkpoint, spec["temperature"])
        return policy._replace(after=after_of(self.plan, self.checkpoint, policy.params, self.mesh))

    def _along(self, E: func.Sequences) -> Policy:
        """The policy for E, with the step's path; its derivative is certified along the step, once."""
        if self._of_E is None and self._step is not None:
            taken = self._taken(self._step)
            policy = along(self.policy, E, taken.departures.end)
            self._of_E = policy._replace(path=self.plan.step.path, **taken.for_policy)
        return self._of_E or self.policy

    def _taken(self, step: AdamWStep) -> StepTaken:
        """The step as it was executed and really taken; made once."""
        if self._of_step is None:
            with doing("the step as it was taken"):
                self._of_step = step_taken(self.plan.step, self.policy, self.checkpoint, self._given(None), step)
        return self._of_step

    def prepare_update_workspace(self, plan: FisherKernelPlan | None = None) -> KernelWorkspace:
        """Create U's workspace, resume an interrupted one, or open a complete one.

        Args:
            plan: instead of the runner's own.

        Returns:
            The workspace; its directory stays locked until it is closed.

        Raises:
            FKernelError: the checkpoint, the batch or the workspace's directory is invalid.
        """
        if plan is not None:
            self._take(plan)
        plan = self.plan
        with skipping(self.plan), shown(self.on_progress), phase(self.logger, "preparing the workspace") as facts:
            on_progress = partial(self.on_progress, "gradients of U")
            workspace, self._step, self._prepared = prepared(
                plan, self.checkpoint, self._update, on_progress, lambda: self.generator, self.group
            )
            self.workspace, computed = workspace, workspace.gradients.computed
            facts |= {"sequences": len(workspace.batch), "gradients_computed": computed}
            facts["gradients_read"] = len(workspace.batch) - computed
        return workspace

    def adopt(self, workspace: KernelWorkspace) -> None:
        """Use a workspace that `load_workspace` opened.

        Raises:
            PlanError: it is of another checkpoint than the plan's.
        """
        if workspace.spec["checkpoint"] != self.checkpoint.provenance.fingerprint:
            raise PlanError(
                f"The workspace is of the checkpoint {workspace.spec['checkpoint'][:12]}, the plan's is "
                f"{self.checkpoint.provenance.fingerprint[:12]}."
            )
        self.workspace, self._of_E = workspace, None  # self.policy reads the workspace's temperature
        self._step = adopted(self.plan, workspace, self.policy)

    def compute_self_kernel(
        self,
        workspace: KernelWorkspace | None = None,
        sequence_ids: tuple[str, ...] | None = None,
        capture_full: bool = False,
    ) -> SelfKernel:
        """Compute K_UU, or a principal submatrix, and its spectrum.

        Args:
            workspace: the one prepared last by default.
            sequence_ids: patterns on ids; None for all.
            capture_full: whether the result has the matrix.

        Raises:
            RolloutError: a pattern names no sequence.
        """
        workspace = self._given(workspace)
        with shown(self.on_progress), doing("kernel of U with itself"), phase(self.logger, "kernel of U with itself"):
            how = self_strategy(self.plan.numerics.memory, workspace, self.policy)
            return self_kernel_of(workspace, sequence_ids, capture_full, how)

    def evaluate_batch(
        self,
        request: Any,
        workspace: KernelWorkspace | None = None,
        capture_full: bool | None = None,
        batch: GeneratedBatch | None = None,
    ) -> RequestResult:
        """Evaluate a batch: what U's step does to every sequence of it, and each sequence of U's contribution.

        Args:
            request: one of the plan's kinds, such as `plan.requests[0]`.
            workspace: the one prepared last by default.
            capture_full: whether the result has all of K and C; None as the request says.
            batch: E, instead of what the request would draw.

        Raises:
            FKernelError: E cannot be drawn or scored, or the request names something unknown.
        """
        workspace, plan = self._given(workspace), self.plan
        name = request.name or request.kind
        capture = request.capture or plan.capture
        if capture_full is not None:
            capture = capture.model_copy(update={"kernel": capture_full})
        with skipping(self.plan), shown(self.on_progress), phase(self.logger, f"request {name}") as facts:
            E = self._batch(request, workspace) if batch is None else batch
            if request.sequence_ids is not None:
                E = E.clone_with_subset(selected(E.ids, request.sequence_ids, f"the request {name!r}"))
            self._batches[name] = E
            with named_errors(E):
                tokens = tokens_of(E, self.policy.params)
                check_side("E", self.policy.f, self.policy.params, tokens)
                analyses, strict = request.analyses or plan.analyses, bool(request.capture or request.analyses)
                question = Question(name, request.kind, capture, request.advantages, strict, analyses)
                grant, size = self._grant(E), len(E)
                with doing(f"{name}: certifying the step's path"):
                    policy = self._along(tokens)
                result = evaluate(
                    question, E, workspace, policy, self._step, grant, lambda n: self.on_progress(name, n, size)
                )
            facts |= {"sequences": len(E)}
            facts |= {f"{key}_relative_error": v.relative_error for key, v in result.calibration.items()}
        return result

    def analyse_update(self, workspace: KernelWorkspace | None = None) -> dict[str, AnalysisResult]:
        """Run the plan's analyses of U itself: "health" and "structure".

        Raises:
            PlanError: there is no workspace.
        """
        workspace = self._given(workspace)
        grant, seed = self._grant(workspace.batch), self.plan.numerics.seed
        with shown(self.on_progress):
            return update_results(self.plan.analyses, UpdateContext(workspace, self.policy, grant, self._step, seed))

    def query(self, one: str, other: str, workspace: KernelWorkspace | None = None) -> Entry:
        """Compute K of two sequences, of U or of evaluated batches (`NAME/E-000-00` where ids repeat).

        Raises:
            RolloutError, PlanError: no sequence has that id, or more than one has.
        """
        workspace = self._given(workspace)
        return entry_of(workspace, self.cache(one, workspace), self.cache(other, workspace))

    def cache(self, sequence_id: str, workspace: KernelWorkspace | None = None) -> GradientCache:
        """The gradient of a sequence of U, which is read, or of an evaluated batch, which is computed."""
        workspace = self._given(workspace)
        if sequence_id in workspace.index:
            return workspace.cache(sequence_id)
        name, _, id_ = sequence_id.rpartition("/")
        batches = [batch for key, batch in self._batches.items() if id_ in batch.ids and (not name or key == name)]
        if not batches:
            workspace.batch.by_id(sequence_id)  # raises, and lists similar ids
        if len(batches) > 1:
            raise PlanError(f"{sequence_id!r} is a sequence of several requests; say which: NAME/{sequence_id}.")
        return self.external(batches[0].clone_with_subset([id_]), workspace, sequence_id)

    def external(
        self, batch: GeneratedBatch, workspace: KernelWorkspace | None = None, name: str | None = None
    ) -> GradientCache:
        """Compute the gradient of a batch of one as requests do, over the step's path; `name` is its id."""
        workspace, E = self._given(workspace), tokens_of(batch, self.policy.params)
        policy = self._along(E)

        def read() -> Any:
            gradient = func.per_sequence_handles(policy.f)
            with named_errors(batch):
                return mean_of([(q, gradient(node, E)) for q, node in policy.nodes])

        return GradientCache(name or batch.ids[0], read, workspace.P)

    def influence(
        self,
        ids: tuple[str, ...] | None = None,
        advantages: Any = None,
        workspace: KernelWorkspace | None = None,
    ) -> dict[str, float]:
        """Compute Σ_j C(t, j) for sequences t of U, from stored gradients, as {id: nats} in U's order.

        Arguments as in `influence_of`, of the workspace prepared last by default.
        """
        return influence_of(self._given(workspace), ids, advantages)

    def run(self, plan: FisherKernelPlan | None = None) -> FisherKernelResults:
        """Execute a plan.

        Args:
            plan: instead of the runner's own.

        Raises:
            FKernelError: the first failure; what was computed before stays in the workspace.
        """
        if plan is not None:
            self._take(plan)
        plan = self.plan
        check_inputs(plan)
        about = environment() | {"plan_hash": plan.hash, "seed": plan.numerics.seed}
        say(self.logger, f"plan {plan.hash[:12]}, out {plan.out}", **about)
        with func.made_certificates() as certificates, self.prepare_update_workspace() as workspace:
            cache = answer_cache(plan, workspace, certificates)
            own = own_answer(cache, plan, self.compute_self_kernel, self.analyse_update)
            requests = answers(cache, plan, self._batch, self.evaluate_batch, self._batches)
            facts, computed = facts_of_step(workspace, self.policy, self.checkpoint.step), workspace.gradients.computed
            taken = None if self._step is None else self._taken(self._step)
            facts |= {} if taken is None else taken.reported(self.logger)
            about |= {"fingerprint": workspace.spec["checkpoint"], "kept": earlier(own, requests)}
            say(self.logger, "gradients of U", computed=computed, read=len(workspace.batch) - computed)
            about |= findings(
                certificates, self.policy, taken and taken.departures.executed, self.checkpoint, self.logger
            )
            results = results_of(plan, workspace, facts, own, requests, about)
            for message in missed_pairs(plan, results.requests):
                say(self.logger, message, logging.WARNING)
            return results

    def save_batches(self, out: str | Path) -> None:
        """Save evaluated batches to `<out>/batches/<name>`, replacing an earlier run's; an unkept U too."""
        own = self.workspace if self.workspace and self.workspace.directory is None else None
        for name, batch in {**self._batches, **({"update_batch": own.batch} if own else {})}.items():
            save_batch(batch, Path(out) / "batches" / name, replace=True)

    def _given(self, workspace: KernelWorkspace | None) -> KernelWorkspace:
        workspace = workspace or self.workspace
        if workspace is None:
            raise PlanError("There is no workspace yet; call prepare_update_workspace() first.")
        return workspace

    def _batch(self, request: Any, workspace: KernelWorkspace) -> GeneratedBatch:
        if isinstance(request, UpdateBatch) and request.is_own:
            return workspace.batch
        return self._generated(request, str(request.name))

    def _update(self) -> GeneratedBatch:
        """Draw or read U; sampled by another policy, where the step's loss allows that."""
        draw, loss = self.plan.update, self.plan.step.loss
        return self._generated(draw, "U", draw.of_any if loss is not None and loss.foreign else draw.generate)

    def _generated(
        self, draw: BatchSource, what: str, make: Callable[..., GeneratedBatch] | None = None
    ) -> GeneratedBatch:
        """Draw or read a batch; progress counts every drawn sequence twice, sampled and scored."""
        self._drawn = (f"sampling {what}", 2 * draw.size)
        drawn = lambda: (make or draw.generate)(self.generator, self.plan.numerics.seed)  # noqa: E731
        return drawn_by(self.group, self.plan, what, drawn)

    def _grant(self, batch: GeneratedBatch) -> MemoryBudget:
        numerics, tokens = self.plan.numerics, tokens_of(batch, self.policy.params)
        return grant_of(numerics.memory, numerics.microbatch, self.policy, tokens, group=self.group)
