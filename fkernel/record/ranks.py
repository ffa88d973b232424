"""Several processes that train one model: what each of them tapped comes together in the first, which writes it.

    ∇L = 1/R Σ_r ∇L_r        R processes, each with rows of its own; DistributedDataParallel averages their gradients

The step's loss is the mean of theirs, so that ω of a row is what autograd hands back in its process, divided by R. An
error in one process is raised in all of them: none is left waiting for the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from fkernel.errors import ModelError

VARIABLE = "RANK"
"""Where torchrun and accelerate write a process's number, before torch.distributed knows of it."""


class Ranks:
    """The processes of a training, seen from one of them.

    Attributes:
        rank: number of this process.
        size: R, 1 until `join`.
    """

    def __init__(self) -> None:
        known = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if known else int(os.environ.get(VARIABLE, "0"))
        self.size = 1
        self._group: Any = None  # of gloo, which carries objects wherever tensors live

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def join(self, model: nn.Module) -> None:
        """Meet the other processes; every one of them calls it.

        Args:
            model: as it is trained, wrapped.

        Raises:
            ModelError: how the processes' gradients are combined is not known.
        """
        known = distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if known else 0
        if rank != self.rank:
            raise ModelError(
                f"This process was number {self.rank} where its Recorder was made, and is number {rank} where training "
                f"begins. Call torch.distributed.init_process_group() first, in every process, then make the Recorder."
            )
        size = distributed.get_world_size() if known else 1
        if size == 1:
            return
        while hasattr(model, "_orig_mod"):  # compiled around the wrapper
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ModelError(
                f"{size} processes train, and the model is a {type(model).__name__}; expected one in "
                f"DistributedDataParallel, which averages gradients. How others combine them is not known (FSDP and "
                f"DeepSpeed keep parts of them), so that a record could not be checked."
            )
        self.size, self._group = size, distributed.new_group(backend="gloo")

    def collect(self, work: Callable[[], Any]) -> list[Any]:
        """Do something in every process, and bring what comes of it to the first.

        Args:
            work: what is done; an error of one process is raised in all.

        Returns:
            What each process returned, in their order; this process's alone in all but the first.

        Example:
            >>> Ranks().collect(lambda: 3)
            [3]
        """
        if self.size == 1:
            return [work()]
        done = _attempt(work)
        every: list[Any] = [None] * self.size
        distributed.gather_object(done, every if self.first else None, dst=0, group=self._group)
        failed = next((error for _, error in every if error is not None), None) if self.first else None
        self._share((None, failed), done[1])
        return [value for value, _ in every] if self.first else [done[0]]

    def agree(self, work: Callable[[], Any]) -> Any:
        """Do something in the first process alone; every process waits for it.

        Args:
            work: what is done; its error is raised in all processes.

        Returns:
            What it returned, in every process.

        Example:
            >>> Ranks().agree(lambda: "written")
            'written'
        """
        if self.size == 1:
            return work()
        return self._share(_attempt(work) if self.first else (None, None))

    def _share(self, outcome: tuple[Any, Exception | None], own: Exception | None = None) -> Any:
        """Hand the first process's outcome to all; an error of one's own is raised with its own traceback."""
        shared = [outcome]
        distributed.broadcast_object_list(shared, src=0, group=self._group)
        value, error = outcome if self.first else shared[0]
        if error is not None:
            raise own or error
        return value


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except torch.OutOfMemoryError as error:  # cannot be sent as it is
        return None, ModelError(str(error))
    except Exception as error:  # whatever it is: the other processes must hear of it
        return None, error
