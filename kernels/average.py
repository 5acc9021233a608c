"""Averaging workers: x̄ = Σ w_k x_k / Σ w_k, written back to every row.

Bytes a parameter (float32): finite_rows 4K; average_ 8K. One launch each, no temporary of the size of a row.
Sums run over the workers in order, partial sums are written to a buffer: the result is deterministic.

Reference: Stich, "Local SGD Converges Fast and Communicates Little", https://arxiv.org/abs/1805.09767
"""

import torch
import triton
import triton.language as tl

from fastlocal.kernels.device import on_device
from fastlocal.kernels.launch import BLOCK as BLOCK
from fastlocal.kernels.launch import NUM_WARPS as NUM_WARPS
from fastlocal.kernels.launch import launch_constants
from fastlocal.kernels.rounding import round_to


@triton.jit
def load_rows(rows_ptr, row_stride, weights_ptr, columns, mask, K: tl.constexpr):
    """The K rows of one block, as float32, their weighted sum and the sum of the weights.

    A row of weight 0 counts as zeros, so that it cannot spread its NaN; columns outside the mask are zeros.
    """
    row_stride = tl.cast(row_stride, tl.int64)
    total = tl.zeros(columns.shape, tl.float32)
    weight_sum = 0.0
    rows = ()
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + k)
        row = tl.load(rows_ptr + k * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        row = tl.where(weight > 0, row, 0.0)
        total += weight * row
        weight_sum += weight
        rows = rows + (row,)
    return rows, total, weight_sum


@triton.jit
def store_rows(rows_ptr, row_stride, columns, mask, values, K: tl.constexpr):
    """Write float32 values to every row, rounded to the dtype of the rows."""
    row_stride = tl.cast(row_stride, tl.int64)
    stored = round_to(values, rows_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        tl.store(rows_ptr + k * row_stride + columns, stored, mask=mask)


@triton.jit
def store_drift(parts_ptr, parts_stride, part, rows, mean, weights_ptr, K: tl.constexpr):
    """This block's share of ‖x_k − x̄‖² for each row; 0 for a row of weight 0."""
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + k)
        difference = rows[k] - mean
        squares = tl.where(weight > 0, tl.sum(difference * difference), 0.0)
        tl.store(parts_ptr + k * parts_stride + part, squares)


@triton.jit
def _average_kernel(
    rows_ptr,  # (k, n), row k at k·row_stride
    row_stride,  # elements
    weights_ptr,  # (k,) float32
    parts_ptr,  # (k, num_parts) float32, row k at k·parts_stride: this block's ‖x_k − x̄‖²
    parts_stride,  # elements
    mean_ptr,  # (n,) float32: the mean, if it is known
    n,  # columns
    K: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x̄ = Σ w_k x_k / Σ w_k to every row; reads 4K (4K + 4 with the mean), writes 4K bytes a column (float32)."""
    part = tl.program_id(0)
    columns = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    rows, total, weight_sum = load_rows(rows_ptr, row_stride, weights_ptr, columns, mask, K)
    if HAS_MEAN:
        total, weight_sum = tl.load(mean_ptr + columns, mask=mask, other=0.0), 1.0
    if weight_sum > 0:
        mean = tl.div_rn(total, tl.zeros_like(total) + weight_sum)
        store_drift(parts_ptr, parts_stride, part, rows, mean, weights_ptr, K)
        store_rows(rows_ptr, row_stride, columns, mask, mean, K)
    else:
        for k in tl.static_range(K):
            tl.store(parts_ptr + k * parts_stride + part, 0.0)


@triton.jit
def _finite_rows_kernel(
    rows_ptr,  # (k, n), row k at k·row_stride
    row_stride,  # elements
    finite_ptr,  # (k,) bool as int8, all 1 before the launch
    n,  # columns
    BLOCK: tl.constexpr,
):
    """finite_k ← 0 where a value of row k is not finite; reads 4 bytes an element (float32)."""
    k = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = k * tl.cast(row_stride, tl.int64)
    row = tl.load(rows_ptr + start + columns, mask=columns < n, other=0.0).to(tl.float32)
    # Every program that stores here stores the same 0, so the order does not matter.
    if tl.max((tl.abs(row) < float("inf")).to(tl.int32) ^ 1) > 0:
        tl.store(finite_ptr + k, 0)


def finite_rows(rows: torch.Tensor) -> torch.Tensor:
    """Bool, shape (k,): whether every value of the row is finite. rows: shape (k, n)."""
    k, n = rows.shape
    finite = torch.ones(k, dtype=torch.int8, device=rows.device)
    block, warps = launch_constants("finite_rows", rows.device, rows.dtype, k)
    with on_device(rows.device):
        _finite_rows_kernel[(triton.cdiv(n, block), k)](rows, rows.stride(0), finite, n, BLOCK=block, num_warps=warps)
    return finite.to(torch.bool)


def average_(
    rows: torch.Tensor, weights: torch.Tensor, drift_parts: torch.Tensor, mean: torch.Tensor | None = None
) -> None:
    """See fastlocal.reference.averaging.average_; one column of drift_parts for each BLOCK columns."""
    k, n = rows.shape
    _, warps = launch_constants("average", rows.device, rows.dtype, k)
    with on_device(rows.device):
        _average_kernel[(triton.cdiv(n, BLOCK),)](
            rows,
            rows.stride(0),
            weights,
            drift_parts,
            drift_parts.stride(0),
            rows if mean is None else mean,
            n,
            K=k,
            HAS_MEAN=mean is not None,
            BLOCK=BLOCK,
            num_warps=warps,
        )
