"""The outer step: mean, slow momentum, anchor, write-back and drift in one launch.

Bytes a parameter (float32): 8K + 16 for K rows, so 24 for one row a process. No temporary, deterministic.

Reference: Wang et al., "SlowMo", algorithm 1, https://arxiv.org/abs/1910.00643. The form used here has no
division by the learning rate: dividing first loses about four digits in float32.
"""

import torch
import triton
import triton.language as tl

from fastlocal.kernels.average import load_rows, store_drift, store_rows
from fastlocal.kernels.device import on_device
from fastlocal.kernels.launch import BLOCK, launch_constants
from fastlocal.kernels.rounding import round_to


@triton.jit
def _outer_step_kernel(
    rows_ptr,  # (k, n), row k at k·row_stride
    row_stride,  # elements
    anchor_ptr,  # (n,) float32: the parameters after the last sync
    slow_ptr,  # (n,) float32: slow momentum v
    weights_ptr,  # (k,) float32
    parts_ptr,  # (k, num_parts) float32, row k at k·parts_stride: this block's ‖x_k − x̄‖²
    parts_stride,  # elements
    mean_ptr,  # (n,) float32: the mean, if it is known
    n,  # columns
    direct,  # weight of Δ in the step
    momentum,  # weight of the new v in the step
    decay,  # what is kept of the old v
    gain,  # weight of Δ in the new v
    K: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Δ = x₀ − x̄; v ← decay·v + gain·Δ; x ← anchor − (direct·Δ + momentum·v); rows, anchor ← x."""
    part = tl.program_id(0)
    columns = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    rows, total, weight_sum = load_rows(rows_ptr, row_stride, weights_ptr, columns, mask, K)
    if HAS_MEAN:
        total, weight_sum = tl.load(mean_ptr + columns, mask=mask, other=0.0), 1.0
    if weight_sum > 0:
        mean = tl.div_rn(total, tl.zeros_like(total) + weight_sum)
        store_drift(parts_ptr, parts_stride, part, rows, mean, weights_ptr, K)
        anchor = tl.load(anchor_ptr + columns, mask=mask, other=0.0)
        slow = tl.load(slow_ptr + columns, mask=mask, other=0.0)
        # The workers started from the anchor as their dtype holds it.
        delta = round_to(anchor, rows_ptr.dtype.element_ty).to(tl.float32) - mean
        slow = decay * slow + gain * delta
        anchor -= direct * delta + momentum * slow
        tl.store(slow_ptr + columns, slow, mask=mask)
        tl.store(anchor_ptr + columns, anchor, mask=mask)
        store_rows(rows_ptr, row_stride, columns, mask, anchor, K)
    else:
        for k in tl.static_range(K):
            tl.store(parts_ptr + k * parts_stride + part, 0.0)


def outer_step_(
    rows: torch.Tensor,
    anchor: torch.Tensor,
    slow_momentum: torch.Tensor,
    weights: torch.Tensor,
    drift_parts: torch.Tensor,
    mean: torch.Tensor | None = None,
    *,
    direct: float,
    momentum: float,
    decay: float,
    gain: float,
) -> None:
    """See fastlocal.reference.averaging.outer_step_; one column of drift_parts for each BLOCK columns."""
    k, n = rows.shape
    _, warps = launch_constants("outer_step", rows.device, rows.dtype, k)
    with on_device(rows.device):
        _outer_step_kernel[(triton.cdiv(n, BLOCK),)](
            rows,
            rows.stride(0),
            anchor,
            slow_momentum,
            weights,
            drift_parts,
            drift_parts.stride(0),
            rows if mean is None else mean,
            n,
            direct,
            momentum,
            decay,
            gain,
            K=k,
            HAS_MEAN=mean is not None,
            BLOCK=BLOCK,
            num_warps=warps,
        )
