"""Module buffers over the workers of several processes: the same choices as in `buffers`, with messages."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlocal.buffers import Buffers
from fastlocal.comm import Group, Operation

_LEAST = torch.iinfo(torch.int64).min


@torch.no_grad()
def merge_across_(
    buffers: Sequence[Sequence[Tensor]], choice: Buffers, included: Sequence[Sequence[bool]], group: Group
) -> int:
    """Apply the choice; an excluded worker's buffers are replaced whatever it is.

    Args:
        buffers: each buffer in every worker of this process.
        choice: what becomes of them.
        included: for every process, which of its workers count.
        group: the processes.

    Returns:
        The bytes of one worker's buffers that were sent.
    """
    if not buffers or (choice == "keep" and all(map(all, included))):
        return 0
    real = [[torch.view_as_real(b) if b.is_complex() else b for b in twins] for twins in buffers]
    values = _means(real, included, group) if choice == "average" else _firsts(real, included, group)
    for twins, value in zip(real, values, strict=True):
        for buffer, counts in zip(twins, included[group.rank], strict=True):
            if choice != "keep" or not counts:
                buffer.copy_(value)
    return sum(twins[0].numel() * _wire_dtype(twins[0]).itemsize for twins in real)


def _means(buffers: list[list[Tensor]], included: Sequence[Sequence[bool]], group: Group) -> list[Tensor]:
    """The mean of the finite ones, and where none is finite the first counted worker's; of integers the maximum."""
    own = included[group.rank]
    donors = [
        [b for b, counts, finite in zip(twins, own, flags, strict=True) if counts and finite]
        for twins, flags in zip(buffers, _finite(buffers), strict=True)
    ]
    counts = [float(len(donor)) for donor in donors]

    def contribution(index: int) -> Tensor:
        value = torch.zeros_like(buffers[index][0], dtype=_wire_dtype(buffers[index][0]))
        if not value.is_floating_point():
            value.fill_(_LEAST)
        for donor in donors[index]:
            if value.is_floating_point():
                value += donor
            else:
                torch.maximum(value, donor.to(value.dtype), out=value)
        return value

    totals = _reduced(buffers, contribution, group, "max")
    everybody = [sum(those) for those in zip(*group.gather(counts), strict=True)]
    values = [
        total / count if total.is_floating_point() and count else total
        for total, count in zip(totals, everybody, strict=True)
    ]
    never = [index for index, count in enumerate(everybody) if not count]  # a mask of -inf, say: there is no mean
    if never:
        for index, value in zip(never, _firsts([buffers[i] for i in never], included, group), strict=True):
            values[index] = value
    return values


def _firsts(buffers: list[list[Tensor]], included: Sequence[Sequence[bool]], group: Group) -> list[Tensor]:
    """The first finite one of a worker that counts; if there is none, the first such worker's."""
    rows = len(buffers[0])
    workers = rows * len(group)
    places = []
    for flags in _finite(buffers):
        ranked = [
            group.rank * rows + row + (0 if counts and finite else workers if counts else 2 * workers)
            for row, (finite, counts) in enumerate(zip(flags, included[group.rank], strict=True))
        ]
        places.append(min(ranked))
    owners = [int(min(column)) % workers for column in zip(*group.gather(places), strict=True)]

    def contribution(index: int) -> Tensor:
        process, row = divmod(owners[index], rows)
        value = buffers[index][row].to(_wire_dtype(buffers[index][0]), copy=True)
        return value if process == group.rank else value.zero_()

    return _reduced(buffers, contribution, group, "sum")


def _reduced(
    buffers: list[list[Tensor]], contribution: Callable[[int], Tensor], group: Group, integers: Operation
) -> list[Tensor]:
    """Every process's contributions summed (integers as said), in one flat message a device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, twins in enumerate(buffers):
        kinds.setdefault((twins[0].device, _wire_dtype(twins[0])), []).append(index)
    values: dict[int, Tensor] = {}
    for (_, dtype), indices in kinds.items():
        parts = [contribution(index) for index in indices]
        flat = torch.cat([part.flatten() for part in parts])
        group.reduce_(flat, "sum" if dtype.is_floating_point else integers)
        for index, part, value in zip(indices, parts, flat.split([part.numel() for part in parts]), strict=True):
            values[index] = value.view(part.shape)
    return [values[index] for index in range(len(buffers))]


def _wire_dtype(buffer: Tensor) -> torch.dtype:
    if not buffer.is_floating_point():
        return torch.int64
    return torch.promote_types(buffer.dtype, torch.float32)


def _finite(buffers: list[list[Tensor]]) -> list[list[bool]]:
    """Whether each buffer is finite in each worker; one read from the device."""
    flags = [torch.stack([b.isfinite().all() for b in twins]) for twins in buffers]
    home = flags[0].device  # a model may lie on several
    return torch.stack([own.to(home) for own in flags]).tolist()
