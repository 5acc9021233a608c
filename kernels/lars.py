"""LARS's kernels: 28 bytes a float32 parameter in two phases, or both phases in one launch, toward 20.

Gradients stay untouched and there is no temporary. In one launch (`step_kernel`) phase 2 of a tensor follows its
phase 1 so closely that it finds gradients and weights in L2. Coefficients are computed on the device, as for LAMB.
"""

import triton
import triton.language as tl

from fastlocal.kernels.lars_chunks import COLUMNS as COLUMNS
from fastlocal.kernels.lars_chunks import norms_chunk, prepare_tensor, weights_chunk
from fastlocal.kernels.trust_ratio_common import RATIO_BLOCK
from fastlocal.kernels.trust_ratio_queue import announce, arrive, take_ticket, wait_for


@triton.jit
def prepare_kernel(
    pointers,  # (rows, num_tensors) int64
    partials,  # (num_chunks, 2) float32
    first_chunk,  # (num_tensors + 1,) int32
    adapts,  # (num_tensors,) int32
    coefficients,  # (num_tensors, COLUMNS) float32, written
    num_tensors,
    lr,  # () float32
    grad_scale,  # () float32
    found_inf,  # () float32
    weight_decay,
    trust_coefficient,
    eps,
    kept,  # 1 − dampening
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    COUNTED: tl.constexpr,  # dampening, which the first step does without
    STEP: tl.constexpr,  # row of the step counts
    JOINT: tl.constexpr,
    CLIP: tl.constexpr,
    LR_IN_BUFFER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Between the phases, one program a tensor."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    numbers = lr, grad_scale, weight_decay, trust_coefficient, eps, kept
    prepare_tensor(
        tl.program_id(0), pointers, num_tensors, coefficients, partials, first_chunk, adapts, numbers, HAS_SCALE,
        COUNTED, STEP, JOINT, CLIP, LR_IN_BUFFER, MAXIMIZE, BLOCK,
    )  # fmt: skip


@triton.jit
def norms_kernel(
    pointers,  # (rows, num_tensors) int64
    sizes,  # (num_tensors,) int64, elements
    chunks,  # (num_chunks, 2) int32
    adapts,  # (num_tensors,) int32
    partials,  # (num_chunks, 2) float32, written: Σw², Σg² or Σ(g + λw)²
    num_tensors,
    grad_scale,  # () float32
    found_inf,  # () float32
    weight_decay,
    HAS_FOUND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    JOINT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASTER: tl.constexpr,  # row of the master weights; P where there are none
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 1. Reads 8 bytes a float32 parameter."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tables = pointers, sizes, chunks, num_tensors
    norms_chunk(
        tl.program_id(0), tables, adapts, partials, grad_scale, weight_decay, HAS_SCALE, JOINT, MAXIMIZE, MASTER,
        P_DTYPE, G_DTYPE, ALIGNED, CHUNK, BLOCK,
    )  # fmt: skip


@triton.jit
def weights_kernel(
    pointers,  # (rows, num_tensors) int64
    sizes,  # (num_tensors,) int64, elements
    chunks,  # (num_chunks, 2) int32
    coefficients,  # (num_tensors, COLUMNS) float32
    num_tensors,
    found_inf,  # () float32
    momentum,
    weight_decay,
    HAS_FOUND: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MASTER: tl.constexpr,  # row of the master weights; P where there are none
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 2, last chunk first: what phase 1 touched last is still in L2. Reads 12 bytes and writes 8."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tables = pointers, sizes, chunks, num_tensors
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    weights_chunk(
        program, tables, coefficients, momentum, weight_decay, HAS_BUFFER, NESTEROV, MASTER, P_DTYPE, G_DTYPE,
        ALIGNED, CHUNK, BLOCK,
    )  # fmt: skip


@triton.jit
def step_kernel(
    pointers,  # (rows, num_tensors) int64
    sizes,  # (num_tensors,) int64
    chunks,  # (num_chunks, 2) int32
    first_chunk,  # (num_tensors + 1,) int32
    adapts,  # (num_tensors,) int32
    coefficients,  # (num_tensors, COLUMNS) float32, written
    partials,  # (num_chunks, 2) float32, written: Σw², Σg² or Σ(g + λw)²
    queue,  # (2·num_chunks,) int32
    counters,  # (1 + 2·num_tensors,) int32, zeros
    num_tensors,
    lr,  # () float32
    grad_scale,  # () float32
    found_inf,  # () float32
    momentum,
    weight_decay,
    trust_coefficient,
    eps,
    kept,  # 1 − dampening
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    COUNTED: tl.constexpr,
    STEP: tl.constexpr,
    MASTER: tl.constexpr,
    JOINT: tl.constexpr,
    CLIP: tl.constexpr,
    LR_IN_BUFFER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both phases, two programs a chunk. Reads 20 bytes and writes 8; 8 of those read may be in L2."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tables = pointers, sizes, chunks, num_tensors
    numbers = lr, grad_scale, weight_decay, trust_coefficient, eps, kept
    program, tensor, second = take_ticket(counters, queue, chunks)
    if second:
        wait_for(counters, tensor, num_tensors)
        weights_chunk(
            program, tables, coefficients, momentum, weight_decay, HAS_BUFFER, NESTEROV, MASTER, P_DTYPE, G_DTYPE,
            ALIGNED, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        norms_chunk(
            program, tables, adapts, partials, grad_scale, weight_decay, HAS_SCALE, JOINT, MAXIMIZE, MASTER, P_DTYPE,
            G_DTYPE, ALIGNED, CHUNK, BLOCK,
        )  # fmt: skip
        if arrive(counters, tensor, first_chunk):
            prepare_tensor(
                tensor, pointers, num_tensors, coefficients, partials, first_chunk, adapts, numbers, HAS_SCALE,
                COUNTED, STEP, JOINT, CLIP, LR_IN_BUFFER, MAXIMIZE, RATIO_BLOCK,
            )  # fmt: skip
            announce(counters, tensor, num_tensors)
