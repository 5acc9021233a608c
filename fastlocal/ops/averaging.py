"""Averaging workers' rows and stepping from the anchor: checks, then one implementation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.ops import averaging_portable as portable
from fastlocal.ops.implementation import Implementation, choose
from fastlocal.reference import averaging as reference
from fastlocal.reference.averaging import accumulate_dtype as accumulate_dtype

PART = 1024
"""Columns behind one column of `drift_parts`: the block of the kernels, which a test compares it with."""

_MOST_UNROLLED = 32
"""The kernels hold one block of every row at once: 32 rows compile in two seconds, 64 in fifteen."""


def relative_weights(weights: Sequence[float]) -> list[float]:
    """The weights over a power of two, the heaviest at most 1: float32 holds them. Weights that are alike become 1.

    Neither rounds anything that is multiplied by them. One below 2⁻¹²⁶ of the heaviest counts as that.
    """
    heaviest = max(weights)
    if min(weights) == heaviest:
        return [1.0] * len(weights)
    exponent = math.frexp(heaviest)[1]
    return [max(math.ldexp(weight, -exponent), 2.0**-126) if weight else 0.0 for weight in weights]


def num_drift_parts(columns: int) -> int:
    """How many columns `drift_parts` needs for rows of `columns` columns."""
    return max(1, -(-columns // PART))


def finite_rows(rows: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """Bool, shape (k,): whether every value of the row is finite.

    Args:
        rows: shape (k, n), one row a worker; the columns of a row lie side by side.
        impl: which implementation runs.

    Raises:
        ValueError: rows has another shape or layout.
        RuntimeError: the implementation asked for cannot run here.
    """
    _check_rows(rows)
    if rows.numel() == 0:
        return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    match _choose(impl, rows):
        case "triton":
            from fastlocal.kernels.average import finite_rows as kernel

            return kernel(rows)
        case "portable":
            return portable.finite_rows(rows)
        case _:
            return reference.finite_rows(rows)


def weighted_sum_(total: Tensor, rows: Tensor, shares: Sequence[float]) -> None:
    """Overwrite `total` with Σ share_k x_k: this process's part of a sum over several processes.

    Args:
        total: shape (n,), of the dtype in which the rows are accumulated.
        rows: shape (k, n), one row a worker.
        shares: the weight of each row, not negative. A row of share 0 is left out and may hold NaN.

    Raises:
        ValueError: an argument has another shape, dtype, device or layout.
    """
    _check_rows(rows)
    _check("total", total, rows, (rows.shape[1],), accumulate_dtype(rows.dtype))
    if len(shares) != rows.shape[0]:
        raise ValueError(f"shares must have one number for each of {rows.shape[0]} rows, got {len(shares)}")
    portable.weighted_sum_(total, rows, shares)


def average_(
    rows: Tensor,
    weights: Tensor,
    drift_parts: Tensor | None,
    mean: Tensor | None = None,
    *,
    impl: Implementation = "auto",
) -> None:
    """Overwrite every row with x̄ = Σ w_k x_k / Σ w_k; 8K bytes a parameter for K float32 rows.

    Args:
        rows: shape (k, n), one row a worker; the columns of a row lie side by side.
        weights: shape (k,), float32, not negative. A row of weight 0 is left out and may hold NaN;
            with nothing but zeros, nothing is written.
        drift_parts: shape (k, num_drift_parts(n)), float32, overwritten: its sum over dim 1 is ‖x_k − x̄‖². None
            where nobody reads it, which saves a CPU two passes.
        mean: shape (n,), in the accumulating dtype: x̄ where it is known already, because other processes have a
            share in it. It is written whatever the weights are, which then only say whose drift is measured; it
            may be overwritten.
        impl: which implementation runs.

    Raises:
        ValueError: an argument has another shape, dtype, device or layout.
        RuntimeError: the implementation asked for cannot run here.
    """
    _check_rows(rows)
    _check_companions(rows, weights, drift_parts, mean)
    if rows.shape[1] == 0:
        if drift_parts is not None:
            drift_parts.zero_()
        return
    match _choose(impl, rows):
        case "triton":
            from fastlocal.kernels.average import average_ as kernel

            kernel(rows, weights, _or_new_parts(drift_parts, rows), mean)
        case "portable":
            portable.average_(rows, weights, drift_parts, mean)
        case _:
            reference.average_(rows, weights, drift_parts, mean)


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
    impl: Implementation = "auto",
) -> None:
    """Δ = x₀ − x̄; v ← decay·v + gain·Δ; x ← anchor − (direct·Δ + momentum·v); rows and anchor become x.

    x₀ is the anchor as the rows' dtype holds it, which is where the workers started.

    One launch, 8K + 16 bytes a parameter for K float32 rows.

    Args:
        rows: shape (k, n), one row a worker; the columns of a row lie side by side.
        anchor: shape (n,), float32 (float64 for float64 rows): the parameters after the last sync.
        slow_momentum: shape (n,), like anchor: v.
        weights: shape (k,), float32, not negative. A row of weight 0 is left out and may hold NaN;
            with nothing but zeros, nothing is written.
        drift_parts: shape (k, num_drift_parts(n)), float32, overwritten: its sum over dim 1 is ‖x_k − x̄‖². None
            where nobody reads it, which saves a CPU two passes.
        mean: shape (n,), in the accumulating dtype: x̄ where it is known already, because other processes have a
            share in it. It is written whatever the weights are, which then only say whose drift is measured; it
            may be overwritten.
        direct: weight of Δ in the step.
        momentum: weight of the new v in the step.
        decay: what is kept of the old v.
        gain: weight of Δ in the new v.
        impl: which implementation runs.

    Raises:
        ValueError: an argument has another shape, dtype, device or layout.
        RuntimeError: the implementation asked for cannot run here.

    References:
        Wang et al., `SlowMo <https://arxiv.org/abs/1910.00643>`_, algorithm 1;
        Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, algorithm 1.
    """
    _check_rows(rows)
    _check_companions(rows, weights, drift_parts, mean)
    for name, tensor in (("anchor", anchor), ("slow_momentum", slow_momentum)):
        _check(name, tensor, rows, (rows.shape[1],), accumulate_dtype(rows.dtype))
    coefficients = {"direct": direct, "momentum": momentum, "decay": decay, "gain": gain}
    if rows.shape[1] == 0:
        if drift_parts is not None:
            drift_parts.zero_()
        return
    match _choose(impl, rows):
        case "triton":
            from fastlocal.kernels.slowmo import outer_step_ as kernel

            parts = _or_new_parts(drift_parts, rows)
            kernel(rows, anchor, slow_momentum, weights, parts, mean, **coefficients)
        case "portable":
            portable.outer_step_(rows, anchor, slow_momentum, weights, drift_parts, mean, **coefficients)
        case _:
            reference.outer_step_(rows, anchor, slow_momentum, weights, drift_parts, mean, **coefficients)


def _or_new_parts(drift_parts: Tensor | None, rows: Tensor) -> Tensor:
    """The kernels have every row at hand and measure the drift in any case."""
    if drift_parts is not None:
        return drift_parts
    return torch.empty(rows.shape[0], num_drift_parts(rows.shape[1]), dtype=torch.float32, device=rows.device)


def _choose(impl: Implementation, rows: Tensor) -> Implementation:
    if impl == "auto" and rows.shape[0] > _MOST_UNROLLED:
        return "portable"
    return choose(impl, rows.device, rows.dtype)


def _check_rows(rows: Tensor) -> None:
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(f"rows must have the shape (workers, parameters), got {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"rows must be floating-point, got {rows.dtype}")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"the columns of rows must lie side by side (stride 1), got stride {rows.stride(1)}")


def _check_companions(rows: Tensor, weights: Tensor, drift_parts: Tensor | None, mean: Tensor | None) -> None:
    if mean is not None:
        _check("mean", mean, rows, (rows.shape[1],), accumulate_dtype(rows.dtype))
    _check("weights", weights, rows, (rows.shape[0],), torch.float32)
    if drift_parts is not None:
        _check("drift_parts", drift_parts, rows, (rows.shape[0], num_drift_parts(rows.shape[1])), torch.float32)


def _check(name: str, tensor: Tensor, rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != rows.device:
        raise ValueError(f"{name} must be on the device of rows, {rows.device}, got {tensor.device}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
