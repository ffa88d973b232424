"""All analyses of one request, in two halves: those that take rows as they come, and those that follow.

One that fails is left out, and the others are answered; see `fkernel.study.analyses.failures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fkernel.engine.contraction import Block
from fkernel.func.contract import Asked
from fkernel.study.analyses.covariates import covariates_of
from fkernel.study.analyses.effects import counterfactual_of, ledger_of, preconditioners_of, sweep_of, weights_of
from fkernel.study.analyses.failures import tried
from fkernel.study.analyses.observables import observable_of
from fkernel.study.analyses.plan import RequestAnalyses
from fkernel.study.analyses.situation import Situation
from fkernel.study.analyses.takers import FloorTaker, PartsTaker, Taker, UncertaintyTaker
from fkernel.study.analyses.tokens import tokens_found
from fkernel.study.outcome import Finding


class Accounts:
    """What is asked of a request beside its effects, while it is being answered."""

    def __init__(self, asked: RequestAnalyses, at: Situation, strict: bool) -> None:
        """Take what is asked; `strict` says whether an id that this request lacks is an error."""
        self.plan, self.at, self.strict = asked, at, strict
        for other in asked.counterfactuals:
            weights_of(other, at.workspace)  # what names nothing is said now, and not after all rows
        self.floor = FloorTaker(at) if asked.ledger else None
        self.parts = PartsTaker(at) if asked.parts else None
        self.sure = UncertaintyTaker(at, asked.uncertainty) if asked.uncertainty else None
        self.failed: dict[str, Finding] = {}

    def asked(self, of: Asked) -> Asked:
        """Add what the analyses of rows ask of the walk; one that cannot say it is left out."""
        for name, taker in self._takers():
            found, lost = self._tried(name, lambda taker=taker, of=of: taker.ask(of))
            self.failed |= {} if lost is None else {name: lost}
            of = of if lost is not None else found
        return of

    def add(self, block: Block) -> None:
        """Take some rows; what fails takes no more of them."""
        for name, taker in self._takers():
            _, lost = self._tried(name, lambda taker=taker: taker.add(block))
            self.failed |= {} if lost is None else {name: lost}

    def _takers(self) -> list[tuple[str, Taker]]:
        named = (("ledger", self.floor), ("parts", self.parts), ("uncertainty", self.sure))
        return [(name, taker) for name, taker in named if taker is not None and name not in self.failed]

    def findings(self) -> dict[str, Finding]:
        """Make everything that was asked; what lacks something says what."""
        asked, at, made = self.plan, self.at, dict[str, Callable[[], Finding]]()
        if (floor := self.floor) is not None:
            made["ledger"] = lambda: ledger_of(at, floor.floor)
        if (sweep := asked.sweep) is not None:
            made["sweep"] = lambda: sweep_of(at, sweep)
        if (tokens := asked.tokens) is not None:
            made["tokens"] = lambda: tokens_found(at, tokens, self.strict)
        if self.parts is not None:
            made["parts"] = self.parts.finding
        for observable in asked.observables:
            made[f"observables.{observable.name}"] = lambda one=observable: observable_of(at, one, self.strict)
        for other in asked.counterfactuals:
            made[f"counterfactuals.{other.name}"] = lambda one=other: counterfactual_of(at, one)
        if asked.preconditioners:
            made["preconditioners"] = lambda: preconditioners_of(at, asked.preconditioners)
        if self.sure is not None:
            made["uncertainty"] = self.sure.finding
        if asked.covariates:
            made["covariates"] = lambda: covariates_of(at)
        return {name: self.failed.get(name) or self._finding(name, make) for name, make in made.items()}

    def _finding(self, name: str, make: Callable[[], Finding]) -> Finding:
        """Make one finding, or say why there is none."""
        found, lost = self._tried(name, make)
        return lost or found

    def _tried(self, name: str, do: Callable[[], Any]) -> tuple[Any, Finding | None]:
        """Do a part of one analysis: (what it gives, None), or (None, why the analysis is left out)."""
        ids = None if name.startswith("observables.") else self.at.batch.ids  # whose rows are their own
        return tried(name, "the request's", do, ids)
