"""Between processes; the only module that may import torch.distributed."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def require_single_process() -> None:
    """Raise RuntimeError inside an initialised process group of several processes.

    Rows are averaged within one process so far. Averaging there and nowhere else would train
    each process on its own without a word.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"fastlocal averages workers inside one process, but {dist.get_world_size()} processes are running: "
            "use fastlocal.Workers in one process"
        )


def local_piece(tensor: Tensor) -> Tensor:
    """This process's piece of a DTensor, sharing its memory.

    Raises:
        TypeError: the DTensor is a sum still to be taken.
    """
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
    from torch.distributed.tensor import DTensor

    alike: dict[tuple, list[int]] = {}
    for row, owner in enumerate(owners):
        assert isinstance(owner, DTensor)
        cut = tuple(dim for dim, placement in enumerate(owner.placements) if not placement.is_replicate())
        alike.setdefault((owner.device_mesh, cut), []).append(row)
    for (mesh, cut), rows in alike.items():
        part = values[rows]
        for dim in cut:
            dist.all_reduce(part, group=mesh.get_group(dim))
        values[rows] = part
