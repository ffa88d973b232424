"""U as a workspace: its sequences, their gradients, P; computed once and shared by all requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fkernel import func, tree
from fkernel.engine import Gradients, ShardedGradients, SortedBatch, WalkedGradients, self_kernel
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
    """U, its gradients and P; a context manager that holds the lock of its directory until closed.

    Attributes:
        batch: U.
        gradients: J_U; its rows are ∇S, or, where the step's loss has ratios, Σ_t ρ_ut ∇log π(u_t); K_UU, norms and
            `cache` use the same rows. Gradients of long sequences are recomputed, not stored.
        P: the preconditioner.
        clip: c.
        grad_norm: ‖∇L‖ before clipping.
        spec: everything that determines its contents: fingerprints, preconditioner, step, temperature.
        directory: its directory; None in memory.
        loss: the step's loss evaluated on U; None for the policy gradient.
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
        """Hold what `prepared` computed or `load_workspace` read."""
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
        """Release the directory's lock; nothing is read from it afterwards."""
        self._opened.close()

    @property
    def weights(self) -> Tensor:
        """[n_U] c·w·A, the weights of the kernel's columns in contributions; c where the columns are the whole loss."""
        return self.clip * self.loss_weights

    @property
    def loss_weights(self) -> Tensor:
        """[n_U] w·A, before clipping; ones where the columns are the whole loss."""
        return self.unit_weights if self.whole else self.batch.weighted_advantages

    @property
    def unit_weights(self) -> Tensor:
        """[n_U] w, what an advantage of 1 would weigh a column with."""
        ones = torch.ones(len(self.batch), dtype=torch.float64)
        return ones if self.whole else self.batch.with_values("advantage", ones).weighted_advantages

    @property
    def whole(self) -> bool:
        """Whether the columns are the whole loss: its tokens' weights, which no advantage enters."""
        return self.loss is not None and self.loss.whole

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
        if self.whole and advantages is None:
            return self.loss_weights
        return self.signed(self.batch.with_values("advantage", self.advantages_with(advantages)).weighted_advantages)

    def signed(self, weights: Tensor) -> Tensor:
        """Check that [n_U] other w·A keep the signs that the loss was evaluated for; 0 is allowed.

        Raises:
            PlanError: a sign changes.
        """
        if self.whole:  # token weights hold for any factor of a sequence
            return weights
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
        """−∇L before clipping; on the devices of `params`, where given."""
        ascent = self._ascent()
        return ascent if params is None else beside(ascent, params)

    def with_parts(self, ascent: Tree) -> Tree:
        """Add the loss's parts that no column has, such as a KL penalty, to an ascent direction of U's columns."""
        for part in () if self.loss is None else self.loss.beside_columns.values():
            ascent = tree.add(ascent, part)
        return ascent

    def advantages_with(self, advantages: str | Mapping[str, float] | None) -> Tensor:
        """[n_U] A by another rule, or with other values for some of U.

        Raises:
            RolloutError: there is no such rule, or no such sequence.
        """
        if self.whole:
            if advantages is not None:
                raise PlanError(
                    "step.loss is given by token weights, and how they depend on the advantages is not known. Weigh "
                    "whole sequences or parts instead (counterfactuals: scale, drop, flip, parts), or name the loss."
                )
            return self.unit_weights
        if isinstance(advantages, str):
            return self.batch.with_advantages(advantages).advantages
        A = self.batch.advantages.clone()
        for name, value in (advantages or {}).items():
            A[self.row(name)] = value
        return A

    def advantages_of(self, rule: str | None, changes: Mapping[str, float]) -> dict[str, float] | None:
        """{id: A} by a rule, with single values changed; None where neither is given.

        Raises:
            RolloutError: there is no such rule, or no such sequence.
        """
        if rule is None and not changes:
            return None
        batch = self.batch if rule is None else self.batch.with_advantages(rule)
        advantages = dict(zip(batch.ids, batch.advantages.tolist(), strict=True))
        for name in changes:
            self.row(name)
        return advantages | dict(changes)

    def row(self, sequence_id: str) -> int:
        """Find the row of a sequence of U.

        Raises:
            RolloutError: no such id; the message lists similar ones.
        """
        self.batch.by_id(sequence_id)
        return self.index[sequence_id]

    def rows_of(self, batch: GeneratedBatch) -> Tensor | None:
        """[n] rows of U that hold a batch's gradients; None where a sequence is not of U, or U's rows are not ∇S."""
        if self.loss is not None and self.loss.ratio is not None:
            return None
        padding = self.spec.get("padding")
        if any(padding in (*record.prompt_ids, *record.response_ids)[:-1] for record in batch):
            return None  # U's gradients leave out the padding token's embedding row
        rows = [self.index.get(name, -1) for name in batch.ids]
        if any(row < 0 or self.batch.records[row] is not record for row, record in zip(rows, batch, strict=True)):
            return None
        return torch.tensor(rows)

    def cache(self, sequence_id: str) -> GradientCache:
        """One sequence's gradient, raw and preconditioned, and its norms; each is computed on first use."""
        row = self.row(sequence_id)
        if sequence_id not in self._caches:
            self._caches[sequence_id] = GradientCache(sequence_id, lambda: self.gradients.one(row), self.P)
        return self._caches[sequence_id]

    def kernel_between(self, one: GradientCache, other: GradientCache) -> float:
        """⟨∇S(one), P ∇S(other)⟩."""
        return float(func.contract(one.handles, other.handles, diagonal=self.P.d))

    def self_kernel(self, how: Strategy | None = None) -> Tensor:
        """K_UU [n_U n_U], computed on first use; `how` tiles it, by default it is computed in one tile."""
        if self._self_kernel is None:
            J, D = self.gradients, self.P.d
            if isinstance(J, WalkedGradients):
                K, norms = J.with_itself(D, how)
            elif isinstance(J, ShardedGradients):
                K, norms = J.with_itself(D)
            else:
                K, norms = self_kernel(J, D, None if how is None else how.tile)
            self._self_kernel, self._norms = K.to(J.dtype), func.SquaredNorms(norms, K.diagonal())
        return self._self_kernel

    @property
    def norms(self) -> func.SquaredNorms:
        """‖g‖² and ⟨g, P g⟩ of U, computed on first use unless a walk already has (`learn`)."""
        if self._norms is None:
            self._norms = self.gradients.squared_norms(self.P.d)
        return self._norms

    @property
    def has_norms(self) -> bool:
        """Whether U's norms are computed."""
        return self._norms is not None

    def learn(self, norms: func.SquaredNorms) -> None:
        """Store U's norms, computed by a walk over its gradients."""
        self._norms = norms


