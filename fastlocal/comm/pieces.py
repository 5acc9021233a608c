"""Parameters that are DTensors: the pieces that this process holds, and what its peers on the mesh hold."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from fastlocal.comm.lent import lent


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing torch's distributed tensors."""
    return hasattr(type(tensor), "device_mesh")


def held_here(tensor: Tensor) -> Tensor:
    """This process's piece of a DTensor, sharing its memory; a plain tensor itself.

    Raises:
        TypeError: the DTensor is a sum still to be taken.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor  # costs half a second, which most programs need not pay

    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(f"DTensors must be sharded or replicated, got placements {tensor.placements}")
    return tensor.to_local()


def are_cut_alike(first: Tensor, second: Tensor) -> bool:
    """Whether both are DTensors whose pieces lie in the same places."""
    from torch.distributed.tensor import DTensor

    if not isinstance(first, DTensor) or not isinstance(second, DTensor):
        return False
    return first.device_mesh == second.device_mesh and first.placements == second.placements


def sum_over_pieces_(values: Tensor, owners: Sequence[Tensor]) -> None:
    """Adds up row i of `values` over the processes among which the DTensor owners[i] is cut in pieces.

    One all-reduce if all are cut alike along one mesh dimension, as by FSDP.
    """
    alike: dict[tuple, list[int]] = {}
    for row, owner in enumerate(owners):
        cut = cut_of(owner)
        assert cut is not None
        alike.setdefault(cut, []).append(row)
    for (mesh, cut), rows in alike.items():
        part = values[rows]
        for dim in cut:
            dist.all_reduce(lent(part), group=mesh.get_group(dim))
        values[rows] = part


def cut_of(tensor: Tensor) -> tuple | None:
    """How a DTensor is cut: its mesh and the mesh dimensions that hold different pieces; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    cut = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tensor.device_mesh, cut


def cuts_of(owner: Tensor) -> "list[dist.ProcessGroup]":
    """The group along each dimension of the DTensor's mesh whose processes hold different pieces."""
    cut = cut_of(owner)
    assert cut is not None
    mesh, dims = cut
    return [mesh.get_group(dim) for dim in dims]


def dimensions_of(owner: Tensor) -> "list[tuple[dist.ProcessGroup, int]]":
    """The group along each dimension of the DTensor's mesh, and the global rank of the first process there."""
    from torch.distributed.tensor import DTensor

    assert isinstance(owner, DTensor)
    mesh = owner.device_mesh
    here = mesh.get_coordinate()
    assert here is not None
    firsts = [mesh.mesh[(*here[:dim], 0, *here[dim + 1 :])].item() for dim in range(mesh.ndim)]
    return [(mesh.get_group(dim), int(first)) for dim, first in enumerate(firsts)]


def place_of(owner: Tensor) -> list[int]:
    """Where this process's piece of the DTensor lies, along each dimension of the mesh that cuts it."""
    cut = cut_of(owner)
    assert cut is not None
    mesh, dims = cut
    here = mesh.get_coordinate()
    assert here is not None
    return [here[dim] for dim in dims]


def ranks_on_mesh(owner: Tensor) -> set[int]:
    """The global ranks of the processes that hold the DTensor together."""
    from torch.distributed.tensor import DTensor

    assert isinstance(owner, DTensor)
    return set(owner.device_mesh.mesh.flatten().tolist())
