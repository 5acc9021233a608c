"""The mean of the workers' rows, in this process and over several: messages, and what of them is the mean."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.comm import Group, Sum
from fastlocal.flat import Block
from fastlocal.ops import averaging as ops
from fastlocal.ops import progress
from fastlocal.outer import Outer


def progress_of(block: Block, outer: Outer, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """A message with how far the workers of this process have come since the anchor, rounded to the dtype."""
    message = progress.empty_message(block.rows.shape[1], dtype, block.rows.device)
    progress.progress_(message, block.rows, _anchor_of(outer), weights)
    return message


def write_mean_of_progress(mean: Tensor, message: Tensor, block: Block, outer: Outer, total_weight: float) -> None:
    """Overwrite `mean`, shape (n,), with the mean that such messages, summed, say."""
    progress.mean_(mean, message, block.rows, _anchor_of(outer), total_weight)


def divide_(total: Tensor, divisor: float) -> None:
    """Make the mean of a weighted sum: times 1/3 in float32 that of three equal rows would lie above them."""
    if divisor != 1:  # as a tensor: CUDA multiplies by the reciprocal of a number
        total.div_(torch.full((), divisor, dtype=total.dtype, device=total.device))


class SharedRows:
    """Takes the mean of blocks of rows over the processes of a group.

    Args:
        group: the processes.
        wire_dtype: in which progress is sent; None sends the rows as they are.
    """

    def __init__(self, group: Group, wire_dtype: torch.dtype | None) -> None:
        self._group, self._wire_dtype = group, wire_dtype
        self._wires: dict[int, Tensor] = {}

    def begin_sums(
        self, blocks: Sequence[Block], outers: Sequence[Outer], own: list[float], total: float
    ) -> list[Sum]:
        """begin_sum of all, in memory that nothing else is written to while they are under way."""
        sums = [self.begin_sum(block, outer, own, total) for block, outer in zip(blocks, outers, strict=True)]
        self._wires.clear()
        return sums

    def begin_sum(self, block: Block, outer: Outer, own: list[float], total: float) -> Sum:
        """Begin the sum of what the rows of all processes bring.

        Args:
            block: with the rows of this one.
            outer: with their anchor.
            own: their weights.
            total: of all processes' rows.
        """
        if self._wire_dtype is not None:
            return Sum(self._group, progress_of(block, outer, own, self._wire_dtype), progress.add_up)
        # Low precision is summed in float32, as in one process: a mean's last digits are not lost on the way.
        wire = self.wire(block)
        ops.weighted_sum_(wire, block.rows, _shares(own, total)[0])
        return Sum(self._group, wire)

    def mean_of(self, begun: Sum, block: Block, outer: Outer, total: float) -> Tensor:
        """The mean, shape (n,), in memory that the next one takes, once the sum is there."""
        message = begun.wait()
        if self._wire_dtype is None:
            divide_(message, _shares([], total)[1])
            return message
        mean = self.wire(block)
        write_mean_of_progress(mean, message, block, outer, total)
        return mean

    def can_average_in_place(self, block: Block) -> bool:
        """Whether the one row of this process may be sent and received where it lies."""
        in_own_dtype = ops.accumulate_dtype(block.rows.dtype) == block.rows.dtype
        return self._wire_dtype is None and len(block.rows) == 1 and in_own_dtype

    def average_in_place_(self, block: Block, own: list[float], total: float, alike: bool) -> None:
        """The row becomes the mean; alike: whether all processes weigh the same."""
        (share,), divisor = _shares(own, total)
        row = block.rows[0]
        # A backend's own mean multiplies by 1/n. Gloo has none.
        if alike and divisor == 1 and self._group.in_stream_order and row.is_cuda:
            self._group.reduce_(row, "mean")
            return
        if share == 0:
            row.zero_()  # it may hold NaN, and 0 · NaN is NaN
        elif share != 1:
            row.mul_(share)
        self._group.reduce_(row, "sum")
        divide_(row, divisor)

    def wire(self, block: Block, extra: int = 0) -> Tensor:
        """A buffer like a row of the block, in the dtype that sums are taken in; kept from sync to sync."""
        size = block.rows.shape[1] + extra
        wire = self._wires.get(id(block))
        if wire is None or len(wire) < size:
            dtype = ops.accumulate_dtype(block.rows.dtype)
            self._wires[id(block)] = wire = torch.empty(size, dtype=dtype, device=block.rows.device)
        return wire[:size]


def _anchor_of(outer: Outer) -> Tensor:
    assert outer.anchor is not None
    return outer.anchor


def _shares(weights: list[float], total: float) -> tuple[list[float], float]:
    """What rows are multiplied by before they are summed, and what the sum is divided by."""
    if math.frexp(total)[0] == 0.5:  # a power of two: to divide beforehand rounds nothing and costs no pass
        return [weight / total for weight in weights], 1.0
    return weights, total
