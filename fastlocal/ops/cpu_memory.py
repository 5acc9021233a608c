"""Tensors in a CPU's memory as vectors, sums of their squares, and short ones in batches."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlocal.reference.trust_ratio import row_norms

# 2 MiB of float32: long enough that a call's few microseconds vanish, and short enough to stay in the cache.
CHUNK = 512 * 1024

# Elements. Calls cost more than memory in shorter tensors, and float32 norms of longer ones lose digits.
_SHORT = 16 * 1024

Entry = TypeVar("Entry", bound=tuple[Any, ...])


def are_plain(*tensors: Tensor) -> bool:
    """Whether all are contiguous float32 in a CPU's memory, which torch's fused kernels take as they are."""
    return all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)


def as_vectors(*tensors: Tensor) -> list[Tensor] | None:
    """The tensors as vectors in memory order; None unless they are float32 on a CPU and laid out alike."""
    if are_plain(*tensors):
        return [t.view(-1) for t in tensors]
    if any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        return None
    first = tensors[0]
    stride = first.stride()
    if any(t.stride() != stride for t in tensors) or not torch.ops.aten.is_non_overlapping_and_dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def in_float32(param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter in float32, and the gradient in float32 with the parameter's strides."""
    if param.dtype == torch.float64:
        return param, grad
    w = param.to(torch.float32)
    if grad.dtype == torch.float32 and grad.stride() == w.stride():
        return w, grad
    return w, torch.empty_like(w).copy_(grad)


def sum_of_squares(flat: Tensor) -> float:
    """Σ x² of a float32 vector, to six digits: all of a chunk in one call keeps four, if its elements are alike."""
    norms, rest = row_norms(flat)
    norms = norms.double()
    return torch.dot(norms, norms).item() + torch.dot(rest, rest).item()


def short_in_batches(entries: Iterable[Entry]) -> tuple[list[list[Entry]], list[Entry]]:
    """Batches of at most CHUNK elements, of those that are short and plain; and the others.

    entries: a parameter, what has its shape or is None, and last its count of steps.
    """
    batches: list[list[Entry]] = []
    others: list[Entry] = []
    room = -1
    for entry in entries:
        size = entry[0].numel()
        if size > _SHORT or not are_plain(*(t for t in entry[:-1] if t is not None)):
            others.append(entry)
            continue
        if size > room:
            batches.append([])
            room = CHUNK
        batches[-1].append(entry)
        room -= size
    return batches, others
