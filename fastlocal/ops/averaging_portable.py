"""Averaging and the outer step without a compiler: fast on CPUs, correct on every device.

Rows are worked on in blocks of columns that stay in a CPU's cache: from memory each row is read once and written
once.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlocal.reference import averaging as reference

_COLUMNS = 64 * 1024
"""Of a block: 256 KiB a float32 row, the best of 16K to 128K columns for 0.8M and 11M parameters on 2 cores."""


def finite_rows(rows: Tensor) -> Tensor:
    """See fastlocal.ops.averaging.finite_rows."""
    # A sum that is finite has no NaN and no infinity in it: one pass, and the exact test only in doubt.
    sums = rows.sum(dim=1, dtype=reference.accumulate_dtype(rows.dtype))
    return torch.ones_like(sums, dtype=torch.bool) if sums.isfinite().all() else reference.finite_rows(rows)


def average_(rows: Tensor, weights: Tensor, drift_parts: Tensor, mean: Tensor | None = None) -> None:
    """See fastlocal.ops.averaging.average_."""
    drift_parts.zero_()
    for block, own in _means(rows, weights, drift_parts, mean):
        rows[:, block] = own


def outer_step_(
    rows: Tensor,
    anchor: Tensor,
    slow_momentum: Tensor,
    weights: Tensor,
    drift_parts: Tensor,
    mean: Tensor | None = None,
    *,
    direct: float,
    momentum: float,
    decay: float,
    gain: float,
) -> None:
    """See fastlocal.ops.averaging.outer_step_."""
    drift_parts.zero_()
    for block, own in _means(rows, weights, drift_parts, mean):
        x, slow = anchor[block], slow_momentum[block]
        # The workers started from the anchor as their dtype holds it.
        delta = torch.sub(x.to(rows.dtype).to(x.dtype), own, out=own)
        slow.mul_(decay).add_(delta, alpha=gain)
        if direct:
            x.sub_(delta, alpha=direct)
        if momentum:
            x.sub_(slow, alpha=momentum)
        rows[:, block] = x


def weighted_sum_(total: Tensor, rows: Tensor, shares: Sequence[float]) -> None:
    """See fastlocal.ops.averaging.weighted_sum_."""
    counted = [k for k, share in enumerate(shares) if share > 0]
    if not counted:
        total.zero_()
        return
    for start in range(0, rows.shape[1], _COLUMNS):
        block = slice(start, start + _COLUMNS)
        own = total[block]
        own.copy_(rows[counted[0], block]).mul_(shares[counted[0]])
        for k in counted[1:]:
            own.add_(rows[k, block], alpha=shares[k])


def _means(
    rows: Tensor, weights: Tensor, drift_parts: Tensor, known: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns with their weighted mean, or the one that is known; each row's ‖x_k − x̄‖² goes to the
    first column of drift_parts.

    No matrix product: autocast and reduced-precision settings would apply to it.
    """
    shares = weights.tolist()
    counted = [k for k, share in enumerate(shares) if share > 0]
    if not counted and known is None:
        return
    dtype = reference.accumulate_dtype(rows.dtype)
    total = sum(shares)
    drift = torch.zeros(len(counted), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _COLUMNS):
        block = slice(start, start + _COLUMNS)
        parts = [rows[k, block].to(dtype) for k in counted]
        if known is not None:
            mean = known[block]
        else:
            mean = parts[0] * shares[counted[0]]
            for k, part in zip(counted[1:], parts[1:], strict=True):
                mean.add_(part, alpha=shares[k])
            mean.div_(total)
        for k, difference in enumerate(part - mean for part in parts):
            drift[k] += torch.dot(difference, difference)
        yield block, mean
    drift_parts[counted, 0] = drift.to(drift_parts.dtype)
