"""U as a workspace: its sequences, their gradients, P; made once, kept, and asked as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fkernel import func, tree
from fkernel.engine import Gradients, SortedBatch, WalkedGradients, self_kernel
from fkernel.engine.planning import Strategy
from fkernel.errors import NonFiniteError, PlanError, RolloutError, listing
from fkernel.func import Sequences
from fkernel.precond import Diagonal
from fkernel.rollout import GeneratedBatch, load_batch
from fkernel.shapes import Tensor, Tree
from fkernel.study.directory import BATCH, WorkspaceDirectory
from fkernel.study.gradients import GradientCache
from fkernel.study.loss_terms import LossTerms


class KernelWorkspace:
    """U, its gradients and P, ready to be asked; a context manager that keeps its directory to itself until closed.

    Attributes:
        batch: U.
        gradients: J_U; its rows are ∇S, or, where the step's loss has ratios, Σ_t ρ_ut ∇log π(u_t): the kernel of U
            with itself, norms and `cache` of its sequences are then of these. Of long sequences none is kept.
        P: the preconditioner.
        clip: c.
        grad_norm: ‖∇L‖ before clipping.
        spec: everything that decides what it holds: fingerprints, preconditioner, step, temperature.
        directory: where it is kept; None in memory.
        loss: what the step's loss made of U; None where it is the policy gradient.
    """

    def __init__(
        self,
        batch: GeneratedBatch,
        gradients: Gradients,
        P: Diagonal,
        clip: float,
        grad_norm: float,
        ascent: Callable[[], Tree],
        spec: Mapping[str, Any],
        directory: Path | None = None,
        opened: ExitStack | None = None,
        loss: LossTerms | None = None,
    ) -> None:
        """Take what was made or read."""
        self.batch, self.gradients, self.P, self.clip, self.grad_norm = batch, gradients, P, clip, grad_norm
        self.spec, self.directory, self._opened = dict(spec), directory, opened or ExitStack()
        self.loss, self._ascent = loss, ascent
        self.index = {name: row for row, name in enumerate(batch.ids)}
        self._caches: dict[str, GradientCache] = {}
        self._self_kernel: Tensor | None = None
        self._norms: func.SquaredNorms | None = None

    def __enter__(self) -> KernelWorkspace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the directory; nothing more is read from it."""
        self._opened.close()

    @property
    def weights(self) -> Tensor:
        """[n_U] c·w·A, what contributions weigh the kernel's columns with."""
        return self.clip * self.batch.weighted_advantages

    def weights_with(self, advantages: str | Mapping[str, float] | None) -> Tensor:
        """[n_U] c·w·A under other advantages: a rule's name, or {id: advantage} for some of U.

        Raises:
            RolloutError: there is no such rule, or no such sequence.
        """
        return self.clip * self.loss_weights_with(advantages)

    def loss_weights_with(self, advantages: str | Mapping[str, float] | None) -> Tensor:
        """[n_U] w·A under other advantages, before clipping.

        Raises:
            RolloutError: there is no such rule, or no such sequence.
            PlanError: the step's loss depends on the advantages' signs, and one changes.
        """
        return self.signed(self.batch.with_values("advantage", self.advantages_with(advantages)).weighted_advantages)

    def signed(self, weights: Tensor) -> Tensor:
        """Check [n_U] other w·A against a loss that was evaluated for the signs of the step's own; 0 goes with both.

        Raises:
            PlanError: a sign changes.
        """
        own = self.batch.advantages
        if self.keeps_signs and bool((moved := (weights != 0) & (weights.sign() != own.sign())).any()):
            row = int(moved.nonzero()[0])
            raise PlanError(
                f"The advantage of {self.batch.ids[row]} is {float(own[row]):g}, and what is asked changes its sign. "
                f"step.loss ({self.spec['loss']['kind']}) was evaluated for the step's own signs, and would weigh "
                f"tokens otherwise: ask for advantages of the same signs, or 0; or leave step.loss out."
            )
        return weights

    @property
    def keeps_signs(self) -> bool:
        """Whether the step's loss was evaluated for the signs of its advantages."""
        return "loss" in self.spec and self.spec["loss"]["kind"] != "policy_gradient"

    def ascent(self, params: Tree | None = None) -> Tree:
        """Give J_Uᵀ(w A) with the KL term's share, before clipping: as it was kept, or beside parameters."""
        found = self._ascent()
        return found if params is None else beside(found, params)

    def with_penalty(self, ascent: Tree, scale: float = 1.0) -> Tree:
        """Add the KL term's share, times a factor, to what U ascends; it has no advantages."""
        penalty = None if self.loss is None else self.loss.penalty
        return ascent if penalty is None else tree.axpy(scale, penalty, ascent)

    def advantages_with(self, advantages: str | Mapping[str, float] | None) -> Tensor:
        """[n_U] A by another rule, or with other values for some of U.

        Raises:
            RolloutError: there is no such rule, or no such sequence.
        """
        if isinstance(advantages, str):
            return self.batch.with_advantages(advantages).advantages
        A = self.batch.advantages.clone()
        for name, value in (advantages or {}).items():
            A[self.row(name)] = value
        return A

    def advantages_of(self, rule: str | None, changes: Mapping[str, float]) -> dict[str, float] | None:
        """Make other advantages of a rule and of single changes; None where there is neither.

        Raises:
            RolloutError: there is no such rule, or no such sequence.
        """
        if rule is None and not changes:
            return None
        batch = self.batch if rule is None else self.batch.with_advantages(rule)
        found = dict(zip(batch.ids, batch.advantages.tolist(), strict=True))
        for name in changes:
            self.row(name)
        return found | dict(changes)

    def row(self, sequence_id: str) -> int:
        """Find the row of a sequence of U.

        Raises:
            RolloutError: there is none of that id; it names near ones.
        """
        self.batch.by_id(sequence_id)
        return self.index[sequence_id]

    def rows_of(self, batch: GeneratedBatch) -> Tensor | None:
        """Find the rows of a batch whose sequences are U's own, [n]; None where one is not, or U's rows are not ∇S."""
        if self.loss is not None and self.loss.ratio is not None:
            return None
        padding = self.spec.get("padding")
        if any(padding in (*record.prompt_ids, *record.response_ids)[:-1] for record in batch):
            return None  # training withheld a part of their gradients
        at = [self.index.get(name, -1) for name in batch.ids]
        if any(row < 0 or self.batch.records[row] is not record for row, record in zip(at, batch, strict=True)):
            return None
        return torch.tensor(at)

    def cache(self, sequence_id: str) -> GradientCache:
        """Give one sequence's gradient: raw, preconditioned, and its norms, each made when it is asked for."""
        row = self.row(sequence_id)
        if sequence_id not in self._caches:
            self._caches[sequence_id] = GradientCache(sequence_id, lambda: self.gradients.one(row), self.P)
        return self._caches[sequence_id]

    def kernel_between(self, one: GradientCache, other: GradientCache) -> float:
        """⟨∇S(one), P ∇S(other)⟩, of any two sequences."""
        return float(func.contract(one.handles, other.handles, diagonal=self.P.d))

    def self_kernel(self, how: Strategy | None = None) -> Tensor:
        """K_UU [n_U n_U], of U's columns, computed when it is first asked for, all at once where nothing says how."""
        if self._self_kernel is None:
            J, D = self.gradients, self.P.d
            walks = isinstance(J, WalkedGradients)
            K, norms = J.with_itself(D, how) if walks else self_kernel(J, D, None if how is None else how.tile)
            self._self_kernel, self._norms = K.to(J.dtype), func.SquaredNorms(norms, K.diagonal())
        return self._self_kernel

    @property
    def norms(self) -> func.SquaredNorms:
        """‖g‖² and ⟨g, P g⟩ of U, computed when they are first asked for, or by the walk that came first."""
        if self._norms is None:
            self._norms = self.gradients.squared_norms(self.P.d)
        return self._norms

    @property
    def has_norms(self) -> bool:
        """Whether U's norms are known."""
        return self._norms is not None

    def learn(self, norms: func.SquaredNorms) -> None:
        """Take U's norms from a walk that formed its gradients anyway."""
        self._norms = norms


