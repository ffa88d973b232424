"""Does a run's account predict what leaving sequences out does? A linear datamodeling score, against exact replays.

    y_se = S_e(θ_T) of a replay in which only the sequences s have weight 1     the truth, at fixed data
    ŷ_se = Σ_{u∈s} score_eu                                                     a prediction, up to a constant of e

s is a random half of a run's sequences, or of one step's. LDS_e is Spearman's correlation over s of y and ŷ, averaged
over e. Relative error: ‖−Σ_{u∉s} score_eu − (y_se − y_e)‖ / ‖y_se − y_e‖ with y_e of the whole run; also after the best
factor.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import runs_bergson
from benchmarks.runs_made import Reward, Setting, exact, probes_of, problems, recorded
from fkernel import func
from fkernel.precond import AdamWState, exact_state
from fkernel.record import Recording, replay
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling
from fkernel.rollout import probes_of as batch_of
from fkernel.shapes import Tree
from fkernel.study import account_recording

SUBSETS = 50
PROBES = probes_of(
    [("37+25=", "62"), ("37+25=", "52"), ("84-19=", "65"), ("84-19=", "75"), ("12-57=", "-45"), ("66+77=", "143")]
)
Array = np.ndarray
β1 = 0.9
"""Of AdamW, in all runs."""


class Case(NamedTuple):
    """Steps of a run that are looked at.

    Attributes:
        recording: of the run.
        steps: of it, a snapshot before the first.
        place: a directory for accounts.
        probes: E.
        f: S, (params, batch) -> [n_E].
        E: the probes' tokens.
        apply: the policy.
    """

    recording: Recording
    steps: range
    place: Path
    probes: GeneratedBatch
    f: Callable[[Tree, Any], torch.Tensor]
    E: Any
    apply: Any

    @classmethod
    def of(cls, recording: Recording, steps: range, place: Path, rows: list[dict[str, Any]]) -> Case:
        """Read what is needed."""
        net = recording.policy()
        probes = batch_of(rows, SampleGenerator(net, recording.tokenizer, template="bare", sampling=Sampling()))
        apply, _ = func.make_functional(net, [*recording.about["shapes"]])
        f = func.sequence_logprob(apply, recording.about["temperature"])
        return cls(recording, steps, place, probes, f, probes.sequences, apply)

    @property
    def ids(self) -> list[str]:
        """Ids of the steps' sequences, in their order."""
        return [name for number in self.steps for name in self.recording.step(number).sequence_ids]

    def after(self, dropped: Iterable[str] = ()) -> Array:
        """S of the probes after a replay without some sequences, [n_E]."""
        without = {*dropped}
        change = (lambda name, record: 0.0 if name in without else 1.0) if without else None
        *_, last = replay(self.recording, self.steps.stop, change, start=self.steps.start)
        with torch.no_grad():
            return self.f(last.params, self.E).double().numpy()

    def account(self, steps: range) -> Array:
        """Contributions of the sequences of some steps to the end of them, [n_E n]."""
        out = self.place / f"account-{steps.start}-{steps.stop}"
        return account_recording(self.recording, self.probes, out, steps=steps, p_values=False)["contributions"]


# ---------------------------------------------------------------------------------------------------------- scores


def scores(case: Case, peers: bool = True) -> dict[str, Array]:
    """Score every sequence for every probe, [n_E N], by name of the method; with bergson's where it is installed."""
    own = np.concatenate([case.account(range(t, t + 1)) for t in case.steps], 1)
    made = {
        "the run's account": case.account(case.steps),
        "K·A of its own step": own,
        "K·A of its own step / (1−β1)": own / (1 - β1),
    }
    made |= gradient_dots(case)
    theirs = runs_bergson.scores(case.recording, case.steps, case.probes) if peers else None
    return made if theirs is None else made | {runs_bergson.NAME: theirs.numpy()}


def gradient_dots(case: Case) -> dict[str, Array]:
    """Scores that know no path and no momentum: gradients' products at each step's own checkpoint, or the last one."""
    states = [*replay(case.recording, case.steps.stop, start=case.steps.start)]
    last, each = states[-1], {"plain": list[Array](), "last": list[Array](), "adam": list[Array]()}
    root = _scaled(exact_state(last.stored, last.params))
    at_last = _gradients(case.f, last.params, case.E)
    for state in states[:-1]:
        step = case.recording.step(state.number)
        f = func.weighted_logprob(case.apply, case.recording.about["temperature"])
        here, there = (_gradients(f, params, step.weighted) for params in (state.params, last.params))
        scale = -step.lr[0][0] * step.clip
        each["plain"].append(scale * _dots(_gradients(case.f, state.params, case.E), here))
        each["last"].append(scale * _dots(at_last, there))
        each["adam"].append(scale * _dots({name: root[name] * leaf for name, leaf in at_last.items()}, there))
    named = {"plain": "gradient dots, each step's weights (TracIn)", "last": "gradient dots, the last weights"}
    named["adam"] = "gradient dots / (√v̂+ε), the last weights and state"
    return {named[kind]: np.concatenate(blocks, 1) for kind, blocks in each.items()}


