"""The ranks of a device mesh, as the functions of this room take them.

Data moves over the mesh's own backend (NCCL on GPUs, gloo on CPUs). Agreement and errors move over gloo and the group's
key-value store, which work when a GPU does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from fkernel.distributed.heartbeat import Heartbeat
from fkernel.errors import ProcessError

_GROUPS: WeakKeyDictionary[dist.ProcessGroup, Group] = WeakKeyDictionary()
"""Groups that were made before: each has one heartbeat, and one count of its meetings."""


@dataclass
class Progress:
    """Where this rank is: what all ranks count alike.

    Attributes:
        meetings: number of meetings so far; see `fkernel.distributed.agreement`.
        depth: number of open `together` contexts.
    """

    meetings: int = 0
    depth: int = 0


@dataclass(frozen=True, eq=False)
class Group:
    """Ranks that compute together.

    Attributes:
        rank: this process's, from 0.
        size: their number.
        data: the process group that moves tensors.
        control: a gloo group of the same ranks, for agreement.
        store: their key-value store.
        heartbeat: tells the other ranks that this one is alive.
        progress: what this rank has taken part in.
    """

    rank: int
    size: int
    data: dist.ProcessGroup
    control: dist.ProcessGroup
    store: Any
    heartbeat: Heartbeat
    progress: Progress = field(default_factory=Progress)

    @property
    def blocking(self) -> bool:
        """Whether the data's collectives are waited for on the host (gloo), or in the device's stream (NCCL)."""
        return dist.get_backend(self.data) == "gloo"


def group_of(mesh: Any) -> Group:
    """Return the group of a one-dimensional mesh; every rank of it must call this.

    Args:
        mesh: a `torch.distributed.DeviceMesh` of one dimension.

    Raises:
        ProcessError: it has more dimensions, or this process is not in it.
    """
    if mesh.ndim != 1:
        names = "" if mesh.mesh_dim_names is None else f", {list(mesh.mesh_dim_names)}"
        raise ProcessError(
            f"mesh has {mesh.ndim} dimensions{names}; expected one: give one of them, such as mesh['dp'], or "
            f"torch.distributed.init_device_mesh('cpu', (ranks,))."
        )
    if mesh.get_coordinate() is None:
        raise ProcessError("this process is not in the mesh; call this function on the ranks of the mesh only.")
    data = mesh.get_group()
    if data not in _GROUPS:
        _GROUPS[data] = _made(data)
    return _GROUPS[data]


def _made(data: dist.ProcessGroup) -> Group:
    ranks = dist.get_process_group_ranks(data)
    control = data
    if dist.get_backend(data) != "gloo":
        control = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(control, dist.ProcessGroup)
    name = f"fkernel/{dist.distributed_c10d._get_process_group_name(data)}/{'-'.join(map(str, ranks))}"
    store = dist.distributed_c10d.PrefixStore(name, dist.distributed_c10d._get_default_store())
    rank = dist.get_rank(data)
    return Group(rank, len(ranks), data, control, store, Heartbeat(store, rank))
