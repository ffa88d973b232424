"""Every picture of an account, to a directory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fkernel.io import make_directory
from fkernel.report.run_pictures import (
    culprit_bars,
    influence_over_steps,
    parts_timeline,
    rewards_timeline,
    run_heatmap,
    timeline,
)
from fkernel.report.style import largest
from fkernel.study import AccountResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = 6
"""Probes that `draw_account` draws pictures of."""


def draw_account(results: AccountResults, directory: str | Path) -> list[Path]:
    """Draw every picture of an account; those of single probes for the six that moved most.

    Args:
        results: the account.
        directory: where PNGs are written: heatmap.png, and <probe>_timeline.png, <probe>_rewards.png and
            <probe>_parts.png (where they are known), <probe>_culprits.png and <probe>_influence.png, with a probe's id
            as far as a file can have it.

    Returns:
        The files.

    Raises:
        ModelError: matplotlib is not installed.
    """
    place, files = Path(directory), list[Path]()
    make_directory(place)
    for name, draw in _pictures(results):
        files.append(place / f"{name}.png")
        draw(path=files[-1])
    return files


def _pictures(results: AccountResults) -> Iterator[tuple[str, Callable[..., Figure]]]:
    """File names and the functions that draw them."""
    yield "heatmap", partial(run_heatmap, results)
    taken = set[str]()
    for e in largest(results["realised"], DRAWN):
        name = _file_name(results.probes[e].id, taken)
        yield f"{name}_timeline", partial(timeline, results, e)
        if "rewards" in results.arrays:
            yield f"{name}_rewards", partial(rewards_timeline, results, e)
        if "parts" in results.arrays:
            yield f"{name}_parts", partial(parts_timeline, results, e)
        yield f"{name}_culprits", partial(culprit_bars, results, e)
        yield f"{name}_influence", partial(influence_over_steps, results, e)


def _file_name(name: str, taken: set[str]) -> str:
    """An id without what files cannot have in their names, unlike those taken even where case is ignored."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "probe"
    unlike, number = stem, 2
    while unlike.lower() in taken:
        unlike, number = f"{stem}-{number}", number + 1
    taken.add(unlike.lower())
    return unlike
