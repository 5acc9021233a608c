"""Averaging workers and the outer step, in plain PyTorch.

`rows` is always (k, n): one row a worker, one column a parameter. Sums run over the workers in order
and in float32 (float64 for float64 rows), whatever the dtype of the rows.

References:
    LocalSGD: Stich, "Local SGD Converges Fast and Communicates Little", 2019, https://arxiv.org/abs/1805.09767
    SlowMo: Wang et al., algorithm 1, 2020, https://arxiv.org/abs/1910.00643
    DiLoCo: Douillard et al., algorithm 1, 2023, https://arxiv.org/abs/2311.08105
"""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` are summed, and in which their anchor is kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite_rows(rows: Tensor) -> Tensor:
    """Bool, shape (k,): whether every value of the row is finite."""
    return rows.isfinite().all(dim=1)


def weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """x̄ = Σ w_k x_k / Σ w_k, shape (n,). A row of weight 0 is not looked at, so it may hold NaN."""
    dtype = accumulate_dtype(rows.dtype)
    total = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
    for row, weight in zip(rows, weights.to(dtype), strict=True):
        total += torch.where(weight > 0, weight * row.to(dtype), 0.0)
    return total / weights.to(dtype).sum()


def mean_of_progress(rows: Tensor, anchor: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """x̄ = x₀ + Σ w_k Δ_k / Σ w_k, shape (n,), of workers that send how far they came, Δ_k = x_k − x₀.

    x₀ is the anchor as the rows' dtype holds it. Each w_k Δ_k is rounded to `dtype`, and so is their sum: to bfloat16
    as torch does, to float8_e4m3fn as rounded_to_float8 does.
    """
    wide = accumulate_dtype(rows.dtype)
    start = anchor.to(rows.dtype).to(wide)
    total = torch.zeros_like(start)
    for row, weight in zip(rows, weights.to(wide), strict=True):
        total += _rounded(torch.where(weight > 0, weight * (row.to(wide) - start), 0.0), dtype)
    return start + _rounded(total, dtype) / weights.to(wide).sum()


def rounded_to_float8(values: Tensor) -> Tensor:
    """Values of float32, rounded to 4 significant bits, ties to even, in chunks of 1,024 that share a power of two.

    With the least power of two s for which a chunk is within ±448 s, values below s/64 are rounded to multiples of
    s/512. A chunk with a value that is not finite becomes NaN.
    """
    if not len(values):
        return values
    chunks = []
    for chunk in values.float().double().split(1024):
        largest = chunk.abs().max()
        if not largest.isfinite():
            chunks.append(torch.full_like(chunk, torch.nan))
            continue
        # A logarithm's last bit may be off; frexp is exact: mantissa · 2^exponent, mantissa in [0.5, 1).
        mantissa, exponent = torch.frexp(largest / 448)
        scale = _power_of_two(torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126))
        _, exponent = torch.frexp(chunk.abs() / scale)
        step = _power_of_two((exponent - 1).clamp(min=-6) - 3) * scale
        chunks.append(torch.round(chunk / step) * step)
    return torch.cat(chunks).to(values.dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, by its bits: CUDA computes 2^-12 one too low in the last place."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        return rounded_to_float8(values)
    return values.to(dtype).to(values.dtype)


def squared_drift(rows: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """‖x_k − x̄‖², shape (k,); 0 for a row of weight 0."""
    squares = (rows.to(mean.dtype) - mean).square().sum(dim=1)
    return torch.where(weights > 0, squares, 0.0)


def average_(rows: Tensor, weights: Tensor, drift_parts: Tensor | None, mean: Tensor | None = None) -> None:
    """Overwrite every row with the weighted mean of all.

    Args:
        rows: shape (k, n), one row a worker.
        weights: shape (k,), not negative. With nothing but zeros, nothing is written.
        drift_parts: shape (k, parts), overwritten; its sum over `parts` is ‖x_k − x̄‖². None: it is not measured.
        mean: shape (n,), x̄ where it is known already; then it is written whatever the weights are.
    """
    if drift_parts is not None:
        drift_parts.zero_()
    if mean is None:
        if not weights.any():
            return
        mean = weighted_mean(rows, weights)
    if drift_parts is not None:
        drift_parts[:, 0] = squared_drift(rows, mean, weights)
    rows.copy_(mean.expand_as(rows))


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
    """Step from the anchor towards the mean with slow momentum; every row and the anchor end there.

    Δ = x₀ − x̄;  v ← decay·v + gain·Δ;  x ← anchor − (direct·Δ + momentum·v)

    The four coefficients cover SlowMo (0, α, β·γ_t/γ_{t−1}, 1), Nesterov as DiLoCo uses it
    (α, α·β, β, 1), and a pause in which the slow momentum is neither applied nor lost (α, 0, 1, 0).

    Args:
        rows: shape (k, n), one row a worker.
        anchor: shape (n,), float32 (float64 for float64 rows): the parameters after the last sync.
        slow_momentum: shape (n,), like anchor: v.
        weights: shape (k,), not negative. With nothing but zeros, nothing is written.
        drift_parts: shape (k, parts), overwritten; its sum over `parts` is ‖x_k − x̄‖². None: it is not measured.
        mean: shape (n,), x̄ where it is known already; then the step is taken whatever the weights are.
        direct: weight of Δ in the step.
        momentum: weight of the new v in the step.
        decay: what is kept of the old v.
        gain: weight of Δ in the new v.
    """
    if drift_parts is not None:
        drift_parts.zero_()
    if mean is None:
        if not weights.any():
            return
        mean = weighted_mean(rows, weights)
    if drift_parts is not None:
        drift_parts[:, 0] = squared_drift(rows, mean, weights)
    # The workers started from x₀, the anchor as their dtype holds it: what was rounded off is kept in the anchor.
    delta = anchor.to(rows.dtype).to(anchor.dtype) - mean
    slow_momentum.mul_(decay).add_(gain * delta)
    anchor.sub_(direct * delta + momentum * slow_momentum)
    rows.copy_(anchor.expand_as(rows))
