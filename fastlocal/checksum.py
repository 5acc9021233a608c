"""Checksums by which processes find out whether they hold the same bytes, without sending them."""

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements that are worked on at a time: the temporaries take 8 MiB each."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Σ w_i v_i modulo 2⁶⁴, v_i being the elements' bytes as whole numbers; int64, shape (), on the tensor's device.

    The weights are odd, so that one element that differs is always seen, and without a pattern: with 1, 3, 5, 7 the
    elements 1, 0, 0, 1 would be taken for 0, 1, 1, 0. Whole numbers are summed exactly in any order.
    """
    # A sparse one is compared as what it stands for: it may be stored in several ways.
    values = (tensor if tensor.layout is torch.strided else tensor.to_dense()).flatten()
    if values.element_size() not in _INTEGERS:  # complex128
        values = torch.view_as_real(values).flatten()
    values = values.view(_INTEGERS[values.element_size()])
    chunks = values.split(_CHUNK)
    weights = _weights(0, len(chunks[0]), values.device)
    sums = torch.stack([(chunk * weights[: len(chunk)]).sum() for chunk in chunks])
    return (sums * _weights(_CHUNK, len(sums), values.device)).sum()


def _weights(first: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers that look random, numbered from `first` on, the same on every machine."""
    numbers = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
        numbers *= factor
        numbers ^= numbers >> 29
    return numbers | 1
