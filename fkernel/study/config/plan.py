"""The plan of `fkernel run PLAN`: a checkpoint, the update batch whose step is explained, and requests."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fkernel.io import hash_json, parse_bytes
from fkernel.rollout import probe_name
from fkernel.study.analyses.registry import AnalysesPlan
from fkernel.study.config.base import SourcePlan
from fkernel.study.config.capture import CapturePlan
from fkernel.study.config.requests import AnyRequest, BatchRequest, UpdateSource
from fkernel.study.config.step import PreconditionerPlan, StepPlan
from fkernel.study.config.values import Place, Strict


class StoragePlan(Strict):
    """What is written beside the results.

    Attributes:
        workspace: directory of U's gradients, `<out>/workspace` by default; plans with the same update batch may share
            it.
        persist: whether they are stored; false keeps them in memory.
        batches: whether every request's batch is saved to `<out>/batches/<name>`.
        pictures: whether pictures are drawn.
    """

    workspace: Place | None = None
    persist: bool = True
    batches: bool = True
    pictures: bool = True

    @model_validator(mode="after")
    def _place(self) -> StoragePlan:
        if self.workspace is not None and not self.persist:
            raise ValueError("workspace names a place to keep gradients in, and persist: false keeps none")
        return self


class NumericsPlan(Strict):
    """Precision, memory, device and seed.

    Attributes:
        dtype: of parameters and gradients.
        temperature: of S; None uses the one that U was sampled at, as trainers do.
        microbatch: sequences of the greatest length in one pass; None: eight, or as many as have 1024 tokens.
        memory: limit for activations and gradients, beside the model, the optimizer's state and the step; "8GiB".
        device: a torch device.
        seed: for all sampling without a seed of its own.
        processes: ranks that compute together, each on its own processor or GPU; None for one process.
        shards: whether θ, the optimizer's state and the step are in shards over the ranks, for a model that does not
            fit on one; see Several processes in the documentation.
        skip_certificates: certificates to skip, by name: rows, values, company, forward, derivative.
    """

    dtype: Literal["float32", "float64"] = "float32"
    temperature: float | None = Field(None, gt=0)
    microbatch: int | None = Field(None, gt=0)
    memory: str | int | None = None
    device: str = "cpu"
    seed: int = 0
    processes: int | None = Field(None, gt=0)
    shards: bool = False
    skip_certificates: tuple[Literal["rows", "values", "company", "forward", "derivative"], ...] = ()

    @field_validator("memory")
    @classmethod
    def _size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_bytes(value)
        return value


class FisherKernelPlan(SourcePlan):
    """One update batch, and requests about its step.

    Attributes:
        checkpoint: before the step, with its optimizer state.
        prompts: prompt sources, one per split.
        template: from a question to the prompt's text.
        sampling: how responses are sampled.
        update: U: sampled, read from a file, or passed in.
        requests: E, each a batch and what to compute for it.
        preconditioner: P.
        step: clipping, and the checkpoint after the step where there is one.
        parameters: which parameters, as patterns on their names; None for all that were trained.
        self_kernel: whether K_UU and its spectrum are computed.
        capture: the default capture of requests.
        analyses: the default analyses of requests, and the analyses of U.
        storage: what is written.
        numerics: dtype, memory, seed.
        correct: the reward from which on a response is right; tables mark responses ✓ and ✗ by it. None: by the rewards
            "math" and "exact", where every reward that the plan names is one of them, and by nothing else.
        out: directory of the results.
    """

    update: UpdateSource
    requests: tuple[AnyRequest, ...] = ()
    preconditioner: PreconditionerPlan = PreconditionerPlan()
    step: StepPlan = StepPlan.model_validate({})
    parameters: tuple[str, ...] | None = Field(None, min_length=1)
    self_kernel: bool = True
    capture: CapturePlan = CapturePlan.model_validate({})
    analyses: AnalysesPlan = AnalysesPlan.model_validate({})
    storage: StoragePlan = StoragePlan()
    numerics: NumericsPlan = NumericsPlan.model_validate({})
    correct: float | None = None
    out: Place

    @field_validator("requests")
    @classmethod
    def _named(cls, requests: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give every request a unique name."""
        kinds = Counter(request.kind for request in requests if request.name is None)
        seen, named = Counter[str](), []
        for request in requests:
            name = request.name
            if name is None:
                seen[request.kind] += 1
                name = request.kind if kinds[request.kind] == 1 else f"{request.kind}-{seen[request.kind]}"
                if request.kind == "custom_sequence":
                    name = probe_name(seen[request.kind] - 1)
            named.append(request.model_copy(update={"name": name}))
        twice = [name for name, times in Counter(request.name for request in named).items() if times > 1]
        if any(request.name == "update_batch" for request in named):
            raise ValueError("'update_batch' is the name that U itself is saved under; choose another (name:)")
        if twice:
            raise ValueError(f"two requests have the name {twice[0]!r}; give each one of its own (name:)")
        return tuple(named)

    @model_validator(mode="after")
    def _sampled(self) -> FisherKernelPlan:
        if self.update.kind == "update" and self.step.loss is not None and "old" in self.step.loss.checkpoints:
            raise ValueError(
                "step.loss.old sampled U, and update: {kind: update} draws another U from the checkpoint itself; give "
                "the batch of that step (from_file), or leave old out"
            )
        return self

    @property
    def workspace_path(self) -> str:
        """Directory of U's gradients."""
        return self.storage.workspace or f"{self.out}/workspace"

    @property
    def right_from(self) -> float | None:
        """The reward from which on a response is right; None where rewards do not say right or wrong."""
        if self.correct is not None:
            return self.correct
        named = {str(reward) for one in (self.update, *self.requests) if (reward := _reward_of(one)) is not None}
        return 1.0 if named and named <= {"math", "exact"} else None

    def seeded(self, seed: int) -> FisherKernelPlan:
        """The same plan with another seed."""
        return self.model_copy(update={"numerics": self.numerics.model_copy(update={"seed": seed})})

    def record(self) -> dict[str, Any]:
        """The plan as JSON, every default filled in; `FisherKernelPlan.model_validate` reads it.

        Batches that were passed in from Python are replaced by the path where the runner saves them.
        """
        record = self.model_dump(mode="json")
        if record["update"].get("batch") is not None:
            place = f"{self.workspace_path}/batch" if self.storage.persist else f"{self.out}/batches/update_batch"
            record["update"] = {"kind": "from_file", "path": place}
        for i, request in enumerate(record["requests"]):
            if request.get("batch") is not None:
                common = {key: request[key] for key in BatchRequest.model_fields}
                place = f"{self.out}/batches/{request['name']}"
                record["requests"][i] = {"kind": "from_file", "path": place, **common}
        return record

    @property
    def hash(self) -> str:
        """Hash of the plan's record without its `out`."""
        return hash_json({key: value for key, value in self.record().items() if key != "out"})


