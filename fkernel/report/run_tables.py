"""Tables of a run's account, for a terminal: what happened to its probes, and who did it."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from fkernel.analysis import Recurrence, recurrences
from fkernel.report.style import largest, percent, tail
from fkernel.report.table import CHANCE
from fkernel.report.units import Unit, unit_of
from fkernel.study import AccountResults, Share

SIDE = ("before", "decay", "arithmetic", "unexplained", "remainder")
"""Columns of the ledger beside the sequences' own; left out where there is nothing to see in them."""
FLOORS = 3
"""Times its rounding floor that a number must have to be more than rounding."""
LEFT_OVER = 0.05
"""Share of the realised change that what is left over may have."""


def account_table(results: AccountResults, rows: int = 10) -> Table:
    """Tabulate the probes that moved most over a run, and the columns that add up to their change.

    Columns where there is nothing to see, rounding aside, are left out, and named below the table.

    Args:
        results: the account.
        rows: probes to show, by the size of their realised change.

    Returns:
        A rich table, all in one unit, which its title says.
    """
    order, unit, ledger = largest(results["realised"], rows), unit_of(results), results.ledger
    shown, hidden = _columns(results, order, unit)
    count = f"the {len(order)} that moved most of {len(results.probes)} probes"
    table = Table(
        title=f"What the run did to {count if len(order) < len(results.probes) else 'its probes'} ({unit.name})",
        caption=f"realised = {' + '.join(('sequences', *shown))}; by momentum: in steps after a sequence's own"
        + (f"\n0, and left out: {', '.join(hidden)}" if hidden else ""),
    )
    table.add_column("probe", no_wrap=True)
    for name in ("realised", "sequences", "of it by momentum", *shown, "± rounding"):
        table.add_column(name, justify="right", style="bold" if name == "realised" else None)
    later = ledger["sequences"] - results["own"].sum(1, dtype=np.float64)
    for e in order:
        values = (ledger["realised"][e], ledger["sequences"][e], later[e], *(ledger[name][e] for name in shown))
        floor = f"{unit.scale * float(ledger['floor'][e]):.2g}"
        table.add_row(Text(probe_text(results, e)), *map(unit, values), floor)
    return table


def culprits_table(results: AccountResults, probe: str | int, k: int = 10) -> Table:
    """Tabulate the sequences of the run that moved a probe most.

    Args:
        results: the account.
        probe: its id, or position.
        k: sequences to show, by the size of their contribution.

    Returns:
        A rich table; contributions are to the end of the run. Identical sequences of a step are one line, "× 4", with
        their sum.

    Raises:
        ResultsError: there is no such probe.
    """
    e, unit = results.row(probe), unit_of(results)
    table = _about_a_probe(results, e, "the sequences that moved it most", unit)
    for name in ("step", "sequence", "prompt→response", "reward", "advantage", "contribution"):
        left = name in ("sequence", "prompt→response")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    places = {name: u for u, name in enumerate(results.sequence_ids)}
    for share in results.top_sequences(e, k, group_identical=True):
        row = results.sequences[places[share.id]]
        mark = "" if share.p is None else "*" if is_told_apart(share) else " "
        numbers = (_number(row[name], sign) for name, sign in (("reward", ""), ("advantage", "+")))
        texts = Text(sequence_text(row["prompt"], row["response"]))
        name = Text(f"{share.id} × {share.times}" if share.times > 1 else share.id)
        table.add_row(str(row["step"]), name, texts, *numbers, unit(share.value) + mark)
    table.caption = _chance(results, e)
    return table


