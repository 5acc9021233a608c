"""The mean gradient over the workers of several processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal import comm
from fastlocal.comm import Group
from fastlocal.flat import Block, Rows
from fastlocal.inner import require_dense
from fastlocal.local.shared_rows import divide_


@torch.no_grad()
def average_gradients_across_(
    rows: Rows, block: Block, weights: Sequence[float], total_weight: float, wire: Tensor, group: Group
) -> None:
    """Give every worker the weighted mean gradient, in one all-reduce. A worker without one counts as zero, unless
    nobody has one: whether anybody does is agreed in the same message, never told from this process's own gradients.

    Args:
        rows: the parameters of this process's workers.
        block: those that are averaged.
        weights: of each worker of this process.
        total_weight: of all processes' workers.
        wire: shape (n + number of slots,) for a block of n columns; overwritten.
        group: the processes.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    wire.zero_()
    has_gradient = wire[block.rows.shape[1] :]
    for index, slot in enumerate(block.slots):
        total = wire.as_strided(slot.shape, slot.stride, wire.storage_offset() + slot.start)
        for parameters, weight in zip(rows.parameters, weights, strict=True):
            gradient = parameters[slot.name].grad
            if gradient is None:
                continue
            require_dense(gradient)
            total.add_(comm.held_here(gradient), alpha=weight)
            has_gradient[index] = 1
    group.reduce_(wire, "sum")
    anybody = has_gradient.tolist()
    divide_(wire, total_weight)
    for slot, count in zip(block.slots, anybody, strict=True):
        if not count:
            continue
        mean = wire.as_strided(slot.shape, slot.stride, wire.storage_offset() + slot.start)
        for parameters in rows.parameters:
            parameter = parameters[slot.name]
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            comm.held_here(parameter.grad).copy_(mean)
