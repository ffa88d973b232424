"""A workspace's files: complete, or resumable by the next run; locked by one process that writes, or several that read.

<directory>/
  asked.json             everything that determines the contents; written first, compared whenever it is opened
  batch/                 U, as `save_batch` wrote it
  gradients/             U's shards, written by `fkernel.engine.store`; not for long sequences, whose gradients are
                         recomputed for every request (`fkernel.engine.walked`)
  response.safetensors   P, {name: [*shape]}
  ascent.safetensors     J_Uᵀ(w A) plus the KL penalty, before clipping, {name: [*shape]}
  loss.safetensors       the plan's loss evaluated on U: ρ, κ [n t], its parts {name: [*shape]}
  complete.json          c, ‖∇L‖, the loss's facts, checksums of U and of the three files above; written last
  kept/                  cached answers (`fkernel.study.kept`); may be deleted
  lock                   names the process that writes to it; those that read share it

Files are written to a temporary name and renamed, and shards are recorded one by one: the run after an interrupted one
resumes at the microbatch that was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fkernel.engine import Gradients, Read, SortedBatch, complete
from fkernel.engine.store import MANIFEST, differences, open_store, read_store
from fkernel.errors import StoreError, listing
from fkernel.func import Weighted
from fkernel.io import (
    atomic_write,
    checksum,
    checksummed_json,
    fingerprint,
    is_temporary,
    locked,
    make_directory,
    parse_json,
    plain_errors,
    read_checksummed,
    safetensors_chunks,
)
from fkernel.precond import Diagonal
from fkernel.rollout import MANIFEST as MANIFEST_OF_BATCH
from fkernel.rollout import GeneratedBatch, load_batch, save_batch
from fkernel.shapes import Tree
from fkernel.study.loss_terms import LossTerms

SCHEMA = 3
ASKED, COMPLETE, LOCK = "asked.json", "complete.json", "lock"
BATCH, GRADIENTS, RESPONSE, LOSS = "batch", "gradients", "response.safetensors", "loss.safetensors"
ASCENT = "ascent.safetensors"


class WorkspaceDirectory:
    """A workspace's files, locked by this process, or by those that only read; the module's docstring lists them."""

    def __init__(self, path: str | Path, spec: Mapping[str, Any] | None) -> None:
        """Open and lock a directory; create it where it does not exist.

        Args:
            path: where.
            spec: what its contents must be of; None accepts any workspace, and writes nothing, so that it can be opened
                beside other readers, and where it cannot be written to.

        Raises:
            StoreError: another process holds its lock, its spec differs, it holds foreign files, or there is none.
        """
        self.path, self.opened = Path(path), ExitStack()
        if spec is None and not (self.path / ASKED).is_file():
            inner = self.path / "workspace"
            meant = (
                f"did you mean {inner}?" if (inner / ASKED).is_file() else "`fkernel run` makes one, in OUT/workspace."
            )
            raise StoreError(f"There is no workspace at {self.path}; {meant}")
        with plain_errors("open", self.path):
            if spec is not None:
                make_directory(self.path)
            foreign = sorted(p.name for p in self.path.iterdir() if p.name != LOCK and not is_temporary(p.name))
            if foreign and not (self.path / ASKED).exists():
                raise StoreError(
                    f"{self.path} is no workspace, and it is not empty: it holds {listing(foreign)}. Nothing was "
                    f"touched; choose another directory."
                )
        self.opened.enter_context(locked(self.path, LOCK, shared=spec is None))
        try:
            self.spec = self._settle(spec)
        except BaseException:
            self.opened.close()
            raise

    def _settle(self, spec: Mapping[str, Any] | None) -> dict[str, Any]:
        if not (self.path / ASKED).exists():
            assert spec is not None
            self._write(ASKED, {"schema": SCHEMA, **spec})
        stored = self._read(ASKED)
        if stored.get("schema") != SCHEMA:
            raise StoreError(
                f"The workspace at {self.path} has schema {stored.get('schema')}; this version of fkernel reads "
                f"{SCHEMA}. Choose another directory."
            )
        if spec is not None:
            wanted = json.loads(json.dumps({"schema": SCHEMA, **spec}))
            if changed := differences(stored, wanted):
                raise StoreError(
                    f"The workspace at {self.path} is of something else: {'; '.join(changed)}. Choose another "
                    f"directory (storage.workspace), or delete this one."
                )
        return stored

    @property
    def complete(self) -> dict[str, Any] | None:
        """The contents of complete.json; None where the workspace is not complete."""
        return self._read(COMPLETE) if (self.path / COMPLETE).is_file() else None

    @property
    def sampler(self) -> str | None:
        """Fingerprint of the policy that sampled U: the checkpoint, or the loss's `old`; None for any."""
        return self.spec.get("sampled_by", self.spec["checkpoint"])

    def batch(
        self, make: Callable[[], GeneratedBatch], check: Callable[[GeneratedBatch], Any] = lambda batch: None
    ) -> GeneratedBatch:
        """Read U, or create and save it.

        Args:
            make: returns it.
            check: called with a U that an earlier run saved.

        Raises:
            StoreError: it is not the batch that P was computed from.
        """
        place = self.path / BATCH
        if place.exists():
            batch = load_batch(place, checkpoint=self.sampler)
            self._check_batch(self.complete or {})
            check(batch)
            return batch
        save_batch(make(), place)
        return load_batch(place, checkpoint=self.sampler)

    def _check_batch(self, facts: Mapping[str, Any]) -> None:
        """Compare U's checksum with that of the batch that P was computed from."""
        place = self.path / BATCH / MANIFEST_OF_BATCH
        if "batch" in facts and (not place.is_file() or checksum(place) != facts["batch"]):
            raise StoreError(
                f"{self.path / BATCH} is not the batch that this workspace was made of; put that one back, or delete "
                f"the workspace to have it made anew."
            )

    def cuts(self) -> list[slice] | None:
        """Microbatches of the stored gradients, which a resumed run must reuse; None where there are none."""
        place = self.path / GRADIENTS / MANIFEST
        if not place.is_file():
            return None
        try:
            return [slice(*rows) for rows in parse_json(place.read_text(encoding="utf-8"))["groups"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{place} cannot be read ({error}); delete {place.parent} to begin it anew.") from error

    def gradients(
        self,
        side: SortedBatch,
        cuts: list[slice],
        pieces: Read | None,
        on_progress: Callable[[int], Any] = lambda n: None,
        device: torch.device | None = None,
    ) -> Gradients:
        """Open U's gradients; compute and write missing ones with `pieces`."""
        identity = {key: self.spec[key] for key in ("checkpoint", "parameters", "temperature", "dtype")}
        identity |= {key: self.spec[key] for key in ("loss", "padding") if key in self.spec}
        batch = side.batch
        identity["batch"] = fingerprint(batch.sequences if isinstance(batch, Weighted) else batch)
        opened = open_store if pieces is not None else read_store
        store = self.opened.enter_context(opened(self.path / GRADIENTS, identity, cuts))
        if pieces is None and not store.complete:
            raise self.unfinished()
        computed = 0 if pieces is None else complete(store, pieces, on_progress)
        return Gradients(side, cuts, store.read, computed, device)

    def walked(self, side: SortedBatch) -> Gradients:
        """Gradients that are not stored, without a model to recompute them: reading one raises."""

        def read(i: int, *names: Any) -> Any:
            raise StoreError(
                f"The workspace at {self.path} keeps no gradients: its sequences are long, and the model walks them "
                f"again for every question. Say which plan made it: `fkernel query {self.path} ID ID --plan "
                f"OUT/plan.json`; or ask a plan with `requests: [{{kind: update}}]`, by `fkernel run PLAN`."
            )

        gradients = Gradients(side, [slice(i, i + 1) for i in range(len(side))], read)
        gradients.walked = True
        return gradients

    def unfinished(self) -> StoreError:
        """The error for an interrupted run's workspace."""
        return StoreError(f"The workspace at {self.path} is not complete; run its plan again, and it is finished.")

    def seal(
        self,
        P: Diagonal,
        clip: float,
        grad_norm: float,
        ascent: Tree,
        loss: LossTerms | None = None,
        walked: bool = False,
    ) -> None:
        """Write P, the ascent and the loss terms, then complete.json; `walked`: no gradients are stored."""
        facts: dict[str, Any] = {"clip": clip, "grad_norm": grad_norm, "walked": walked}
        facts |= {"sha256": self._vector(RESPONSE, P.d or {}), "ascent": {"sha256": self._vector(ASCENT, ascent)}}
        facts["batch"] = checksum(self.path / BATCH / MANIFEST_OF_BATCH)
        if loss is not None:
            sha256 = atomic_write(self.path / LOSS, safetensors_chunks(loss.tensors()))
            facts["loss"] = {**loss.record(), "sha256": sha256}
        self._write(COMPLETE, facts)

    def loss(self) -> LossTerms | None:
        """Read the loss terms; None for the policy gradient.

        Raises:
            StoreError: the checksum differs.
        """
        facts = (self.complete or {}).get("loss")
        return None if facts is None else LossTerms.of(self._tensors(LOSS, facts), facts)

    def ascent(self) -> Tree:
        """Read −∇L before clipping, from which Δθ is computed.

        Raises:
            StoreError: the workspace is not complete, or the checksum differs.
        """
        facts = self.complete
        if facts is None:
            raise self.unfinished()
        return self._tensors(ASCENT, facts["ascent"])

    def response(self) -> tuple[Diagonal, float, float]:
        """Read (P, c, ‖∇L‖).

        Raises:
            StoreError: the workspace is not complete, or the checksum of P or U differs.
        """
        facts = self.complete
        if facts is None:
            raise self.unfinished()
        self._check_batch(facts)
        return Diagonal(self._tensors(RESPONSE, facts) or None), facts["clip"], facts["grad_norm"]

    def _vector(self, name: str, vector: Tree) -> str:
        """Write {name: [*shape]}; returns its checksum."""
        return atomic_write(self.path / name, safetensors_chunks(vector))

    def _tensors(self, name: str, facts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        place = self.path / name
        with plain_errors("read", self.path):
            if not place.is_file() or checksum(place) != facts["sha256"]:
                raise StoreError(f"{place} is not what was written; delete {COMPLETE} beside it to have it made again.")
            return load_file(place)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_checksummed(self.path / name)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path / name} cannot be read ({error}); delete the workspace to begin anew."
            ) from error

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        atomic_write(self.path / name, [checksummed_json(content)])
