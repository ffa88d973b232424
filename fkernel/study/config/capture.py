"""What of a request is computed and kept; apart from requests, for their analyses read it."""

from __future__ import annotations

from pydantic import Field

from fkernel.study.config.base import Strict


class Submatrix(Strict):
    """Entries of K to keep: every pair of some rows and some columns, by id; `*` stands for any characters."""

    rows: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1)


class CapturePlan(Strict):
    """What of a request is computed, and what of that is kept."""

    kernel: bool = Field(False, description="keep K and C whole; memory and files grow with n_E · n_U")
    top_k: int = Field(10, ge=0, description="contributors kept for each sequence")
    pairs: tuple[tuple[str, str], ...] = Field((), description="[E id, U id], whose entries are kept")
    submatrices: tuple[Submatrix, ...] = Field((), description="blocks of K that are kept")
    curvature: bool = Field(False, description="½ ΔθᵀHΔθ at the checkpoint, by one pass of second derivatives over E")
    realised: bool = Field(True, description="take the step, and hold the prediction against what it does")

    @property
    def influence_only(self) -> bool:
        """Whether nothing is asked that needs K: the influence is one column of E's gradients, U's are not read."""
        return not (self.kernel or self.top_k or self.pairs or self.submatrices)
