"""A sum over all processes that is under way while this one does something else."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlocal.comm.group import Group


class Sum:
    """Overwrites a contiguous tensor with the sum over all processes, for the bytes of an all_reduce.

    All processes send it, let it go on and wait for it in one order among their messages.

    Args:
        group: the processes.
        tensor: what this process brings; it is cut along its first dimension, and nobody else may write to it.
        add_up: what of parts, shape (processes, …), is their sum. With it two messages follow each other: in an
            all_reduce of low precision each process on the way rounds; here each adds up a part that all have sent
            it, in the group's order, and gives all the result. None for an all_reduce.
        parts: what a sum that was saved had received.

    Attributes:
        tensor: the sum, after `wait`.
        parts: what all have sent this process and it has not added up yet; None before and after. The last one may be
            padded with zeros.
    """

    def __init__(
        self,
        group: Group,
        tensor: Tensor,
        add_up: Callable[[Tensor], Tensor] | None = None,
        parts: Tensor | None = None,
    ) -> None:
        self.tensor, self.parts = tensor, parts
        self._group, self._add_up = group, add_up
        self._await: Callable[[], None] = _there_already
        self._padded: Tensor | None = None

    def send(self) -> "Sum":
        """Send the first message; returns the sum itself."""
        if not self.tensor.numel():
            return self
        if self._add_up is None or (len(self._group) == 2 and self.tensor.is_floating_point()):
            self._await = self._group.send_sum(self.tensor)  # one addition rounds once
            return self
        own = in_parts(self.tensor, len(self._group))
        self.parts = torch.empty_like(own)
        self._await = self._group.send_parts(self.parts, own)
        return self

    def receive(self) -> None:
        """Wait for what is under way, and send nothing more: one process may do that alone."""
        self._await()
        self._await = _there_already
        if self._padded is not None and self._padded.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(self._padded.flatten(0, 1)[: len(self.tensor)])
        self._padded = None

    def go_on(self) -> None:
        """Send the second message where there is one, for which the first has to be there."""
        if self.parts is None or self._add_up is None:
            return
        self.receive()
        own = self._add_up(self.parts)
        self.parts = None
        self._padded = in_parts(self.tensor, len(self._group))
        self._await = self._group.send_to_all(self._padded, own)

    def wait(self) -> Tensor:
        """The sum, once it is there."""
        self.go_on()
        self.receive()
        return self.tensor


def in_parts(tensor: Tensor, processes: int) -> Tensor:
    """The tensor cut into as many parts as there are processes: a view of it, or padded in memory of its own."""
    size = -(-len(tensor) // processes)
    shape = (processes, size, *tensor.shape[1:])
    if len(tensor) == processes * size:
        return tensor.view(shape)
    parts = tensor.new_zeros(shape)
    parts.flatten(0, 1)[: len(tensor)] = tensor
    return parts


def _there_already() -> None:
    """Nothing is under way."""
