"""Error handling of analyses: one that fails is skipped with its reason and a warning, and the others go on.

An unknown name in the plan is still an error.
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
"""Exceptions that skip one analysis."""
MISTAKES = (PlanError, RolloutError)
"""Exceptions about the plan (an unknown id, rule or function), which are raised."""


class AnalysisUnavailable(Exception):
    """An analysis lacks an input; the message says which."""


def skipped(why: Exception | str) -> AnalysisResult:
    """The result of an analysis that was skipped."""
    return AnalysisResult({}, {SKIPPED: str(why)})


def tried(
    name: str, whose: str, do: Callable[[], Any], ids: Sequence[str] | None = None
) -> tuple[Any, AnalysisResult | None]:
    """Run a part of one analysis.

    Args:
        name: the analysis's, for the warning.
        whose: "the request's" or "the update batch's".
        do: the part.
        ids: of the sequences whose rows an error may name; None where rows are not sequences.

    Returns:
        (the result of `do`, None), or (None, the skipped analysis's result).

    Raises:
        PlanError, RolloutError: the plan has an unknown name.
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
    """An error's message, with the id of the sequence of its row."""
    if ids is not None and isinstance(error, NonFiniteError) and error.row is not None and error.row < len(ids):
        return f"{ids[error.row]}: {error}"
    return str(error) or type(error).__name__
