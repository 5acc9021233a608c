"""Which processes train together: the group that was given, the default one, or none."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlocal.comm.group import Group
from fastlocal.comm.pieces import dimensions_of


def is_initialized() -> bool:
    """Whether torch.distributed is there, which some builds of torch leave out, and has begun."""
    return dist.is_available() and dist.is_initialized()


def several_processes_run() -> bool:
    """Whether torch.distributed is initialised with more than one process."""
    return is_initialized() and dist.get_world_size() > 1


def is_process_group(value: Any) -> bool:
    """Whether this is a process group of torch.distributed."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def find_group(process_group: Any, timeout: float, devices: Sequence[torch.device]) -> Group | None:
    """The group to train with: the one given, else the default one; None if it has one process only.

    Args:
        process_group: a torch.distributed process group that this process is in, or None.
        timeout: seconds that a collective may take.
        devices: of the parameters; messages travel on the first if the group cannot send from the CPU.

    Raises:
        TypeError: process_group is something else.
        ValueError: this process is not in it, it has no backend for a device, or timeout is not in (0, 1e9].
        RuntimeError: a group was given, and this torch was built without torch.distributed.
    """
    if not 0 < timeout <= 1e9:  # torch counts in nanoseconds, of which 64 bits hold 9e9 seconds
        raise ValueError(f"timeout must be a positive number of seconds, at most 1e9, got {timeout}")
    if process_group is None:
        if not several_processes_run():
            return None
        process_group = dist.group.WORLD
    if not dist.is_available():
        raise RuntimeError("process_group was given, but this torch was built without torch.distributed")
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process is in: it is not")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {process_group!r}")
    if process_group.size() == 1:
        return None
    backends = dist.get_backend_config(process_group)
    for device in devices:
        if f"{device.type}:" not in backends:
            raise ValueError(
                f"process_group must have a backend for parameters on {device.type}, and has {backends}: initialise "
                "torch.distributed without naming one, or with 'cpu:gloo,cuda:nccl'"
            )
    return Group(process_group, timeout, devices[0])


def groups_of_pieces(owners: Sequence[Tensor], timeout: float) -> list[tuple[Group, int]]:
    """Each mesh dimension along which one of the DTensors lies, as a group, with who comes first there.

    Where the first gives something to all, one group after the other, all have what the first on the mesh gave.

    Args:
        owners: DTensors, see Rows.owners.
        timeout: seconds that a collective may take.
    """
    groups: dict[str, tuple[Group, int]] = {}
    for owner in owners:
        for process_group, source in dimensions_of(owner):
            if process_group.size() > 1 and process_group.group_name not in groups:
                group = Group(process_group, timeout, owner.device)
                groups[process_group.group_name] = group, group.ranks.index(source)
    return list(groups.values())