def _scaled(state: Any) -> Tree:
    """1 / (√v̂ + ε), as optimizer-aware influence scales gradients."""
    assert isinstance(state, AdamWState)
    corrected = {n: v / (1 - state.beta2[n] ** state.step[n]) for n, v in state.exp_avg_sq.items()}
    return {name: 1 / (v.sqrt() + state.eps[name]) for name, v in corrected.items()}


def _gradients(f: Any, params: Tree, batch: Any) -> Tree:
    return func.per_sequence_grad(f, 16)(params, batch)


def _dots(x: Tree, y: Tree) -> Array:
    return sum((x[name].flatten(1) @ y[name].flatten(1).T).double() for name in x).numpy()  # pyright: ignore


# ------------------------------------------------------------------------------------------------------- the score


def ranks(values: Array) -> Array:
    """Rank values from 1; equal ones share their mean rank.

    Example:
        >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + 1 + ends) / 2)[place]


def spearman(x: Array, y: Array) -> float:
    """Correlate ranks; 0 where one side is constant."""
    a, b = (ranks(each) - (len(each) + 1) / 2 for each in (x, y))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


def score_of(truth: Array, whole: Array, predicted: Array) -> dict[str, float]:
    """Hold predictions against what replays did.

    Args:
        truth: [n_s n_E] y.
        whole: [n_E] y of the whole run.
        predicted: [n_s n_E] what the dropped sequences are said to have done, negated.
    """
    change = truth - whole
    size = float(np.linalg.norm(change)) or 1.0
    factor = float((predicted * change).sum() / ((predicted**2).sum() or 1.0))
    rho = [spearman(truth[:, e], predicted[:, e]) for e in range(truth.shape[1])]
    return {
        "lds": float(np.mean(rho)),
        "lds_lowest": float(np.min(rho)),
        "error": float(np.linalg.norm(predicted - change)) / size,
        "factor": factor,
        "error_scaled": float(np.linalg.norm(factor * predicted - change)) / size,
    }


def judged(case: Case, subsets: int = SUBSETS, peers: bool = True) -> dict[str, Any]:
    """Halves of all sequences, and of the first step's, against every score; and the largest contributor left out."""
    made, ids, whole = scores(case, peers), case.ids, case.after()
    first = [i for i, name in enumerate(ids) if name.startswith(f"{case.steps.start:04d}/")]
    tables = {}
    for what, pool in (("run", [*range(len(ids))]), ("step", first)):
        draw = random.Random(0)
        dropped = [draw.sample(pool, len(pool) // 2) for _ in range(subsets)]
        truth = np.stack([case.after(ids[i] for i in some) for some in dropped])
        tables[what] = {
            name: score_of(truth, whole, np.stack([-S[:, some].sum(1) for some in dropped])) for name, S in made.items()
        } | {"size": {"change": float(np.abs(truth - whole).mean()), "sequences": len(pool)}}
    return {
        "steps": [case.steps.start, case.steps.stop],
        "scores": tables,
        "dropped_prompts": leave_out(case, made["the run's account"], whole),
    }


def leave_out(case: Case, C: Array, whole: Array) -> list[dict[str, Any]]:
    """Leave out, for each probe, the prompt that moved it most: what the account says, and what a replay does."""
    records = [record for number in case.steps for record in case.recording.step(number).records]
    prompts, ids, rows = [record.prompt for record in records], case.ids, []
    for e, name in enumerate(case.probes.ids):
        totals = dict.fromkeys(prompts, 0.0)
        for prompt, value in zip(prompts, C[e].tolist(), strict=True):
            totals[prompt] += value
        top = max(totals, key=lambda prompt: abs(totals[prompt]))
        change = float((case.after(n for n, each in zip(ids, prompts, strict=True) if each == top) - whole)[e])
        said = -totals[top]
        rows.append({"probe": name, "prompt": top, "said": said, "replayed": change, "ratio": change / (said or 1.0)})
    return rows


class Window(NamedTuple):
    """Steps of a run.

    Attributes:
        start: the first of them.
        options: of the run, beside those of every run.
    """

    start: int
    options: dict[str, Any]


LENGTH = 12
WINDOWS = {
    "from scratch, v = 0": Window(0, {}),
    "after 60 steps": Window(60, {}),
    "after 60 steps, without clipping": Window(60, {"max_grad_norm": 0.0}),
    "after 60 steps, lr 1e-5": Window(60, {"learning_rate": 1e-5}),
}


def measured(
    base: Path,
    windows: dict[str, Window] | None = None,
    length: int = LENGTH,
    subsets: int = SUBSETS,
    reward: Reward = exact,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Score windows of runs.

    Args:
        base: the policy that they begin with.
        windows: by name; None for all. They start at multiples of `length`.
        length: of a window.
        subsets: halves that are drawn.
        reward: that runs are trained on.
        peers: whether bergson is asked too.
    """
    rows = []
    for name, (start, options) in (WINDOWS if windows is None else windows).items():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            setting = Setting(start + length, (reward,), problems(400), length, options=options)
            case = Case.of(recorded(place, base, setting), range(start, start + length), place, PROBES)
            clip = float(np.median([case.recording.step(t).clip for t in case.steps]))
            rows.append({"window": name, "clip": clip, "subsets": subsets} | judged(case, subsets, peers))
    return rows
