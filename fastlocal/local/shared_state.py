"""The inner optimizer's state, averaged over the workers of several processes."""

import copy
import hashlib
import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal import comm
from fastlocal.comm import Group
from fastlocal.flat import Rows
from fastlocal.inner import is_averaged

Entry = tuple[str, str, torch.dtype, tuple[int, ...]]
"""A parameter's name, the key of one of its tensors, and that one's dtype and shape, of a DTensor the piece's."""


@torch.no_grad()
def average_state_across_(
    inner: torch.optim.Optimizer, rows: Rows, included: Sequence[Sequence[bool]], group: Group
) -> int:
    """Average the tensors in the state over the included workers; the excluded ones take theirs over whole.

    As inner.average_state_: scalars are left alone, and so is a tensor that not every included worker has.

    Args:
        inner: the optimizer whose state it is.
        rows: the parameters of this process's workers.
        included: for every process, which of its workers count.
        group: the processes.

    Returns:
        The bytes of one worker's state that were sent.
    """
    own = included[group.rank]
    donors = [p for p, counts in zip(rows.parameters, own, strict=True) if counts]
    entries = _agree(_held(inner, donors), bool(donors), group)
    count = sum(flags.count(True) for flags in included)
    means = _means(inner, rows, donors, entries, count, group)
    for parameters in donors:
        for (name, key, _, _), mean in zip(entries, means, strict=True):
            comm.held_here(inner.state[parameters[name]][key]).copy_(mean)
    if not all(map(all, included)):
        _take_over(inner, rows, donors, dict(zip(entries, means, strict=True)), included, group)
    return sum(
        _num_elements(rows.parameters[0][name], shape) * _wire_dtype(dtype).itemsize
        for name, _, dtype, shape in entries
    )


def _wire_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _held(inner: torch.optim.Optimizer, donors: list[dict[str, Any]]) -> list[Entry]:
    """What is averaged and every donor has."""
    if not donors:
        return []
    held = []
    for name, first in donors[0].items():
        for key, value in sorted(inner.state.get(first, {}).items()):
            if is_averaged(first, key, value):
                others = [inner.state.get(parameters[name], {}).get(key) for parameters in donors]
                if all(isinstance(other, Tensor) and other.shape == value.shape for other in others):
                    held.append((name, key, value.dtype, tuple(comm.held_here(value).shape)))
    return held


def _agree(held: list[Entry], counts: bool, group: Group) -> list[Entry]:
    """What every process with a worker that counts holds, in the same order everywhere."""
    # 48 bits pass through a float64 unchanged. Usually all hold the same, and one number tells.
    digest = int(hashlib.sha256(repr(held).encode()).hexdigest()[:12], 16) if counts else -1
    if len({number for (number,) in group.gather([digest])}) == 1:
        return held
    lists = group.gather_objects(held if counts else None)
    given = [theirs for theirs in lists if theirs is not None]
    return [entry for entry in given[0] if all(entry in theirs for theirs in given)]


def _means(
    inner: torch.optim.Optimizer,
    rows: Rows,
    donors: list[dict[str, Any]],
    entries: list[Entry],
    count: int,
    group: Group,
) -> list[Tensor]:
    """The mean of each entry, one flat message a device and dtype."""
    totals = []
    for name, key, dtype, shape in entries:
        device = rows.parameters[0][name].device
        total = torch.zeros(shape, dtype=_wire_dtype(dtype), device=device)
        for parameters in donors:
            total += comm.held_here(inner.state[parameters[name]][key])
        totals.append(total)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, total in enumerate(totals):
        kinds.setdefault((total.device, total.dtype), []).append(index)
    for indices in kinds.values():
        flat = torch.cat([totals[index].flatten() for index in indices])
        group.reduce_(flat, "sum")
        for index, part in zip(indices, flat.split([totals[i].numel() for i in indices]), strict=True):
            totals[index] = part.view(totals[index].shape) / count
    return totals


def _take_over(
    inner: torch.optim.Optimizer,
    rows: Rows,
    donors: list[dict[str, Any]],
    averaged: dict[Entry, Tensor],
    included: Sequence[Sequence[bool]],
    group: Group,
) -> None:
    """Workers that do not count take over the state of the first in all processes that does: its mean is known."""
    source = next(rank for rank, flags in enumerate(included) if any(flags))
    known = {(name, key) for name, key, _, _ in averaged}
    packed = b""
    if group.rank == source:
        rest = {
            name: {
                key: value.cpu() if isinstance(value, Tensor) else value
                for key, value in inner.state.get(parameter, {}).items()
                if (name, key) not in known and not _is_piece(value)
            }
            for name, parameter in donors[0].items()
        }
        packed = pickle.dumps(rest)
    size = int(group.gather([len(packed)])[source][0])
    packed = group.broadcast_bytes(packed or None, size, source)
    if all(included[group.rank]):
        return
    rest = pickle.loads(packed)
    for parameters, counts in zip(rows.parameters, included[group.rank], strict=True):
        begun = {} if counts else {name: p for name, p in parameters.items() if p in inner.state}
        for name, parameter in begun.items():
            before = inner.state.pop(parameter)
            if donors:  # pieces that have no mean are not sent
                own = inner.state.get(donors[0][name], {}).items()
                pieces = {key: value for key, value in own if (name, key) not in known and _is_piece(value)}
                inner.state[parameter] = copy.deepcopy(pieces)
            for key, value in rest[name].items():
                inner.state[parameter][key] = _placed(value, before.get(key), parameter)
        for (name, key, dtype, shape), mean in averaged.items():
            if name not in begun:
                continue
            parameter = parameters[name]
            if _is_like(parameter, shape):
                value = torch.zeros_like(parameter, dtype=dtype)
            else:
                value = torch.zeros(shape, dtype=dtype, device=parameter.device)
            comm.held_here(value).copy_(mean)
            inner.state[parameter][key] = value


def _is_piece(value: Any) -> bool:
    return isinstance(value, Tensor) and comm.is_sharded(value)


def _is_like(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor in the state is shaped like its parameter, and so cut as that is."""
    return shape == comm.held_here(parameter).shape


def _num_elements(parameter: Tensor, shape: tuple[int, ...]) -> int:
    """Of a tensor in the state; of one that is cut like its parameter, all pieces together."""
    return parameter.numel() if _is_like(parameter, shape) else math.prod(shape)


def _placed(value: Any, before: Any, parameter: Tensor) -> Any:
    """On the device where this process's own value was: some optimizers keep step counts on the CPU."""
    if not isinstance(value, Tensor):
        return value
    return value.to(before.device if isinstance(before, Tensor) else parameter.device, copy=True)
