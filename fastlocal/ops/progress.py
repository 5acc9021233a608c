"""What workers send where messages have low precision: their progress since the anchor, not their parameters.

A parameter rounded to bfloat16 loses every step below 1/256 of it. Progress that is rounded loses 1/256 of itself, in
float8 1/16, or all of it beside progress a quarter of a million times larger in the same chunk.
A message is a vector of bfloat16, or one of float8 as the module of that name lays it out. Plain PyTorch on every
device: for a lone float32 row 10 bytes a parameter before a message of bfloat16, 10 after it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlocal.ops import float8
from fastlocal.reference.averaging import accumulate_dtype

_COLUMNS_AT_ONCE = 2**22
"""The temporaries stay small beside the model. Whole chunks of float8."""


def empty_message(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a message about `columns` parameters, in bfloat16 or float8_e4m3fn."""
    if dtype == torch.float8_e4m3fn:
        return float8.empty(columns, device)
    return torch.empty(columns, dtype=dtype, device=device)


def num_bytes(columns: int, dtype: torch.dtype) -> int:
    """What a message about `columns` parameters takes, without what pads the last chunk and the last part."""
    return columns * dtype.itemsize + (float8.num_chunks(columns) if dtype == torch.float8_e4m3fn else 0)


def progress_(message: Tensor, rows: Tensor, anchor: Tensor, weights: Sequence[float]) -> None:
    """Overwrite `message` with Σ w_k Δ_k: each w_k (x_k − x₀) is rounded to the message's dtype, and so is the sum.

    Args:
        message: see empty_message.
        rows: shape (k, n), one row a worker.
        anchor: shape (n,): x₀ is what the rows' dtype holds of it, where the workers started.
        weights: of each row, see averaging.relative_weights. One of weight 0 is left out and may hold NaN.

    Raises:
        ValueError: a shape or the number of weights is another.
    """
    k, n = rows.shape
    length = float8.num_chunks(n) if _is_float8(message) else n
    if (len(message), tuple(anchor.shape), len(weights)) != (length, (n,), k):
        raise ValueError(
            f"message, anchor and weights must have {length}, {n} and {k} entries for rows of the shape {(k, n)}, "
            f"got {len(message)}, {tuple(anchor.shape)} and {len(weights)}"
        )
    counted = [(row, weight) for row, weight in zip(rows.unbind(), weights, strict=True) if weight > 0]
    if not counted:
        message.zero_()
        return
    for part in _parts(n):
        start, sent = _start(anchor[part], rows), _part_of(message, part)
        total = None
        for row, weight in counted:
            if weight == 1 and not _is_float8(message):
                torch.sub(row[part], start, out=sent)
            else:
                come = torch.sub(row[part], start)
                _write_(sent, come if weight == 1 else come.mul_(weight))
            if len(counted) > 1:
                own = _read(sent)[: len(start)]
                total = own.to(start.dtype) if total is None else total.add_(own)
        if total is not None:
            _write_(sent, total)


def add_up(messages: Tensor) -> Tensor:
    """The sum of messages, or of a part of each, shape (m, …): added in float32 in their order, and rounded once."""
    result = torch.empty_like(messages[0])
    at_once = _COLUMNS_AT_ONCE // float8.CHUNK if _is_float8(messages) else _COLUMNS_AT_ONCE
    for sent, *parts in zip(result.split(at_once), *(message.split(at_once) for message in messages), strict=True):
        total = _read(parts[0]).to(torch.float32)
        for part in parts[1:]:
            total.add_(_read(part))
        _write_(sent, total)
    return result


def mean_(mean: Tensor, message: Tensor, rows: Tensor, anchor: Tensor, total_weight: float) -> None:
    """Overwrite `mean` with x̄ = x₀ + Σ w_k Δ_k / Σ w_k.

    Args:
        mean: shape (n,), in the dtype that rows are accumulated in.
        message: what `progress_` wrote, summed over all processes.
        rows: shape (k, n), whose dtype tells x₀.
        anchor: shape (n,), as `progress_` had it.
        total_weight: Σ w_k, of all processes.
    """
    for part in _parts(len(mean)):
        start = _start(anchor[part], rows)
        come = _read(_part_of(message, part))[: len(start)]
        torch.add(start, come, alpha=1 / total_weight, out=mean[part])


def _start(anchor: Tensor, rows: Tensor) -> Tensor:
    """x₀ in the dtype that rows are accumulated in."""
    return anchor.to(rows.dtype).to(accumulate_dtype(rows.dtype))


def _parts(columns: int) -> Iterator[slice]:
    return (slice(first, first + _COLUMNS_AT_ONCE) for first in range(0, columns, _COLUMNS_AT_ONCE))


def _is_float8(message: Tensor) -> bool:
    return message.dtype == torch.uint8


def _part_of(message: Tensor, part: slice) -> Tensor:
    if _is_float8(message):
        return message[part.start // float8.CHUNK : part.stop // float8.CHUNK]
    return message[part]


def _write_(message: Tensor, values: Tensor) -> None:
    if _is_float8(message):
        float8.encode_(message, values)
    else:
        message.copy_(values)


def _read(message: Tensor) -> Tensor:
    """The values; of float8 those that fill the last chunk too."""
    return float8.decode(message) if _is_float8(message) else message