def prompts_table(results: AccountResults, probe: str | int, k: int = 10) -> Table:
    """Tabulate the prompts that moved a probe most over all steps, and whether they always did so the same way.

    Args:
        results: the account.
        probe: its id, or position.
        k: prompts to show, by the size of their contributions' sum.

    Returns:
        A rich table; p is the sign test of steps for and against, where there are two or more.

    Raises:
        ResultsError: there is no such probe.
    """
    e, unit = results.row(probe), unit_of(results)
    table = _about_a_probe(results, e, "the prompts that moved it most", unit)
    table.caption = "steps that trained on it; of these that raised or lowered the probe; p of so uneven a split"
    for name in ("prompt", "steps", "raised", "lowered", "p", "contribution"):
        table.add_column(name, justify="left" if name == "prompt" else "right", no_wrap=True)
    came = dict[str, set[int]]()
    for row in results.sequences:
        came.setdefault(row["prompt_id"], set()).add(row["step"])
    for each in prompts_of(results, e)[:k]:
        p = f"{each.p:.3f}" if each.steps > 1 else "–"
        counts = (str(len(came[each.id])), str(each.up), str(each.steps - each.up))
        text = Text(one_line(tail(results.prompt_text(each.id) or each.id, 48)))
        table.add_row(text, *counts, p, unit(each.total))
    return table


def rewards_table(results: AccountResults, probe: str | int) -> Table | str:
    """Tabulate what each reward function did to a probe over the run, by its share of the advantages.

    Args:
        results: the account.
        probe: its id, or position.

    Returns:
        A rich table, or a line with the reason why contributions are not split by reward function.

    Raises:
        ResultsError: there is no such probe.
    """
    e, unit = results.row(probe), unit_of(results)
    if "rewards" not in results.arrays:
        return _missing(results, "rewards")
    table = _about_a_probe(results, e, "what each reward function did to it", unit)
    table.caption = "by the step that trained on it, to the end of the run"
    for name in ("reward function", "steps raised", "steps lowered", "contribution"):
        table.add_column(name, justify="left" if name == "reward function" else "right")
    by_step = results["rewards"][e]
    for r, share in enumerate(results.top_rewards(e)):
        counts = (int((sign * by_step[:, r] > 0).sum()) for sign in (1, -1))
        table.add_row(Text(one_line(share.id)), *map(str, counts), unit(share.value))
    table.add_section()
    table.add_row("together", "", "", unit(by_step.sum(dtype=np.float64)))
    return table


def account_lines(results: AccountResults) -> list[str]:
    """Lines about what was accounted for, whether it adds up, and what is missing and why; plain text, no markup.

    Args:
        results: the account.
    """
    about, steps = results.about, [row["step"] for row in results.steps]
    observable = {"logprob": "log π"}.get(about["observable"], about["observable"])
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    counts = f"{_count(len(results.sequences), 'sequence')}, {_count(len(results.probes), 'probe')}"
    lines = [f"Account of {about['recording']}: {span}, {counts}, {observable}; path {about['path']}"]
    lines += _adds_up(results)
    lines += [_missing(results, name) for name in ("p", "rewards") if name not in results.arrays]
    return lines


def left_over(results: AccountResults, name: str) -> np.ndarray:
    """Probes of which a column is more than 5 % of their realised change, and more than three rounding floors.

    Args:
        results: the account.
        name: "remainder" or "unexplained".

    Returns:
        Their rows, the largest first.
    """
    size, realised = np.abs(results[name]), np.abs(results["realised"])
    loud = (size > LEFT_OVER * realised) & (size > FLOORS * results["floor"])
    return np.array([e for e in largest(size, len(size)) if loud[e]], dtype=np.int64)


def prompts_of(results: AccountResults, e: int) -> list[Recurrence]:
    """Sums over prompts, largest first; a step where a prompt had no advantage at all is neither for nor against.

    Args:
        results: the account.
        e: row of the probe.
    """
    ids = [sequence["prompt_id"] for sequence in results.sequences]
    return recurrences(ids, results.step_of.tolist(), results["contributions"][e].tolist(), least=1)


def told_apart(results: AccountResults, e: int) -> np.ndarray:
    """[N] whether a sequence is told apart from chance; nowhere, where there are no p-values.

    Args:
        results: the account.
        e: row of the probe.
    """
    p = results.arrays.get("p")
    return np.zeros(len(results.sequences), dtype=bool) if p is None else p[e] <= CHANCE


def is_told_apart(share: Share) -> bool:
    """Whether what a sequence did is told apart from chance; p is kept in float32.

    Args:
        share: of a sequence.
    """
    return share.p is not None and bool(np.float32(share.p) <= CHANCE)