def beside(vector: Tree, params: Tree) -> Tree:
    """Move a vector to the parameters' devices, in the parameters' order."""
    return {name: vector[name].to(leaf.device) for name, leaf in params.items()}


def tokens_of(batch: GeneratedBatch, params: Tree) -> Any:
    """A batch's `Sequences` on the parameters' device."""
    device = next(iter(params.values())).device
    return Sequences(*(leaf.to(device) for leaf in batch.sequences))


@contextmanager
def named_errors(batch: GeneratedBatch) -> Iterator[None]:
    """Replace the row number in the engine's errors by the sequence's id."""
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
        StoreError: there is none, it is incomplete or damaged, or another process holds its lock.
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
        stored = directory.ascent, directory.spec, directory.path, directory.opened
        return KernelWorkspace(batch, gradients, P, clip, norm, *stored, directory.loss())
    except BaseException:
        directory.opened.close()
        raise


def serialize_workspace(workspace: KernelWorkspace, path: str | Path) -> Path:
    """Write a workspace that is in memory to a directory; one that has a directory stays there.

    Raises:
        StoreError: the directory is not empty, or cannot be written.
    """
    if workspace.directory is not None:
        return workspace.directory
    directory = WorkspaceDirectory(path, workspace.spec)
    with directory.opened:
        directory.batch(lambda: workspace.batch)
        J, numbers = workspace.gradients, (workspace.P, workspace.clip, workspace.grad_norm)
        if not J.walked:
            directory.gradients(J.side, J.cuts, J.read)
        directory.seal(*numbers, workspace.ascent(), workspace.loss, J.walked)
    return Path(path)


def selected(ids: Iterable[str], patterns: Iterable[str], what: str, strict: bool = True) -> list[str]:
    """Find the ids that match any pattern, in the ids' order; `*` matches any characters.

    Raises:
        RolloutError: a pattern matches none, where strict.
    """
    ids, kept = list(ids), set[str]()
    for pattern in patterns:
        matches = {name for name in ids if fnmatchcase(name, pattern)}
        if not matches and strict:
            raise RolloutError(f"{pattern!r} names no sequence of {what}; it has {listing(ids)}.")
        kept |= matches
    return [name for name in ids if name in kept]
