"""Averaging and the outer step without a compiler: fast on CPUs, correct on every device.

Rows are worked on in blocks of columns that stay in a CPU's cache: from memory each row is read once and written
once.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlocal.reference import averaging as reference

_BLOCK_BYTES = 8 * 2**20
"""Of the rows and vectors of a block: on two cores with 1 MiB of L2 each and 32 MiB of L3, of 0.25 to 32 MiB the best
were 8 to 32. Smaller ones cost more calls than they save; larger ones need an L3 that nobody else uses."""

_MOST_IN_A_DOT = 128 * 1024
"""Columns: over 400,000 a dot in float32 is out by 2e-5."""

_MOST_ADDED = 8
"""More rows of equal weight are summed by one call: it reads them more slowly than additions do, and writes less."""


def finite_rows(rows: Tensor) -> Tensor:
    """See fastlocal.ops.averaging.finite_rows."""
    # A sum that is finite has no NaN and no infinity in it: one pass, and the exact test only in doubt.
    sums = rows.sum(dim=1, dtype=reference.accumulate_dtype(rows.dtype))
    return torch.ones_like(sums, dtype=torch.bool) if sums.isfinite().all() else reference.finite_rows(rows)


def average_(rows: Tensor, weights: Tensor, drift_parts: Tensor | None, mean: Tensor | None = None) -> None:
    """See fastlocal.ops.averaging.average_."""
    if drift_parts is not None:
        drift_parts.zero_()
    if rows.shape[0] == 1 and mean is None:  # is its own mean
        return
    for block, total, divisor in _sums(rows, weights, drift_parts, mean):
        mean_of_block = total if divisor is None else total.div_(divisor)
        others = [row for row in rows[:, block].unbind() if row.data_ptr() != total.data_ptr()]
        if len(others) == rows.shape[0]:
            rows[:, block] = mean_of_block
            continue
        for row in others:
            row.copy_(mean_of_block)


def outer_step_(
    rows: Tensor,
    anchor: Tensor,
    slow_momentum: Tensor,
    weights: Tensor,
    drift_parts: Tensor | None,
    mean: Tensor | None = None,
    *,
    direct: float,
    momentum: float,
    decay: float,
    gain: float,
) -> None:
    """See fastlocal.ops.averaging.outer_step_."""
    if drift_parts is not None:
        drift_parts.zero_()
    for block, total, divisor in _sums(rows, weights, drift_parts, mean):
        x, slow = anchor[block], slow_momentum[block]
        # The workers started from the anchor as their dtype holds it.
        delta = _less(x.to(rows.dtype).to(x.dtype), total, divisor, out=total)
        if gain == 1:
            torch.add(delta, slow, alpha=decay, out=slow)
        else:
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
    for block in _blocks(*rows.shape, at_most=rows.shape[1]):
        own = total[block]
        own.copy_(rows[counted[0], block])
        if shares[counted[0]] != 1:
            own.mul_(shares[counted[0]])
        for k in counted[1:]:
            own.add_(rows[k, block], alpha=shares[k])


def _sums(
    rows: Tensor, weights: Tensor, drift_parts: Tensor | None, known: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Blocks of columns with Σ w_k x_k and Σ w_k, or with a mean that is known and None; drifts go to drift_parts.

    The division is left to the caller's next operation, which takes it without a pass of its own. The caller must
    overwrite every row of a block before it asks for the next: a row may hold the sum meanwhile, or all of them
    x_k − x̄, which saves temporaries.
    """
    shares = weights.tolist()
    counted = [k for k, share in enumerate(shares) if share > 0]
    if not counted and known is None:
        return
    dtype = reference.accumulate_dtype(rows.dtype)
    measures = drift_parts is not None and (len(shares) > 1 or known is not None)
    weight = sum(shares) if len(counted) > 1 and known is None else 1.0
    # Times 1/3 in float32 the mean of three equal rows is above them: slow momentum would make it grow. A tensor,
    # because CUDA multiplies by the reciprocal of a number.
    divisor = None if weight == 1 else torch.tensor(weight, dtype=dtype, device=rows.device)
    sums_at_once = len(counted) == len(shares) > _MOST_ADDED and set(shares) == {1.0}
    blocks = _blocks(*rows.shape, at_most=_MOST_IN_A_DOT if measures else rows.shape[1])
    needs_space = known is None and (measures or sums_at_once)
    space = torch.empty(blocks[0].stop if needs_space else 0, dtype=dtype, device=rows.device)
    dots: list[list[Tensor]] = []
    for block in blocks:
        values = rows[:, block].to(dtype)
        if known is not None:
            total = known[block]
        else:
            total = space[: values.shape[1]] if needs_space else values[counted[0]]
            if sums_at_once:
                torch.sum(values, 0, out=total)
            else:
                _weighted_sum(values, shares, counted, total)
        if measures:
            # A dot a row: a norm along a dimension adds one by one and is out by 1e-5 over 200,000 columns.
            dots.append([torch.dot(row, row) for row in _less(values, total, divisor, out=values).unbind()])
        yield block, total, divisor
    if measures:
        assert drift_parts is not None
        squares = torch.stack([torch.stack(own) for own in dots]).sum(0, dtype=torch.float64)
        drift_parts[:, 0] = torch.where(weights > 0, squares, 0.0)


def _less(values: Tensor, total: Tensor, divisor: Tensor | None, *, out: Tensor) -> Tensor:
    """values − total/divisor, in one pass."""
    if divisor is None:
        return torch.sub(values, total, out=out)
    return torch.addcdiv(values, total, divisor, value=-1, out=out)


def _blocks(num_rows: int, columns: int, *, at_most: int) -> list[slice]:
    """Slices of equal length, but for the last: `num_rows` rows and three vectors fit _BLOCK_BYTES."""
    if not columns:
        return [slice(0, 0)]
    most = min(at_most, max(1024, _BLOCK_BYTES // (4 * (num_rows + 3))))
    length = -(-columns // -(-columns // most))
    return [slice(start, min(start + length, columns)) for start in range(0, columns, length)]


def _weighted_sum(values: Tensor, shares: list[float], counted: list[int], total: Tensor) -> None:
    """Σ w_k x_k over the rows that count, into `total`, which may be the first of them; w itself of a lone one.

    No matrix product: reduced-precision settings may apply to one.
    """
    first, *others = counted
    if not others:
        if total.data_ptr() != values[first].data_ptr():
            total.copy_(values[first])
        return
    if shares[first] == 1.0:
        torch.add(values[first], values[others[0]], alpha=shares[others[0]], out=total)
    else:
        torch.mul(values[first], shares[first], out=total).add_(values[others[0]], alpha=shares[others[0]])
    for k in others[1:]:
        total.add_(values[k], alpha=shares[k])
