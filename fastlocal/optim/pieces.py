"""Parameters that are DTensors: the pieces this process holds, and how sums over pieces become whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastlocal import comm
from fastlocal.comm import is_sharded as is_sharded


def pieces(*lists: list[Any] | None) -> list[Any]:
    """Each list with this process's pieces in the place of DTensors."""
    return [None if tensors is None else [comm.held_here(t) for t in tensors] for tensors in lists]


def sum_over_pieces(params: list[Tensor], grads: list[Tensor]) -> Callable[[Tensor], None] | None:
    """How sums over these parameters' pieces are added up over processes; None if they are whole.

    Raises:
        TypeError: a gradient is cut otherwise than its parameter.
    """
    if not is_sharded(params[0]):
        return None
    for param, grad in zip(params, grads, strict=True):
        if not comm.are_cut_alike(param, grad):
            raise TypeError("a DTensor parameter's gradient must be a DTensor with the parameter's placements")
    return partial(comm.sum_over_pieces_, owners=params)
