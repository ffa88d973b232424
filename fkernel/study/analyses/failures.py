"""What may go wrong in one analysis of a plan: it is left out, with its reason and a warning, and the others are made.

What a plan names and is not there is an error all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fkernel.errors import FKernelError, NonFiniteError, PlanError, RolloutError
from fkernel.study.analyses.situation import Lacking, left_out
from fkernel.study.outcome import Finding

FAILURES = (FKernelError, ArithmeticError, torch.linalg.LinAlgError, np.linalg.LinAlgError)  # pyright: ignore
"""What may go wrong in one analysis and is no reason to lose the others."""
MISTAKES = (PlanError, RolloutError)
"""What is wrong with the plan: an id, a rule or a function that is not there."""


def tried(name: str, whose: str, do: Callable[[], Any], ids: Sequence[str] | None = None) -> tuple[Any, Finding | None]:
    """Do a part of one analysis.

    Args:
        name: the analysis's, for the warning.
        whose: "the request's" or "the update batch's".
        do: what is done.
        ids: of the sequences whose rows an error may name; None where its rows are of something else.

    Returns:
        (what `do` gives, None), or (None, why the analysis is left out).

    Raises:
        PlanError, RolloutError: the plan names what is not there.
    """
    try:
        return do(), None
    except Lacking as why:
        return None, left_out(why)
    except MISTAKES:
        raise
    except FAILURES as error:
        why = f"it failed: {_told(error, ids)}"
        warnings.warn(f"{name} is left out of {whose} analyses; {why}", stacklevel=3)
        return None, left_out(Lacking(why))


def _told(error: Exception, ids: Sequence[str] | None) -> str:
    """What an error says, with the id of the sequence that it names by its row."""
    if ids is not None and isinstance(error, NonFiniteError) and error.row is not None and error.row < len(ids):
        return f"{ids[error.row]}: {error}"
    return str(error) or type(error).__name__
