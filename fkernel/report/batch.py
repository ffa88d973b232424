"""Tables of sampled batches, for a terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from fkernel.report.style import count
from fkernel.rollout import GeneratedBatch


def batch_table(batch: GeneratedBatch, rows: int = 8) -> Table:
    """Tabulate the first sequences of a batch.

    Args:
        batch: the batch.
        rows: sequences to show.
    """
    table = Table(title=f"{min(rows, len(batch))} of {count(len(batch), 'sequence')}")
    for name in ("sequence", "prompt", "response", "tokens", "log π", "reward", "advantage", "ended by"):
        number = name in ("tokens", "log π", "reward", "advantage")
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for record in batch.records[:rows]:
        table.add_row(
            record.sequence_id,
            _short(record.prompt, 24, last=True),
            _short(record.response, 32),
            str(len(record.response_ids)),
            f"{record.logprob:.2f}",
            "–" if record.reward is None else f"{record.reward:g}",
            "–" if record.advantage is None else f"{record.advantage:+.3g}",
            record.finish,
        )
    return table


def batch_lines(diagnostics: dict[str, Any]) -> list[str]:
    """Summary lines of a batch's diagnostics."""

    def share(name: str) -> str:
        return "–" if diagnostics[name] is None else f"{diagnostics[name]:.0%}"

    mean = "–" if diagnostics["mean_reward"] is None else f"{diagnostics['mean_reward']:.3g}"
    length, entropy = diagnostics["length"], diagnostics["entropy"]
    return [
        f"{count(diagnostics['sequences'], 'sequence')} of {count(diagnostics['prompts'], 'prompt')}, "
        f"{count(diagnostics['groups'], 'group')}; "
        f"mean reward {mean}, without signal {share('without_signal')}, truncated {share('truncated')}",
        f"tokens {length['min']:.0f} to {length['max']:.0f}, median {length['median']:.0f}; mean entropy "
        f"{entropy['mean']:.2f} nats a token",
    ]


def _short(text: str, most: int, last: bool = False) -> str:
    plain = text.replace("\n", "⏎")
    if len(plain) <= most:
        return escape(plain)
    return escape("…" + plain[1 - most :] if last else plain[: most - 1] + "…")