def probe_text(results: AccountResults, e: int, most: int = 32) -> str:
    """A probe's id and text, on one line.

    Args:
        results: the account.
        e: row of the probe.
        most: characters of the text.
    """
    info = results.probes[e]
    return f"{one_line(tail(info.id, 32))}  {sequence_text(info.prompt, info.response, most)}".rstrip()


def sequence_text(prompt: str, response: str, most: int = 44) -> str:
    """The ends of a prompt and of a response, on one line; empty where there are neither.

    Args:
        prompt: its text.
        response: its text.
        most: characters, of which the prompt has half, or what the response leaves.
    """
    if not prompt and not response:
        return ""
    room = max(most // 2, most - len(response))
    asked = one_line(tail(prompt, room))
    return f"{asked}→{one_line(tail(response, max(most - len(asked), 1)))}"


def one_line(text: str) -> str:
    """A text on one line, without characters that a terminal would obey."""
    return "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in text)


def _columns(results: AccountResults, order: list[int], unit: Unit) -> tuple[list[str], list[str]]:
    """Columns that are shown, and those where nothing is above rounding, or none of the digits shown."""
    floor = FLOORS * results["floor"][order]
    seen = [
        name
        for name in SIDE
        if any(np.abs(results[name][order]) > floor) and any(unit(value) != "0" for value in results[name][order])
    ]
    return seen, [name for name in SIDE if name not in seen]


def _about_a_probe(results: AccountResults, e: int, what: str, unit: Unit) -> Table:
    title = f"{probe_text(results, e)}: {what} ({unit.name})"
    return Table(title=Text(title, style="table.title"))


def _chance(results: AccountResults, e: int) -> str:
    """How many sequences are marked; p is against the largest of all of them, so that their number is allowed for."""
    if "p" not in results.arrays:
        return ""
    marked = told_apart(results, e)
    return (
        f"* told apart from chance (p ≤ {CHANCE}): {int(marked.sum())} of {len(marked)} sequences; chance alone\n"
        f"would mark any at all with a probability of {CHANCE} or less"
    )


def _missing(results: AccountResults, name: str) -> str:
    what = {"p": "No p-values", "rewards": "Not split by reward function"}[name]
    return f"{what}: {results.facts.get(name, 'the account does not say why')}"


def _adds_up(results: AccountResults) -> list[str]:
    """Loud lines of what is left over, or one that says how much it is."""
    causes = {
        "remainder": "the steps are too large for gradients at the midpoint; account for it with --path gauss2"
        if results.about["path"] != "gauss2"
        else "the steps are too large even for --path gauss2, or float32 is not enough; try dtype float64",
        "unexplained": "the record is not of this run, or the model's positions count padding",
    }
    loud = {name: rows for name in causes if len(rows := left_over(results, name))}
    if loud:
        return [_loudly(results, name, rows, causes[name]) for name, rows in loud.items()]
    realised, floor = results["realised"].astype(float), results["floor"].astype(float)
    if (np.abs(realised) <= FLOORS * floor).all():
        return ["Nothing moved: no probe changed by more than rounding"]
    rest, change = np.linalg.norm(results["remainder"] + results["unexplained"]), np.linalg.norm(realised)
    share, rounding = (percent(float(value / change)) for value in (rest, np.linalg.norm(floor)))
    return [f"It adds up: remainder and unexplained together are {share} of the realised change (rounding {rounding})"]


def _loudly(results: AccountResults, name: str, rows: np.ndarray, cause: str) -> str:
    """What does not add up: the worst probe, by how much, and why that may be."""
    e, unit = int(rows[0]), unit_of(results)
    size, realised = float(results[name][e]), float(results["realised"][e])
    share = f"{percent(abs(size / realised))} of its change" if realised else "which did not change"
    probes = f"{len(rows)} of {_count(len(results.probes), 'probe')}"
    return (
        f"DOES NOT ADD UP: {name} is {unit(size)} ({unit.name}) in {one_line(results.probes[e].id)}, {share}; "
        f"it is above {percent(LEFT_OVER)} in {probes}: {cause}"
    )


def _number(value: Any, sign: str = "") -> str:
    return "–" if value is None or value != value else f"{value:{sign}.3g}".replace("-", "−")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
