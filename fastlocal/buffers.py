"""Module buffers, such as BatchNorm statistics: what a sync does to them."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Buffers = Literal["average", "keep", "broadcast"]
"""Average them, leave them to each worker, or give everybody the first worker's."""


def collect(modules: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Each buffer in every module.

    Raises:
        RuntimeError: a module lacks one, or has it in another shape.
    """
    workers = [dict(module.named_buffers()) for module in modules]
    buffers = []
    for name, first in workers[0].items():
        for worker, own in enumerate(workers):
            if name not in own or own[name].shape != first.shape:
                raise RuntimeError(f"buffer {name!r} of worker {worker} is missing or shaped unlike worker 0's")
        buffers.append([own[name] for own in workers])
    return buffers


@torch.no_grad()
def merge_(buffers: Iterable[Sequence[Tensor]], choice: Buffers, included: Sequence[bool]) -> int:
    """Apply the choice; an excluded worker's buffers are replaced whatever it is.

    Args:
        buffers: each buffer in every worker.
        choice: what becomes of them.
        included: which workers count.

    Returns:
        The bytes of one worker's buffers that were sent.
    """
    if choice == "keep" and all(included):
        return 0
    payload = 0
    for twins in buffers:
        value = merged([buffer for buffer, counts in zip(twins, included, strict=True) if counts], choice)
        for buffer, counts in zip(twins, included, strict=True):
            if choice != "keep" or not counts:
                buffer.copy_(value)
        payload += twins[0].nbytes
    return payload


def merged(values: Sequence[Tensor], choice: Buffers) -> Tensor:
    """What one buffer becomes.

    Args:
        values: the buffer in each worker that counts.
        choice: "average" is the mean of those that are finite, of integers the maximum; otherwise the first finite.
    """
    stacked = torch.stack(list(values))
    if not (stacked.is_floating_point() or stacked.is_complex()):
        return stacked.amax(dim=0) if choice == "average" else stacked[0]
    finite = stacked.isfinite().flatten(1).all(dim=1)
    if choice != "average":
        return stacked[finite.to(torch.uint8).argmax()]
    # One worker's infinite batch must not stay in everybody's statistics. What is finite in none, such as a mask of
    # -inf, stays as worker 0 has it.
    kept = torch.where(finite.view(-1, *[1] * (stacked.dim() - 1)), stacked, 0)
    mean = kept.sum(dim=0, dtype=torch.promote_types(stacked.dtype, torch.float32)) / finite.sum()
    return torch.where(finite.any(), mean.to(stacked.dtype), stacked[0])