def _reward_of(source: Any) -> Any:
    """The reward function of a batch that is sampled, or None."""
    is_own = source.kind == "update" and source.size == 0
    drawn = source.kind in ("update", "evaluation", "prompt_ids") and not is_own
    return source.reward if drawn else None


TEMPLATE = """\
# Why did these sequences' probabilities move? `fkernel run` answers; `fkernel plan schema` lists every key.
checkpoint:
  path: run/checkpoint-200          # the checkpoint before the step, with its optimizer state
prompts:
  - {task: gsm_symbolic, split: train}   # or jsonl: prompts.jsonl, or dataset: a directory of save_to_disk()
  - {task: gsm_symbolic, split: test}
template: gsm8k_r1                  # gsm8k_r1, chat or bare
sampling: {temperature: 1.0, max_new_tokens: 256}
update:                             # U: drawn as the trainer draws it, or {kind: from_file, path: …}
  kind: update
  batch_size_prompts: 8
  completions_per_prompt: 8
  reward: gym                       # math, exact, gym or module.function
  advantage: grpo                   # group_mean, grpo, rloo, raw or module.function
  weights: dapo                     # sequence, grpo, group_token, bnpo, dapo, dr_grpo
step: {max_norm: 1.0}               # the trainer's gradient clipping
requests:
  - {kind: update, name: self}      # U itself
  - {kind: evaluation, name: held_out, batch_size_prompts: 16}
  - {kind: custom_sequence, name: probe, prompt: "What is 6 times 7?", response: " 42"}
capture: {kernel: true, top_k: 10}
analyses: {ledger: true, uncertainty: true}   # also sweep, tokens, parts, observables, counterfactuals, …
out: study
"""
"""What `fkernel plan init` writes."""
