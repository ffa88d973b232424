"""Configuration of what a request computes and stores; a module of its own, since analyses import it."""

from __future__ import annotations

from pydantic import Field

from fkernel.study.config.values import Strict


class Submatrix(Strict):
    """Entries of K to store: every pair of some rows and columns, by id; `*` matches any characters.

    Attributes:
        rows: ids of E.
        columns: ids of U.
    """

    rows: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1)


class CapturePlan(Strict):
    """What a request computes and stores."""

    kernel: bool = Field(False, description="store all of K and C; memory and files grow with n_E · n_U")
    top_k: int = Field(10, ge=0, description="contributors stored per sequence")
    pairs: tuple[tuple[str, str], ...] = Field((), description="[E id, U id], whose entries are stored")
    submatrices: tuple[Submatrix, ...] = Field((), description="blocks of K that are stored")
    curvature: bool = Field(False, description="½ ΔθᵀHΔθ at the checkpoint, by one pass of second derivatives over E")
    realised: bool = Field(True, description="evaluate E after the step, and compare with the prediction")

    @property
    def influence_only(self) -> bool:
        """Whether nothing needs K: the influence is then one product of E's gradients with U's weighted sum."""
        return not (self.kernel or self.top_k or self.pairs or self.submatrices)
