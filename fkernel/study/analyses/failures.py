"""What may go wrong in one analysis of a plan: it is skipped, with its reason and a warning, and the others are made.

What a plan names and is not there is an error all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fkernel.errors import FKernelError, NonFiniteError, PlanError, RolloutError
from fkernel.study.outcome import SKIPPED, AnalysisResult

FAILURES = (FKernelError, ArithmeticError, torch.linalg.LinAlgError, np.linalg.LinAlgError)  # pyright: ignore
"""What may go wrong in one analysis and is no reason to lose the others."""
MISTAKES = (PlanError, RolloutError)
"""What is wrong with the plan: an id, a rule or a function that is not there."""


class AnalysisUnavailable(Exception):
    """An analysis lacks what it needs; the message says what."""


def skipped(why: Exception | str) -> AnalysisResult:
    """Record that an analysis was asked for and could not be made."""
    return AnalysisResult({}, {SKIPPED: str(why)})


def tried(
    name: str, whose: str, do: Callable[[], Any], ids: Sequence[str] | None = None
) -> tuple[Any, AnalysisResult | None]:
    """Do a part of one analysis.

    Args:
        name: the analysis's, for the warning.
        whose: "the request's" or "the update batch's".
        do: what is done.
        ids: of the sequences whose rows an error may name; None where its rows are of something else.

    Returns:
        (what `do` gives, None), or (None, why the analysis is skipped).

    Raises:
        PlanError, RolloutError: the plan names what is not there.
    """
    try:
        return do(), None
    except AnalysisUnavailable as why:
        return None, skipped(why)
    except MISTAKES:
        raise
    except FAILURES as error:
        why = f"it failed: {_described(error, ids)}"
        warnings.warn(f"{name} is left out of {whose} analyses; {why}", stacklevel=3)
        return None, skipped(why)


def _described(error: Exception, ids: Sequence[str] | None) -> str:
    """What an error says, with the id of the sequence that it names by its row."""
    if ids is not None and isinstance(error, NonFiniteError) and error.row is not None and error.row < len(ids):
        return f"{ids[error.row]}: {error}"
    return str(error) or type(error).__name__
