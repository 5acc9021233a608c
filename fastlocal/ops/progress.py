"""What workers send where messages have low precision: their progress since the anchor, not their parameters.

A parameter rounded to bfloat16 loses every step below 1/256 of it; progress that is rounded loses 1/256 of itself.
Plain PyTorch on every device: 10 bytes a float32 parameter and row before the message, 10 after it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlocal.reference.averaging import accumulate_dtype

_COLUMNS_AT_ONCE = 2**22
"""What is held besides the message stays small beside the model."""


def progress_(message: Tensor, rows: Tensor, anchor: Tensor, weights: Sequence[float]) -> None:
    """Overwrite `message` with Σ w_k Δ_k, each Δ_k = x_k − x₀ rounded to the message's dtype, and so is the sum.

    Args:
        message: shape (n,), in the dtype that is sent.
        rows: shape (k, n), one row a worker.
        anchor: shape (n,): x₀ is what the rows' dtype holds of it, where the workers started.
        weights: of each row. One of weight 0 is left out and may hold NaN.

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
        start, sent = anchor[part].to(rows.dtype).to(accumulate_dtype(rows.dtype)), message[part]
        (row, weight), *others = counted
        torch.sub(row[part], start, out=sent)
        if others or weight != 1:
            total = sent.to(start.dtype) * weight
            for row, weight in others:
                total.add_(torch.sub(row[part], start, out=sent), alpha=weight)
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
        start = anchor[part].to(rows.dtype).to(mean.dtype)
        torch.add(start, message[part], alpha=1 / total_weight, out=mean[part])


def _parts(columns: int) -> Iterator[slice]:
    return (slice(first, first + _COLUMNS_AT_ONCE) for first in range(0, columns, _COLUMNS_AT_ONCE))
