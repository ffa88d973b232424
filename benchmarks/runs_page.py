"""The page of `benchmarks.runs`: tables of what was measured, targets beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import runs_adds_up, runs_cost, runs_explaind

HEAD = """# Accounts of whole runs, held against what happened

Made by `make runs`{date}. Runs are of TRL's own GRPO trainer with a recorder, 16 or 32 sequences of additions and
subtractions a step, from [the demo's policy](api/demo.md) (0.8M parameters) unless said otherwise; one thread.
"""
ADDS_UP = """
## Does it add up?

*Left*: remainder and unexplained of the account together, relative to the realised change of six probes. Targets:
0.3 % at the midpoint, 0.05 % (or the rounding floor) with two nodes. *Replay*: how far the replayed run ends from
the run, over how far the run went; target 1e-5. *Without keys' biases*: the same without parameters that no
log-probability depends on. Their gradient is rounding alone, and AdamW divides it by its own size, so that they
drift.

| run | steps | largest change, nats | left, midpoint | two nodes | floor | arithmetic | replay | without keys' biases |
|---|---|---|---|---|---|---|---|---|
"""
ADDS_UP_READ = """
What the midpoint leaves grows with the square of what a step moves; two nodes resolve it. Under autocast a replay
repeats the run's arithmetic, but not each rounding of bfloat16: gradients of single steps come out up to some 1e-4
away from those of the run, and AdamW, whose first steps are nearly signs, makes 1e-3 to 1e-2 of that. An account
starts from the recorded states and is not affected where they were kept.
"""
LINEAR = """
## Does it predict what leaving sequences out does?

Each run's last 12 steps, replayed {subsets} times without a random half of their sequences (*run*), or of those of
the first of the 12 alone (*step*); data is held, everything else follows: clipping, both moments, the policy. A
prediction is a sum of scores over the sequences that are left. *LDS*: Spearman's correlation over the halves,
averaged over six probes. *Error*: of the predicted change, relative to the change; *scaled*: after the best single
factor, which is given.

"""
LINEAR_HEAD = """| {window} | LDS, run | error | scaled | factor | LDS, step | error | scaled | factor |
|---|---|---|---|---|---|---|---|---|
"""
DROPPED = """
Leaving out the prompt that moved a probe most: what the account says, and what the replay does, in nats.

| run | probe | prompt left out | said | replayed | ratio |
|---|---|---|---|---|---|
"""
LINEAR_READ = """
From v = 0 a run's first steps divide every gradient by little more than itself: leaving sequences out then changes
the divisor as much as the gradient, and no score predicts it well, the account least of all for single steps.
Behind that, the account predicts size and sign (its factor is near 1); scores without momentum or preconditioner
rank sequences less well and have no unit. What is left of the account's error in a whole run's half is mostly
clipping: leaving sequences out changes the norm that all are divided by, and without clipping that error falls below a
tenth. bergson covers linear layers, and was asked where it is in the table.
"""
CULPRITS = """
## Does it find culprits?

Runs with a mistake in the reward. Probes are the two likeliest answers of the trained policy that the mistake pays
and that rose by a nat. *AUROC*: that a sequence whose reward the mistake changed is ranked above another by its
contribution to the probes (0.5 is chance); *felt*: among sequences with an advantage; *group*: that a sequence in
whose group the mistake changed advantages is ranked above another: those that it did not pay lose what others gain.
*At 10, at 50*: the share of culprits among the first ones.

"""
CULPRITS_HEAD = """| {mistake} | AUROC | felt | group | at 10 | at 50 |
|---|---|---|---|---|---|
"""
CULPRITS_READ = """
No score of single sequences finds the paid ones well by what they did to two probes, the account's neither. Many of
those that a mistake paid have no advantage, since their whole group was paid, and did nothing; others of their group,
that were not paid, are pushed down, which may raise the probes as well. The reward itself ranks highest where the
mistake pays more than anything else, and common characters where probes are the mislabelled prompts themselves. The
account's split by reward function, where a mistake is a function of its own, credits it with more than the right reward
in {split} of {runs} runs.
"""
COST = """
## What does it cost?

{parameters:.1f}M parameters, {n_U} sequences of {tokens} tokens a step, {n_E} probes, {steps} steps. The limit is
plain batched backward passes over all recorded sequences, and over the probes once a step. Target: {target} times.
CPU seconds, one thread; sides took turns, {rounds} round after a warm-up, ratio of medians; the machine was in use by
others (load {load:.1f}).

| | CPU seconds | over the limit |
|---|---|---|
"""
EXPLAIND = """
## Beside ExPLAIND

[ExPLAIND](https://arxiv.org/abs/2505.20076) 0.0.2 accounts for a run by AdamW's path kernel too. Its own
modular-addition transformer ({parameters} parameters, with ReLU), trained by its own AdamW from the first step on,
{steps} steps of {batch} examples; both explain {outputs} outputs and credit every training example, momentum
included. CPU seconds, one thread. *Credit*: how far the credit of examples, summed over steps, is from ExPLAIND's
with 100 points. Goal: 20 times cheaper at no larger error.

| learning rate | method | error of the sum | CPU seconds | times cheaper | credit differs |
|---|---|---|---|---|---|
"""

EXPLAIND_READ = """
Both agree about the examples. 100 points resolve what two nodes cannot, ReLUs that switch within a step: so the
error is larger than ExPLAIND's, and the goal is met in cost alone; with two points ExPLAIND leaves and costs about
what two nodes do. It keeps a vector of the parameters' size for every training example, and needs the history from
the first step; an account keeps one for every output that is asked about, and begins at any snapshot.
"""

ALIVE = (
    " Tensors that are alive grow by the\ncolumns alone, 184 bytes a step with one probe and 16 sequences; the rest is "
    "what the process keeps beside them."
)
"""Counted once, between the steps of a sweep over 24."""


def page(results: Mapping[str, Any]) -> str:
    """The tables of what was measured."""
    abouts = [part["environment"] for part in results.values() if "environment" in part]
    text = HEAD.format(date="" if not abouts else " ({date}, {cpu}, torch {torch})".format(**abouts[-1]))
    made = {"adds_up": adds_up, "linear": linear, "culprits": culprits, "cost": cost, "explaind": explaind}
    return text + "".join(write(results[part]["rows"]) for part, write in made.items() if part in results)


def adds_up(rows: list[dict[str, Any]]) -> str:
    """What accounts leave."""
    text = ADDS_UP
    for row in rows:
        left = [f"{row[path]['left']:.4%}{_missed(runs_adds_up.met(path, row[path]))}" for path in runs_adds_up.TARGETS]
        middle = row["midpoint"]
        text += f"| {row['run']} | {row['steps']} | {middle['largest_change']:.2f} | {left[0]} | {left[1]} | "
        text += f"{middle['floor']:.1e} | {middle['arithmetic']:.2%} | "
        text += f"{row['replay']:.1e}{_missed(row['replay'] <= runs_adds_up.REPLAY)} | {row['replay_used']:.1e} |\n"
    return text + ADDS_UP_READ


def linear(rows: list[dict[str, Any]]) -> str:
    """Scores, and prompts left out."""
    text, dropped = LINEAR.format(subsets=rows[0]["subsets"]), DROPPED
    for row in rows:
        text += LINEAR_HEAD.format(window=f"{row['window']} (clipped to {row['clip']:.2f})")
        for name in row["scores"]["run"]:
            if name != "size":
                both = [row["scores"][what][name] for what in ("run", "step")]
                cells = [
                    f"{s['lds']:.2f} | {s['error']:.2f} | {s['error_scaled']:.2f} | {s['factor']:.3g}" for s in both
                ]
                text += f"| {name} | {' | '.join(cells)} |\n"
        text += "\n"
        for each in row["dropped_prompts"]:
            numbers = f"{each['said']:+.3f} | {each['replayed']:+.3f} | {each['ratio']:.2f}"
            dropped += f"| {row['window']} | {each['probe']} | {each['prompt']} | {numbers} |\n"
    return text.rstrip() + "\n" + dropped + LINEAR_READ


def culprits(rows: list[dict[str, Any]]) -> str:
    """Rankings."""
    text = CULPRITS
    for row in rows:
        rises = ", ".join(f"{probe} {rise:+.2f} nats to {after:.2f}" for probe, (rise, after) in row["moved"].items())
        text += f"**{row['mistake']}**: {row['says']}. {row['guilty']} of {row['sequences']} sequences, "
        text += (
            f"{row['guilty_felt']} of the {row['felt']} with an advantage; {row['changed']} in groups whose advantages "
        )
        text += f"it changed. Probes: {rises}. Split by reward function, the account credits the mistake with "
        nats = row["nats"]
        text += f"{nats['mistake']:+.2f} nats of both together, and the right reward with {nats['right']:+.2f}.\n\n"
        text += CULPRITS_HEAD.format(mistake="ranked by")
        for name, s in row["scores"].items():
            cells = " | ".join(f"{s[key]:.2f}" for key in ("auroc", "auroc_felt", "auroc_changed", "at_10", "at_50"))
            text += f"| {name} | {cells} |\n"
        text += "\n"
    split = sum(row["nats"]["mistake"] > row["nats"]["right"] for row in rows)
    return text.rstrip() + "\n" + CULPRITS_READ.format(split=split, runs=len(rows))


def cost(rows: dict[str, Any]) -> str:
    """Times and peaks."""
    about = rows["time"]
    sizes = {**about, "parameters": about["parameters"] / 1e6, "target": runs_cost.TARGET}
    text = COST.format(**sizes)
    for name, seconds in about["seconds"].items():
        ratio = about["ratios"][name]
        text += f"| {name} | {seconds:.1f} | {ratio:.2f}{_missed(ratio <= runs_cost.TARGET)} |\n"
    longer = rows["longer"]
    name, ratio = [*longer["ratios"].items()][1]
    ours, limit = (longer["seconds"][side] - about["seconds"][side] for side in (name, "limit"))
    slope = ours / limit
    text += f"\nOver {longer['steps']} steps, measured once: {name}, {ratio:.2f}{_missed(ratio <= runs_cost.TARGET)}; "
    text += f"each step beyond {about['steps']} costs {slope:.2f}. The rest is paid once a run: checks of the policy's "
    text += "gradients, plans of how they are computed, and the rounding floor.\n"
    peaks = [f"{each['added_mb']:.0f} MB for {each['steps']} steps" for each in rows["memory"]]
    return text + f"\nPeak memory that the account of a model of 2.6M parameters adds: {', '.join(peaks)}.{ALIVE}\n"


def explaind(rows: Any) -> str:
    """Errors and times side by side."""
    if isinstance(rows, str):
        return f"\n## Beside ExPLAIND\n\n{rows}\n"
    text = EXPLAIND.format(**rows[0])
    for run in rows:
        for row in run["rows"]:
            cheaper = (
                f"{row['cheaper']:.0f}{_missed(row['cheaper'] >= runs_explaind.TARGET)}" if "cheaper" in row else ""
            )
            differs = f"{row['credit_differs']:.2%}" if "credit_differs" in row else ""
            text += f"| {run['lr']:g} | {row['method']} | {row['error']:.3%} | {row['seconds']:.2f} | "
            text += f"{cheaper} | {differs} |\n"
    return text + EXPLAIND_READ


def _missed(met: bool) -> str:
    return "" if met else " (missed)"
