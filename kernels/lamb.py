"""LAMB's kernels: 40 bytes a float32 parameter in two phases, or both phases in one launch, toward 28.

Two phases that recompute the update from the moments need no temporary. In one launch (`step_kernel`) phase 2 of a
tensor follows its phase 1 so closely that it finds the moments and weights in L2.

Coefficients that depend on the step count, the learning rate, the loss scale or the clip are computed on the
device, one row a tensor, by `prepare_kernel`: a step never waits for the host.
"""

import triton
import triton.language as tl

from fastlocal.kernels.lamb_chunks import COLUMNS as COLUMNS
from fastlocal.kernels.lamb_chunks import (
    INVERSE1,
    INVERSE2,
    MASTER,
    MULTIPLIER,
    SHRINK,
    STEP_SIZE,
    WIDTH,
    moments_chunk,
    multiply_by_ratio,
    weights_chunk,
)
from fastlocal.kernels.lamb_chunks import G as G
from fastlocal.kernels.trust_ratio_common import RATIO_BLOCK, gradient_multiplier
from fastlocal.kernels.trust_ratio_queue import announce, arrive, take_ticket, wait_for

TENSORS = 128  # that one program prepares


@triton.jit
def prepare_kernel(
    pointers,  # (5 or 6, num_tensors) int64: P, G, M, V, masters if any, step counts
    coefficients,  # (num_tensors, COLUMNS) float32, written
    num_tensors,
    lr,  # () float32
    norm,  # () float32, ‖G‖ as stored
    grad_scale,  # () float32
    found_inf,  # () float32
    log_beta1,
    log_beta2,
    weight_decay,
    max_norm,  # what ‖G‖ is bounded by, where HAS_NORM
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    CORRECTION: tl.constexpr,  # "moments", "step" or "none"
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    TENSORS: tl.constexpr,  # that one program serves
):
    """Counts the step of TENSORS tensors and writes their coefficients."""
    tensors = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mask = tensors < num_tensors
    STEP: tl.constexpr = MASTER + 1 if HAS_MASTER else MASTER
    addresses = tl.load(pointers + STEP * num_tensors + tensors, mask=mask, other=0)
    steps = addresses.to(tl.pointer_type(tl.float32))
    count = tl.load(steps, mask=mask, other=0.0)
    if HAS_FOUND:
        count += tl.where(tl.load(found_inf) != 0, 0.0, 1.0)
    else:
        count += 1.0
    tl.store(steps, count, mask=mask)

    # In float32, 1 − 0.999^t would lose four digits at t = 1. A count of 0 is a first step that found_inf
    # skips.
    t = tl.maximum(count, 1.0).to(tl.float64)
    correction1 = 1.0 - tl.exp(t * log_beta1)
    root2 = tl.sqrt(1.0 - tl.exp(t * log_beta2))
    rate = tl.load(lr)
    step_size = tl.zeros([TENSORS], dtype=tl.float32) + rate
    inverse1 = tl.full([TENSORS], 1.0, dtype=tl.float32)
    inverse2 = tl.full([TENSORS], 1.0, dtype=tl.float32)
    if CORRECTION == "moments":
        inverse1 = (1.0 / correction1).to(tl.float32)
        inverse2 = (1.0 / root2).to(tl.float32)
    elif CORRECTION == "step":
        step_size = (rate * root2 / correction1).to(tl.float32)
    multiplier = gradient_multiplier(norm, max_norm, grad_scale, HAS_NORM, HAS_SCALE)
    if MAXIMIZE:
        multiplier = -multiplier
    shrink = 1.0
    if DECOUPLED:
        shrink = 1.0 - rate * weight_decay

    row = coefficients + tensors * WIDTH
    tl.store(row + MULTIPLIER, tl.zeros([TENSORS], dtype=tl.float32) + multiplier, mask=mask)
    tl.store(row + INVERSE1, inverse1, mask=mask)
    tl.store(row + INVERSE2, inverse2, mask=mask)
    tl.store(row + SHRINK, tl.zeros([TENSORS], dtype=tl.float32) + shrink, mask=mask)
    tl.store(row + STEP_SIZE, step_size, mask=mask)


