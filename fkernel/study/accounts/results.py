"""The account of a run as it is kept: account.json and account.npz, readable without this library.

    realised_e = Σ_u contributions_eu + before_e + decay_e + arithmetic_e + unexplained_e + remainder_e     nats

Contributions are of every sequence of every step, to the end of the run: its own step and, by momentum, all later ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fkernel.errors import ResultsError
from fkernel.io import atomic_file, atomic_write, checksum, checksummed_json, make_directory, read_checksummed
from fkernel.study.diagnostics import grouped
from fkernel.study.outcome import SequenceInfo, as_record
from fkernel.study.sealed import DAMAGED, check_agrees, read_arrays
from fkernel.study.shown import html_of, plural, text_of
from fkernel.study.tables import account_dataset, account_frame

SCHEMA = 1
ACCOUNT, ARRAYS = "account.json", "account.npz"
COLUMNS = ("realised", "before", "decay", "arithmetic", "unexplained", "remainder", "floor")
STEPWISE = ("by_step", "own", "momentum")


class Share(NamedTuple):
    """What something did to a probe.

    Attributes:
        id: of a sequence, a prompt or a reward function.
        value: nats.
        p: against advantages permuted within prompts; None where that was not asked.
        times: identical sequences that it is the sum of.
    """

    id: str
    value: float
    p: float | None = None
    times: int = 1


@dataclass(frozen=True, eq=False, repr=False)
class AccountResults:
    """What happened to every probe over a run, and who did it.

    Attributes:
        about: the recording, its steps, the path, temperature, observable, versions.
        probes: E.
        sequences: of the run, N: id ("0012/U-003-05"), step, texts, reward, rewards, advantage, prompt_id, tokens.
        steps: T: step, lr, loss, grad_norm, clip.
        arrays: by name; contributions [n_E, N], the columns [n_E], by_step, own and momentum [n_E, T], and where asked
            p [n_E, N], rewards [n_E, T, R] and older [n_E, A]; parts [n_E, T, P] where the loss has several.
        facts: of the arrays that are not there, why; names of reward_functions, parts and ages.
    """

    about: dict[str, Any]
    probes: tuple[SequenceInfo, ...]
    sequences: tuple[dict[str, Any], ...]
    steps: tuple[dict[str, Any], ...]
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by name.

        Raises:
            ResultsError: there is none.
        """
        if name not in self.arrays:
            why = self.facts.get(name, f"it has {', '.join(self.arrays)}")
            raise ResultsError(f"The account has no {name!r}: {why}.")
        return self.arrays[name]

    def __repr__(self) -> str:
        """One screen: the probes."""
        title = f"AccountResults: {plural(len(self.probes), 'probe')}, {plural(len(self.steps), 'step')}, "
        lines = [f"{info.id}: {1e3 * value:+.3f}" for info, value in zip(self.probes, self["realised"], strict=True)]
        return text_of(f"{title}{plural(len(self.sequences), 'sequence')}; realised change, 10⁻³ nats", lines)

    def _repr_html_(self) -> str:
        """A table of the probes, for notebooks."""
        rows = []
        for e, info in enumerate(self.probes):
            top, ledger = self.top_sequences(e, 1), [1e3 * float(values[e]) for values in self.ledger.values()]
            most = [top[0].id, 1e3 * top[0].value] if top else ["", ""]
            rows.append([info.id, info.prompt[-40:], info.response[-40:], *ledger, *most])
        heads = ["id", "prompt", "response", *self.ledger, "most by", "its effect"]
        return html_of("The run's account, 10⁻³ nats", heads, rows)

    def to_frame(self) -> Any:
        """A pandas table of the probes, one row each: texts, what adds up to the change, the largest contributor.

        Raises:
            ResultsError: pandas is not installed.
        """
        return account_frame(self.probes, self.ledger, [self.top_sequences(e, 1) for e in range(len(self.probes))])

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` of contributions over (probe, sequence), and of what adds up to each probe's change.

        Raises:
            ResultsError: xarray is not installed.
        """
        return account_dataset(self.probes, self.sequences, self.ledger, self["contributions"])

    @property
    def sequence_ids(self) -> list[str]:
        """Ids of the columns."""
        return [row["id"] for row in self.sequences]

    @property
    def step_of(self) -> np.ndarray:
        """[N] the step of each column."""
        return np.array([row["step"] for row in self.sequences], dtype=np.int64)

    @property
    def ledger(self) -> dict[str, np.ndarray]:
        """{column: [n_E]} what adds up to realised, and realised and floor beside."""
        return {"sequences": self["contributions"].sum(1, dtype=np.float64), **{name: self[name] for name in COLUMNS}}

    def row(self, probe: str | int) -> int:
        """The row of a probe, by id or position.

        Raises:
            ResultsError: there is none.
        """
        ids = [info.id for info in self.probes]
        if isinstance(probe, int) and 0 <= probe < len(ids):
            return probe
        if probe not in ids:
            raise ResultsError(f"There is no probe {probe!r}; the account has {', '.join(ids[:8])}.")
        return ids.index(str(probe))

    def top_sequences(self, probe: str | int, k: int = 10, group_identical: bool = False) -> list[Share]:
        """The sequences that moved a probe most over the run, largest first.

        Args:
            probe: its id, or position.
            k: how many.
            group_identical: whether sequences of a step with the same prompt and response are one, with their sum and
                their smallest p, named after the one that did most.
        """
        e, p = self.row(probe), self.arrays.get("p")
        C = self["contributions"][e]
        order = np.argsort(-np.abs(C), kind="stable")
        ps = [None] * len(C) if p is None else p[e].tolist()
        if not group_identical:
            return [Share(self.sequences[u]["id"], float(C[u]), ps[u]) for u in order[:k]]
        keys, least = [_texts(self.sequences[u]) for u in order], dict[str, float | None]()
        for key, u in zip(keys, order, strict=True):
            least[key] = ps[u] if ps[u] is None else min(least.get(key) or 1.0, ps[u])
        alike = zip(*grouped(C[order].astype(np.float64), keys), strict=True)
        most = sorted(alike, key=lambda each: -abs(each[1]))[:k]
        return [Share(self.sequences[order[i]]["id"], sum_, least[keys[i]], times) for i, sum_, times in most]

    def identical_to(self, sequence: str) -> list[str]:
        """The ids of a step's sequences with the prompt and the response of one of them, itself among them.

        Args:
            sequence: its id.
        """
        key = _texts(self.sequences[self.sequence_ids.index(sequence)])
        return [row["id"] for row in self.sequences if _texts(row) == key]

    def top_prompts(self, probe: str | int, k: int = 10) -> list[Share]:
        """The prompts whose sequences moved a probe most, each over all steps, largest first."""
        totals = dict[str, float]()
        for row, value in zip(self.sequences, self["contributions"][self.row(probe)].tolist(), strict=True):
            totals[row["prompt_id"]] = totals.get(row["prompt_id"], 0.0) + value
        return [Share(name, totals[name]) for name in sorted(totals, key=lambda name: -abs(totals[name]))[:k]]

    def top_rewards(self, probe: str | int) -> list[Share]:
        """What each reward function did to a probe over the run, by its share of advantages.

        Raises:
            ResultsError: the run has no named rewards, or its loss is not made of advantages alone.
        """
        values = self["rewards"][self.row(probe)].sum(0, dtype=np.float64)
        return [Share(name, float(value)) for name, value in zip(self.facts["reward_functions"], values, strict=True)]

    def top_parts(self, probe: str | int) -> list[Share]:
        """What each part of the loss did to a probe over the run.

        Raises:
            ResultsError: the loss has one part, or its parts were not told apart.
        """
        if "parts" not in self.arrays:
            raise ResultsError("The account has no parts: the recording tells none of the loss apart.")
        values = self["parts"][self.row(probe)].sum(0, dtype=np.float64)
        return [Share(name, float(value)) for name, value in zip(self.facts["parts"], values, strict=True)]

    def by_age(self, probe: str | int) -> list[Share]:
        """What gradients did to a probe by their age: in their own step, one step later, two to three steps later, ….

        What the optimizer remembered from before the run counts as the oldest. Adds up to own + momentum.

        Raises:
            ResultsError: ages were not asked for.
        """
        if "older" not in self.arrays:
            raise ResultsError("The account has no ages; ask for them (ages=True, --ages).")
        e, ages = self.row(probe), self.facts["ages"]
        older = [*self["older"][e].tolist(), 0.0]
        names = [f"{a}" if a + 1 == b else f"{a}-{b - 1}" for a, b in pairwise(ages)] + [f"{ages[-1]}+"]
        shares = [Share(name, older[i] - older[i + 1]) for i, name in enumerate(names)]
        return [Share("0", float(self["own"][e].sum(dtype=np.float64))), *shares]

    def prompt_text(self, prompt_id: str) -> str:
        """The text of a prompt."""
        return next((row["prompt"] for row in self.sequences if row["prompt_id"] == prompt_id), "")

    def save(self, directory: str | Path) -> Path:
        """Write both files atomically, account.json last.

        Returns:
            The directory.
        """
        place = Path(directory)
        make_directory(place)
        made = {
            **self.arrays,
            "sequence_ids": np.array(self.sequence_ids, dtype=np.str_),
            "probe_ids": np.array([info.id for info in self.probes], dtype=np.str_),
            "step_of": self.step_of,
            "steps": np.array([row["step"] for row in self.steps], dtype=np.int64),
        }
        record = {"schema": SCHEMA, **self.summary(), "sequences": [*self.sequences]}
        json.dumps(record, allow_nan=False)  # before anything is replaced
        with atomic_file(place / ARRAYS) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **made)
        record["sha256"] = {ARRAYS: checksum(place / ARRAYS)}
        atomic_write(place / ACCOUNT, [checksummed_json(record)])
        return place

    def summary(self) -> dict[str, Any]:
        """JSON: what the account is about, its steps, and each probe's ledger and largest contributors."""
        probes = [as_record(info) | self._columns(e) for e, info in enumerate(self.probes)]
        return {"about": self.about, "facts": self.facts, "probes": probes, "steps": [*self.steps]}

    def _columns(self, e: int) -> dict[str, Any]:
        """What account.json says of a probe, for those who read no arrays."""
        ledger = {name: float(values[e]) for name, values in self.ledger.items()}
        top, prompts = ([share._asdict() for share in each] for each in (self.top_sequences(e), self.top_prompts(e)))
        for share in (*top, *prompts):
            del share["times"]
        return {"ledger": ledger, "top_sequences": top, "top_prompts": prompts}

    @classmethod
    def load(cls, directory: str | Path) -> AccountResults:
        """Read what `save` wrote.

        Raises:
            ResultsError: a file is missing, damaged, of another run, or of another schema.
        """
        place = Path(directory)
        try:
            record = read_checksummed(place / ACCOUNT)
            arrays = read_arrays(place / ARRAYS)
            same = checksum(place / ARRAYS) == record["sha256"][ARRAYS]
        except DAMAGED as error:
            raise ResultsError(f"{str(place)!r} holds no readable {ACCOUNT} and {ARRAYS}: {error}") from error
        if record.get("schema") != SCHEMA:
            raise ResultsError(f"{place} has schema {record.get('schema')}; this version of fkernel reads {SCHEMA}.")
        if not same:
            raise ResultsError(f"{place / ARRAYS} is not the file that was written with {ACCOUNT}.")
        try:
            results = cls._of(record, arrays)
            made = {"schema": SCHEMA, **results.summary(), "sequences": [*results.sequences]}
            check_agrees(made, {key: value for key, value in record.items() if key != "sha256"}, place / ACCOUNT)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, ResultsError):
                raise
            raise ResultsError(f"{place} is damaged: {type(error).__name__} {error}.") from error
        return results

    @classmethod
    def _of(cls, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> AccountResults:
        names = {*SequenceInfo.__dataclass_fields__} - {"times"}
        probes = tuple(SequenceInfo(**{key: row[key] for key in names}) for row in record["probes"])
        for name in ("sequence_ids", "probe_ids", "step_of", "steps"):
            del arrays[name]
        return cls(record["about"], probes, tuple(record["sequences"]), tuple(record["steps"]), arrays, record["facts"])


def _texts(row: dict[str, Any]) -> str:
    """What identical sequences of a step have in common; one without texts is like no other."""
    texts = [row["prompt"], row["response"]]
    return json.dumps([row["step"], *texts] if any(texts) else row["id"])
