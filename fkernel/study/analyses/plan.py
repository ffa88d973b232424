"""Which analyses a plan asks for; each is off unless it is named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fkernel.analysis import DECADES
from fkernel.study.parts import CheckpointPlan, Strict


def _switched(value: Any) -> Any:
    """`true` asks for an analysis with its defaults, `false` for none."""
    return {} if value is True else None if value is False else value


Switch = BeforeValidator(_switched)
NAME = r"^[\w.-]+$"
OBSERVABLE = "a function that makes an observable: (apply, temperature) -> f"


class SweepPlan(Strict):
    """The step at several sizes."""

    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        DECADES, min_length=1, description="multiples of the step"
    )
    within: float = Field(0.01, gt=0, description="relative error up to which a prediction is said to hold")


class TokensPlan(Strict):
    """Changes of every token; and token × token kernels of some pairs."""

    pairs: tuple[tuple[str, str], ...] = Field((), description="[E id, U id]")


class ObservablePlan(Strict):
    """Something else than log π that the step changed.

    Attributes:
        name: what results call it.
        kind: "entropy", the mean over the response; "kl" to a reference, summed over it; "log_odds" of two sequences of
            the request; "expected_reward" over the sequences of a prompt, as a finite set of answers; or "function".
        reference: the reference's checkpoint, of kind kl.
        pairs: ids of the request's sequences, of kind log_odds.
        function: dotted name, of kind function: (apply, temperature) -> f, and f: (params, Sequences[n t]) -> [n].
    """

    name: str = Field(pattern=NAME)
    kind: Literal["entropy", "kl", "log_odds", "expected_reward", "function"]
    reference: CheckpointPlan | None = None
    pairs: tuple[tuple[str, str], ...] | None = Field(None, min_length=1)
    function: str | None = None

    @model_validator(mode="after")
    def _needs(self) -> ObservablePlan:
        needed = {"kl": "reference", "log_odds": "pairs", "function": "function"}
        for kind, field in needed.items():
            if (getattr(self, field) is None) == (self.kind == kind):
                raise ValueError(f"an observable of kind {kind!r} needs {field}, and no other kind takes it")
        return self


class CounterfactualPlan(Strict):
    """A step that was not taken, on gradients that are held.

    Attributes:
        name: what results call it.
        advantages: a rule's name, or {id: advantage} for some of U.
        drop: sequences of U without which, by id; `*` stands for any characters.
        drop_prompts: prompts of U without which, by global_prompt_id.
        flip: sequences of U whose advantage changes its sign.
        scale: {sequences of U: factor}.
        max_norm: another clipping threshold; "none" for none, "step" for the step's own.
        lr: learning rate over the step's own.
    """

    name: str = Field(pattern=NAME)
    advantages: str | dict[str, float] | None = None
    drop: tuple[str, ...] = ()
    drop_prompts: tuple[str, ...] = ()
    flip: tuple[str, ...] = ()
    scale: dict[str, float] = Field(default_factory=dict)
    max_norm: Annotated[float, Field(gt=0)] | Literal["step", "none"] = "step"
    lr: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> CounterfactualPlan:
        if self == CounterfactualPlan.model_construct(name=self.name):
            raise ValueError(f"the counterfactual {self.name!r} changes nothing; say what would have been different")
        return self


class UncertaintyPlan(Strict):
    """Resampled prompts and permuted advantages."""

    draws: int = Field(1000, ge=20)
    coverage: float = Field(0.9, gt=0, lt=1)
    seed: int = Field(0, description="of the draws and of the permutations")


class StructurePlan(Strict):
    """What U is made of: principal components and clusters of K_UU, and how far it turns in a step."""

    components: int | None = Field(None, ge=1, description="three, or as many as there are sequences")
    clusters: int | None = Field(None, ge=1, description="eight, or as many as there are sequences")
    alignment: bool = Field(False, description="with K_UU after the step; one more gradient a sequence of U")


class RequestAnalyses(Strict):
    """What is asked of a request beside its effects.

    Attributes:
        ledger: the change as a sum that closes, with its rounding floor.
        sweep: the step at several sizes, predicted and taken.
        tokens: the change of every token, and of the entropy where it was drawn.
        parts: K·A and norms by layer and by kind of parameter.
        observables: other quantities than log π.
        counterfactuals: steps that were not taken.
        preconditioners: names of `fkernel.precond.alternatives`, whose influences are held against the realised change.
        uncertainty: intervals by prompt, and which contributors could be chance.
        covariates: correlation of the change with length, entropy, reward and log-probability.
    """

    ledger: bool = False
    sweep: Annotated[SweepPlan | None, Switch] = None
    tokens: Annotated[TokensPlan | None, Switch] = None
    parts: bool = False
    observables: tuple[ObservablePlan, ...] = ()
    counterfactuals: tuple[CounterfactualPlan, ...] = ()
    preconditioners: tuple[
        Literal["identity", "frozen", "post-step", "adamw", "rmsprop", "adafactor", "lion", "muon"], ...
    ] = ()
    uncertainty: Annotated[UncertaintyPlan | None, Switch] = None
    covariates: bool = False

    @model_validator(mode="after")
    def _named(self) -> RequestAnalyses:
        for what, asked in (("observables", self.observables), ("counterfactuals", self.counterfactuals)):
            names = [one.name for one in asked]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two {what} have the name {twice[0]!r}; give each one of its own (name:)")
        return self

    @property
    def of_rows(self) -> bool:
        """Whether something is asked that needs rows of K, or the gradients of E."""
        return self.ledger or self.parts or self.uncertainty is not None


class AnalysesPlan(RequestAnalyses):
    """The same for all requests that do not say; and what is asked of U itself.

    Attributes:
        health: what P rests on: coordinates that were never seen, and how much of the kernel's trace they carry.
        structure: principal components, clusters and exemplars of U.
    """

    health: bool = False
    structure: Annotated[StructurePlan | None, Switch] = None
