"""What the account of a run found, in a few lines: which probes moved most, by which rewards, sequences and prompts."""

from __future__ import annotations

import numpy as np

from fkernel.analysis import Recurrence, recurrences
from fkernel.report.run_tables import one_line, probe_text, prompts_of, sequence_text
from fkernel.report.style import largest
from fkernel.report.table import CHANCE
from fkernel.report.units import Unit, unit_of
from fkernel.study import AccountResults, Share

FEW = 3
"""Probes of which each is told."""
LOOKED_AT = 1000
"""Sequences, the largest first, among which the one is looked for that did most of a change."""


def account_findings(results: AccountResults) -> list[str]:
    """Say of the three probes that moved most what moved them, in how many steps, and whether that could be chance.

    Args:
        results: the account.

    Returns:
        Lines of plain text: for each probe its change, and beneath it what reward functions, the sequence and the
        prompt did that are most of it.
    """
    unit = unit_of(results)
    name, lines = f"· {unit.name}" if unit.scale != 1 else unit.name, []
    for e in largest(results["realised"], FEW):
        lines.append(f"{probe_text(results, e)}: moved by {unit(results['realised'][e])} {name}")
        lines += [f"  {line}" for line in _movers(results, e, unit)]
    return lines


def most_of_it(results: AccountResults) -> list[str]:
    """The sequence that did most of the change of the probe that moved most, and those of its step identical to it.

    Args:
        results: the account.

    Returns:
        their ids; none where none did anything.
    """
    share = _most(results, largest(results["realised"], 1)[0])
    return [] if share is None else results.identical_to(share.id)


def _movers(results: AccountResults, e: int, unit: Unit) -> list[str]:
    lines = []
    if "rewards" in results.arrays:
        by_step, steps = results["rewards"][e], [*range(len(results.steps))]
        names = results.facts["reward_functions"]
        functions = [recurrences([name] * len(steps), steps, by_step[:, r].tolist()) for r, name in enumerate(names)]
        told = sorted(
            (each for recurrences_of_one in functions for each in recurrences_of_one), key=lambda each: -abs(each.total)
        )
        if told:
            lines.append("by reward: " + "; ".join(f"{one_line(each.id)} {_recurred(each, unit)}" for each in told))
    share = _most(results, e)
    if share is not None:
        row = results.sequences[results.sequence_ids.index(share.id)]
        text, times = sequence_text(row["prompt"], row["response"]), f" × {share.times}" if share.times > 1 else ""
        lines.append(f"most of it by {share.id}{times}, {text}: {unit(share.value)}{_p(share.p)}")
    way = np.sign(results["realised"][e])
    prompt = next((each for each in prompts_of(results, e) if way * each.total > 0), None)
    if prompt is not None:
        text = one_line(results.prompt_text(prompt.id) or prompt.id)[-44:]
        lines.append(f"most of it by the prompt {text}: {_recurred(prompt, unit)}")
    return lines


def _most(results: AccountResults, e: int) -> Share | None:
    """The sequence, or the identical ones of a step, that did most in the direction in which a probe moved."""
    way = np.sign(results["realised"][e])
    shares = results.top_sequences(e, LOOKED_AT, group_identical=True)
    return next((share for share in shares if way * share.value > 0), None)


def _recurred(each: Recurrence, unit: Unit) -> str:
    """A sum, and the steps that agreed with its sign."""
    if each.steps < 2:
        return unit(each.total)
    agreed, what = (each.up, "raised") if each.total > 0 else (each.steps - each.up, "lowered")
    return f"{unit(each.total)} ({what} it in {agreed} of {each.steps} steps{_p(each.p)})"


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return f", p {'< 0.001' if p < 5e-4 else f'{p:.2g}'}" + ("" if p <= CHANCE else ", could be chance")
