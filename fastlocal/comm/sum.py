"""A sum over all processes that is under way while this one does something else."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlocal.comm.group import Group


class Sum:
    """Overwrites a contiguous tensor with the sum over all processes, for the bytes of an all_reduce.

    All processes make it, let it go on and wait for it in one order among their messages.

    Args:
        group: the processes.
        tensor: what this process brings; it is cut along its first dimension, and nobody else may write to it.
        add_up: what of parts, shape (processes, …), is their sum. With it two messages follow each other: in an
            all_reduce of low precision each process on the way rounds; here each adds up a part that all have sent
            it, in the group's order, and gives all the result. The last part may be padded with zeros. None for an
            all_reduce.
    """

    def __init__(self, group: Group, tensor: Tensor, add_up: Callable[[Tensor], Tensor] | None = None) -> None:
        self._group, self._tensor, self._add_up = group, tensor, add_up
        self._parts: Tensor | None = None  # what all send this process, until it is added up
        self._whole: Tensor | None = None  # what it comes to, in parts
        self._await: Callable[[], None] = _there_already
        if not tensor.numel():
            return
        if add_up is None or (len(group) == 2 and tensor.is_floating_point()):  # one addition rounds once
            self._await = group.send_sum(tensor)
            return
        own = self._in_parts()
        self._parts = torch.empty_like(own)
        self._await = group.send_parts(self._parts, own)

    def go_on(self) -> None:
        """Send the second message where there is one, for which the first has to be there."""
        if self._parts is None:
            return
        assert self._add_up is not None
        self._await()
        own = self._add_up(self._parts)
        self._parts, self._whole = None, self._in_parts()
        self._await = self._group.send_to_all(self._whole, own)

    def wait(self) -> Tensor:
        """The tensor, once it is the sum."""
        self.go_on()
        self._await()
        if self._whole is not None and self._whole.data_ptr() != self._tensor.data_ptr():
            self._tensor.copy_(self._whole.flatten(0, 1)[: len(self._tensor)])
        self._whole = None
        return self._tensor

    def _in_parts(self) -> Tensor:
        """The tensor in as many parts as there are processes: a view of it, or padded in memory of its own."""
        tensor, processes = self._tensor, len(self._group)
        size = -(-len(tensor) // processes)
        shape = (processes, size, *tensor.shape[1:])
        if len(tensor) == processes * size:
            return tensor.view(shape)
        parts = tensor.new_zeros(shape)
        parts.flatten(0, 1)[: len(tensor)] = tensor
        return parts


def _there_already() -> None:
    """Nothing is under way."""
