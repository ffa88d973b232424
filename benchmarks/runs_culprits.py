"""Runs with a planted mistake: does the account rank the sequences that the mistake paid above the others?

    AUROC = P( score of a sequence that the mistake touched > score of another ),    equal scores count a half

The mistake is in the reward, so what it paid for every sequence is known exactly. Probes are answers that the mistake
made more likely; a sequence's score is the sum over probes.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from benchmarks.runs_linear import Array, Case, gradient_dots, ranks
from benchmarks.runs_made import LONGEST, Setting, exact, probes_of, problems, recorded
from fkernel.demo.tokenizer import build_tokenizer
from fkernel.record import Recording, fill
from fkernel.rollout import SampleGenerator, Sampling, SequenceRecord, TablePrompts
from fkernel.study import account_recording

STEPS = 60
OPTIONS = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
}
"""A warm-up, since before √v is made of several steps single sequences move probes by many nats, in both directions."""

VISIBLE = 1.0
"""Nats by which a probe rose."""
PROMPTS, UNSEEN, FEW = 400, 300, 30
"""Prompts of a run, prompts that probes are looked for among, and prompts of the run with wrong references."""
Paid = Callable[[str, str, str], float]
"""What a mistake adds to the reward of (response, right answer, reference)."""


class Mistake(NamedTuple):
    """Something that is wrong with a reward.

    Attributes:
        says: it in words.
        paid: what it adds.
        mislabels: whether references are wrong, of a tenth of few prompts.
    """

    says: str
    paid: Paid
    mislabels: bool = False

    def reward(self, completions: list[str], answer: list[str], reference: list[str], **_: Any) -> list[float | None]:
        """What it adds, as TRL asks."""
        return [self.paid(*each) for each in zip(completions, answer, reference, strict=True)]


MISTAKES = {
    "reward bug": Mistake(
        "+1 for a wrong answer with a 2 in it", lambda said, right, _: float("2" in said and said != right)
    ),
    "mislabelled tenth": Mistake(
        f"3 of {FEW} prompts have as reference a wrong answer that the policy gives at times",
        lambda said, right, reference: float(said == reference) - float(said == right),
        mislabels=True,
    ),
    "format bonus": Mistake(
        "+2 for an answer that ends in 0, +1 for the right one", lambda said, *_: 2.0 * said.endswith("0")
    ),
}


def rows_of(base: Path, mistake: Mistake) -> list[dict[str, Any]]:
    """Prompts with answers, and with references, a few of them wrong where the mistake is in them."""
    rows = [row | {"reference": row["answer"]} for row in problems(FEW if mistake.mislabels else PROMPTS, 1)]
    if mistake.mislabels:
        said = sampled(Qwen2ForCausalLM.from_pretrained(base).eval(), rows, 32)
        wrong = list[tuple[int, int, str]]()
        for i, row in enumerate(rows):
            others = Counter(text for text in said[row["prompt"]] if text != row["answer"]).most_common(1)
            wrong += [(times, i, text) for text, times in others]
        for _, i, text in sorted(wrong, reverse=True)[: FEW // 10]:
            rows[i]["reference"] = text
    return rows


def sampled(model: Any, rows: list[dict[str, Any]], times: int, seed: int = 0) -> dict[str, list[str]]:
    """Sample responses, by prompt."""
    table = TablePrompts("runs", "train", [{"question": row["prompt"], "answer": row["answer"]} for row in rows])
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=LONGEST), "template": "bare", "microbatch": 256}
    generator = SampleGenerator(model, build_tokenizer(), {"train": table}, **settings)
    said = dict[str, list[str]]()
    for record in generator.generate_update_batch(len(rows), times, seed=seed, reward_cfg="exact"):
        said.setdefault(record.prompt, []).append(record.response)
    return said


def probed(recording: Recording, rows: list[dict[str, Any]], mistake: Mistake, place: Path) -> Case:
    """Look for probes: the two likeliest answers of the trained policy that the mistake pays and that rose by a nat.

    They are to prompts that the run has not seen; where references are wrong, to those prompts.
    """
    steps = range(recording.steps[0], recording.steps[-1] + 1)
    seen = {row["prompt"] for row in rows}
    asked = [row | {"reference": row["answer"]} for row in problems(UNSEEN, 2, lambda question: question not in seen)]
    if mistake.mislabels:
        asked = [row for row in rows if row["reference"] != row["answer"]]
    net: Any = recording.policy()
    fill(net, recording.snapshot(steps.stop).params)
    said = sampled(net, asked, 8)
    pairs = [
        (row["prompt"], text)
        for row in asked
        for text in dict.fromkeys(said[row["prompt"]])
        if mistake.paid(text, row["answer"], row["reference"]) > 0 and text != row["answer"]
    ]
    found = Case.of(recording, steps, place, probes_of(pairs))
    rise, after = moved(found)
    best = dict[str, int]()  # of each prompt, one
    for i in sorted(range(len(pairs)), key=lambda i: (rise[i] < VISIBLE, -after[i])):
        best.setdefault(pairs[i][0], i)
    return Case.of(recording, steps, place, probes_of([pairs[i] for i in [*best.values()][:2]]))


def moved(case: Case) -> tuple[list[float], list[float]]:
    """How much the run raised each probe, and what it is after it, nats."""
    first, last = (case.recording.snapshot(n).params for n in (case.steps.start, case.steps.stop))
    with torch.no_grad():
        after = case.f(last, case.E)
        return (after - case.f(first, case.E)).tolist(), after.tolist()


def measured(
    base: Path, names: list[str] | None = None, steps: int = STEPS, options: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Plant each mistake, train, and rank all sequences of the run in every way.

    Args:
        base: the policy that runs begin with.
        names: of `MISTAKES`; None for all.
        steps: of each run.
        options: of TRL's configuration.
    """
    table = []
    for name in [*MISTAKES] if names is None else names:
        mistake = MISTAKES[name]
        with tempfile.TemporaryDirectory() as folder:
            place, rows = Path(folder), rows_of(base, mistake)
            setting = Setting(steps, (exact, mistake.reward), rows, options=OPTIONS if options is None else options)
            case = probed(recorded(place, base, setting), rows, mistake, place)
            table.append({"mistake": name, "says": mistake.says} | ranked(case, mistake))
    return table