@triton.jit
def moments_kernel(
    pointers,  # (5 or 6, num_tensors) int64: P, G, M, V, masters if any, step counts
    sizes,  # (num_tensors,) int64, elements
    chunks,  # (num_chunks, 2) int32
    coefficients,  # (num_tensors, COLUMNS) float32
    partials,  # (num_chunks, 2) float32, written: Σw², Σu²
    num_tensors,
    found_inf,  # () float32
    beta1,
    beta2,
    beta3,  # of the gradient in m
    beta4,  # of its square in v
    eps,
    l2_decay,  # λ where decay is "l2", else 0
    update_decay,  # λ where decay is "update", else 0
    HAS_FOUND: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 1. Reads 16 bytes and writes 8 a float32 parameter."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tables = pointers, sizes, chunks, num_tensors
    numbers = beta1, beta2, beta3, beta4, eps, l2_decay, update_decay
    program = tl.program_id(0)
    moments_chunk(
        program, tables, coefficients, numbers, partials, HAS_MASTER, P_DTYPE, G_DTYPE, ALIGNED, CHUNK, BLOCK
    )


@triton.jit
def ratio_kernel(
    partials,  # (num_chunks, 2) float32
    first_chunk,  # (num_tensors + 1,) int32
    adapts,  # (num_tensors,) int32
    coefficients,  # (num_tensors, COLUMNS) float32, STEP_SIZE multiplied by the ratio
    found_inf,  # () float32
    low,  # least trust ratio, where HAS_CLIP
    high,  # greatest
    HAS_FOUND: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Between the phases, one program a tensor."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    multiply_by_ratio(tl.program_id(0), partials, first_chunk, adapts, coefficients, low, high, HAS_CLIP, BLOCK)


@triton.jit
def weights_kernel(
    pointers,  # (5 or 6, num_tensors) int64: P, G, M, V, masters if any, step counts
    sizes,  # (num_tensors,) int64
    chunks,  # (num_chunks, 2) int32
    coefficients,  # (num_tensors, COLUMNS) float32
    num_tensors,
    found_inf,  # () float32
    eps,
    update_decay,  # λ where decay is "update", else 0
    HAS_FOUND: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 2, last chunk first: what phase 1 touched last is still in L2. Reads 12 bytes and writes 4."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tables = pointers, sizes, chunks, num_tensors
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    weights_chunk(program, tables, coefficients, eps, update_decay, HAS_MASTER, P_DTYPE, ALIGNED, CHUNK, BLOCK)


@triton.jit
def step_kernel(
    pointers,  # (5 or 6, num_tensors) int64: P, G, M, V, masters if any, step counts
    sizes,  # (num_tensors,) int64
    chunks,  # (num_chunks, 2) int32
    first_chunk,  # (num_tensors + 1,) int32
    adapts,  # (num_tensors,) int32
    coefficients,  # (num_tensors, COLUMNS) float32, STEP_SIZE multiplied by the ratio
    partials,  # (num_chunks, 2) float32, written: Σw², Σu²
    queue,  # (2·num_chunks,) int32
    counters,  # (1 + 2·num_tensors,) int32, zeros
    num_tensors,
    found_inf,  # () float32
    beta1,
    beta2,
    beta3,  # of the gradient in m
    beta4,  # of its square in v
    eps,
    l2_decay,  # λ where decay is "l2", else 0
    update_decay,  # λ where decay is "update", else 0
    low,  # least trust ratio, where HAS_CLIP
    high,  # greatest
    HAS_FOUND: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both phases, two programs a chunk. Reads 28 bytes and writes 12; 12 of those read may be in L2."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tables = pointers, sizes, chunks, num_tensors
    numbers = beta1, beta2, beta3, beta4, eps, l2_decay, update_decay
    program, tensor, second = take_ticket(counters, queue, chunks)
    if second:
        wait_for(counters, tensor, num_tensors)
        weights_chunk(program, tables, coefficients, eps, update_decay, HAS_MASTER, P_DTYPE, ALIGNED, CHUNK, BLOCK)
    else:
        moments_chunk(
            program, tables, coefficients, numbers, partials, HAS_MASTER, P_DTYPE, G_DTYPE, ALIGNED, CHUNK, BLOCK
        )
        if arrive(counters, tensor, first_chunk):
            multiply_by_ratio(tensor, partials, first_chunk, adapts, coefficients, low, high, HAS_CLIP, RATIO_BLOCK)
            announce(counters, tensor, num_tensors)
