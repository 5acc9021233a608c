"""What workers send where messages have low precision: their progress since the anchor, not their parameters.

A parameter rounded to bfloat16 loses every step below 1/256 of it; progress that is rounded loses 1/256 of itself.
Plain PyTorch on every device: for a lone float32 row 10 bytes a parameter before the message, 10 after it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlocal.reference.averaging import accumulate_dtype

_COLUMNS_AT_ONCE = 2**22
"""The temporaries of progress_ stay small beside the model."""


def progress_(message: Tensor, rows: Tensor, anchor: Tensor, weights: Sequence[float]) -> None:
    """Overwrite `message` with Σ w_k Δ_k: each w_k (x_k − x₀) is rounded to the message's dtype, and so is the sum.

    Args:
        message: shape (n,), in the dtype that is sent.
        rows: shape (k, n), one row a worker.
        anchor: shape (n,): x₀ is what the rows' dtype holds of it, where the workers started.
        weights: of each row, see averaging.relative_weights. One of weight 0 is left out and may hold NaN.

    Raises:
        ValueError: a shape or the number of weights is another.
    """
    k, n = rows.shape
    if (tuple(message.shape), tuple(anchor.shape), len(weights)) != ((n,), (n,), k):
        raise ValueError(
            f"message, anchor and weights must have {n}, {n} and {k} entries for rows of the shape {(k, n)}, "
            f"got {tuple(message.shape)}, {tuple(anchor.shape)} and {len(weights)}"
        )
    counted = [(row, weight) for row, weight in zip(rows.unbind(), weights, strict=True) if weight > 0]
    if not counted:
        message.zero_()
        return
    for part in _parts(n):
        start, sent = _start(anchor[part], rows), message[part]
        total = None
        for row, weight in counted:
            if weight == 1:
                torch.sub(row[part], start, out=sent)
            else:
                sent.copy_(torch.sub(row[part], start).mul_(weight))
            if len(counted) > 1:
                total = sent.to(start.dtype) if total is None else total.add_(sent)
        if total is not None:
            sent.copy_(total)


def mean_(mean: Tensor, message: Tensor, rows: Tensor, anchor: Tensor, total_weight: float) -> None:
    """Overwrite `mean` with x̄ = x₀ + Σ w_k Δ_k / Σ w_k.

    Args:
        mean: shape (n,), in the dtype that rows are accumulated in.
        message: shape (n,), what `progress_` wrote, summed over all processes.
        rows: shape (k, n), whose dtype tells x₀.
        anchor: shape (n,), as `progress_` had it.
        total_weight: Σ w_k, of all processes.
    """
    for part in _parts(len(mean)):
        torch.add(_start(anchor[part], rows), message[part], alpha=1 / total_weight, out=mean[part])


def _start(anchor: Tensor, rows: Tensor) -> Tensor:
    """x₀ in the dtype that rows are accumulated in."""
    return anchor.to(rows.dtype).to(accumulate_dtype(rows.dtype))


def _parts(columns: int) -> Iterator[slice]:
    return (slice(first, first + _COLUMNS_AT_ONCE) for first in range(0, columns, _COLUMNS_AT_ONCE))