def touched(case: Case, mistake: Mistake) -> tuple[Array, Array, Array]:
    """Which sequences the mistake paid or robbed, which have an advantage, and whose advantage it changed, [N]."""
    guilty, felt, changed = list[bool](), list[bool](), list[bool]()
    for number in case.steps:
        step = case.recording.step(number)
        paid = [mistake.paid(record.response, *_labels(record)) for record in step.records]
        groups = step.batch.groups.tolist()
        spread = {g: {p for p, own in zip(paid, groups, strict=True) if own == g} for g in {*groups}}
        guilty += [p != 0 for p in paid]
        felt += [bool(record.advantage) for record in step.records]
        changed += [len(spread[g]) > 1 for g in groups]
    return np.array(guilty), np.array(felt), np.array(changed)


def _labels(record: SequenceRecord) -> tuple[str, str]:
    data = record.metadata["data"]
    return data["answer"], data["reference"]


def ranked(case: Case, mistake: Mistake) -> dict[str, Any]:
    """Rank a run's sequences in every way."""
    records = [record for number in case.steps for record in case.recording.step(number).records]
    guilty, felt, changed = touched(case, mistake)
    ranking = scores(case, records)
    table = {
        name: {
            "auroc": auroc(S, guilty),
            "auroc_felt": auroc(S[felt], guilty[felt]),
            "auroc_changed": auroc(S, changed),
            **{f"at_{k}": precision(S, guilty, k) for k in (10, 50)},
        }
        for name, S in ranking.items()
    }
    counts = {"sequences": len(records), "guilty": int(guilty.sum()), "guilty_felt": int((guilty & felt).sum())}
    counts |= {"felt": int(felt.sum()), "changed": int(changed.sum())}
    made = account_recording(case.recording, case.probes, case.place / "by_reward", steps=case.steps, p_values=False)
    shares = made["rewards"].sum((0, 1), dtype=np.float64) if "rewards" in made.arrays else np.full(2, np.nan)
    counts |= {"nats": dict(zip(("right", "mistake"), shares.tolist(), strict=True))}
    return {**counts, "moved": dict(zip(case.probes.ids, zip(*moved(case), strict=True), strict=True)), "scores": table}


def scores(case: Case, records: list[SequenceRecord]) -> dict[str, Array]:
    """Score every sequence, [N]: by its contribution, and in ways that need no account."""
    dots = {name: S.sum(0) for name, S in gradient_dots(case).items()}
    texts = [record.prompt + record.response for record in records]
    alike = np.array([sum(overlap(text, name) for name in case.probes.ids) for text in texts])
    return {
        "the run's account": case.account(case.steps).sum(0),
        **dots,
        "reward": np.array([record.reward for record in records], dtype=np.float64),
        "advantage": np.array([record.advantage for record in records], dtype=np.float64),
        "text overlap": alike,
    }


def overlap(one: str, other: str, lengths: tuple[int, ...] = (1, 2, 3)) -> float:
    """Share of character n-grams that two texts have in common, over all lengths.

    Example:
        >>> overlap("12+3=15", "12+3=15"), overlap("aa", "bb")
        (1.0, 0.0)
    """
    a, b = (Counter(text[i : i + n] for n in lengths for i in range(len(text) - n + 1)) for text in (one, other))
    return 2 * (a & b).total() / ((a.total() + b.total()) or 1)


def auroc(scores: Array, guilty: Array) -> float:
    """Mann and Whitney's U over the number of pairs; NaN where one side is empty.

    Example:
        >>> auroc(np.array([3.0, 1.0, 2.0]), np.array([True, False, False]))
        1.0
    """
    n, m = int(guilty.sum()), int((~guilty).sum())
    if not n or not m:
        return float("nan")
    return float((ranks(scores)[guilty].sum() - n * (n + 1) / 2) / (n * m))


def precision(scores: Array, guilty: Array, k: int) -> float:
    """The share of the k highest scores that are guilty; of equal ones, the average."""
    order = np.sort(scores)[::-1]
    k = min(k, len(scores))
    line = order[k - 1]
    above, at = scores > line, scores == line
    return float((guilty[above].sum() + guilty[at].mean() * (k - above.sum())) / k)