def beside(found: Tree, params: Tree) -> Tree:
    """Put a vector where the parameters are, in their order: a file has another."""
    return {name: found[name].to(leaf.device) for name, leaf in params.items()}


def tokens_of(batch: GeneratedBatch, params: Tree) -> Any:
    """Give a batch's `Sequences` where the parameters are."""
    device = next(iter(params.values())).device
    return Sequences(*(leaf.to(device) for leaf in batch.sequences))


@contextmanager
def named_errors(batch: GeneratedBatch) -> Iterator[None]:
    """Name the sequence by its id where the engine names a row."""
    try:
        yield
    except NonFiniteError as error:
        if error.row is None:
            raise
        raise NonFiniteError(f"{batch.ids[error.row]}: {error}", row=error.row, parameter=error.parameter) from error


def load_workspace(path: str | Path) -> KernelWorkspace:
    """Open a complete workspace for questions about U; no model is needed.

    Args:
        path: its directory.

    Returns:
        The workspace; close it, or use it in a `with`.

    Raises:
        StoreError: there is none, it is not complete, damaged, or another process has it.
    """
    directory = WorkspaceDirectory(path, None)
    try:
        P, clip, norm = directory.response()
        batch = load_batch(directory.path / BATCH, checkpoint=directory.sampler)
        side = SortedBatch("U", batch.sequences)
        cuts = directory.cuts()
        if (directory.complete or {}).get("walked"):
            gradients = directory.walked(side)
        elif cuts is None:
            raise directory.unfinished()
        else:
            gradients = directory.gradients(side, cuts, None)
        at = directory.ascent, directory.spec, directory.path, directory.opened
        return KernelWorkspace(batch, gradients, P, clip, norm, *at, directory.loss())
    except BaseException:
        directory.opened.close()
        raise


def serialize_workspace(workspace: KernelWorkspace, path: str | Path) -> Path:
    """Write a workspace that is held in memory to a directory; one that is kept already is left where it is.

    Raises:
        StoreError: the directory holds something, or cannot be written.
    """
    if workspace.directory is not None:
        return workspace.directory
    directory = WorkspaceDirectory(path, workspace.spec)
    with directory.opened:
        directory.batch(lambda: workspace.batch)
        own, numbers = workspace.gradients, (workspace.P, workspace.clip, workspace.grad_norm)
        if not own.walked:
            directory.gradients(own.side, own.cuts, own.read)
        directory.seal(*numbers, workspace.ascent(), workspace.loss, own.walked)
    return Path(path)


def selected(ids: Iterable[str], patterns: Iterable[str], what: str, strict: bool = True) -> list[str]:
    """Find the ids that patterns name, in the ids' order; `*` stands for any characters.

    Raises:
        RolloutError: a pattern names none, where strict.
    """
    ids, kept = list(ids), set[str]()
    for pattern in patterns:
        found = {name for name in ids if fnmatchcase(name, pattern)}
        if not found and strict:
            raise RolloutError(f"{pattern!r} names no sequence of {what}; it has {listing(ids)}.")
        kept |= found
    return [name for name in ids if name in kept]
