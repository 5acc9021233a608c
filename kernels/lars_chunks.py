"""The two phases of LARS on one chunk of a tensor, and what is computed of the tensor between them.

    phase 1: Σw², and Σg² or Σ(g + λw)²                           reads g, w:                   8 bytes
    ratio:   r = η‖w‖/(‖g‖ + λ‖w‖ + ε) of each tensor
    phase 2: b ← μb + (1 − dampening)·r·(g + λw), w ← w − lr·b    reads g, b, w; writes b, w:  20 bytes

Tensors without a trust ratio take no part in phase 1: 20 bytes.
"""

import triton
import triton.language as tl

from fastlocal.kernels.trust_ratio_common import (
    find_chunk,
    gradient_multiplier,
    load_block,
    load_weight,
    master_pointer,
    store_block,
    store_weight,
    sum_partials,
    tensor_pointer,
)

# Columns of the coefficient table.
MULTIPLIER = tl.constexpr(0)  # of the gradient, with the sign of `maximize`
SCALE = tl.constexpr(1)  # of d = g + λw: the trust ratio
KEPT = tl.constexpr(2)  # 1 − dampening, or 1 at a tensor's first step
STEP_SIZE = tl.constexpr(3)  # of what is subtracted from w
COLUMNS = 4
WIDTH = tl.constexpr(COLUMNS)

# Rows of the pointer table. After G come the buffers, the masters and the step counts that there are.
P = tl.constexpr(0)
G = tl.constexpr(1)
B = tl.constexpr(2)


@triton.jit
def _norms_block(
    values,  # what of this tensor is unpacked first
    start,
    ww,
    gg,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    p, master, g, size, multiplier, weight_decay = values
    offsets = start + tl.arange(0, BLOCK)
    w = load_weight(p, master, offsets, size, MASKED, HAS_MASTER, P_DTYPE)
    gradient = load_block(g, offsets, size, MASKED) * multiplier
    if JOINT:
        gradient += weight_decay * w
    return ww + w * w, gg + gradient * gradient


@triton.jit
def norms_chunk(
    program,  # row of the chunk table
    tables,  # (pointers, sizes, chunks, num_tensors)
    adapts,  # (num_tensors,) int32
    partials,  # (num_chunks, 2) float32, written: Σw², Σg² or Σ(g + λw)²
    grad_scale,
    weight_decay,
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
    """Phase 1, if the tensor has a trust ratio."""
    pointers, sizes, chunks, num_tensors = tables
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    if tl.load(adapts + tensor) != 0:
        p = tensor_pointer(pointers, P, num_tensors, tensor, P_DTYPE, ALIGNED)
        g = tensor_pointer(pointers, G, num_tensors, tensor, G_DTYPE, ALIGNED)
        master = master_pointer(pointers, MASTER, num_tensors, tensor, p, MASTER != P, ALIGNED)
        multiplier = gradient_multiplier(grad_scale, 1.0, grad_scale, False, HAS_SCALE)
        if MAXIMIZE:
            multiplier = -multiplier
        values = p, master, g, size, multiplier, weight_decay
        ww = tl.zeros([BLOCK], dtype=tl.float32)
        gg = tl.zeros([BLOCK], dtype=tl.float32)
        if size - base >= CHUNK:
            for i in range(0, CHUNK, BLOCK):
                ww, gg = _norms_block(values, base + i, ww, gg, False, BLOCK, JOINT, MASTER != P, P_DTYPE)
        else:
            for i in range(0, (size - base).to(tl.int32), BLOCK):
                ww, gg = _norms_block(values, base + i, ww, gg, True, BLOCK, JOINT, MASTER != P, P_DTYPE)
        tl.store(partials + program * 2, tl.sum(ww))
        tl.store(partials + program * 2 + 1, tl.sum(gg))


@triton.jit
def prepare_tensor(
    tensor,
    pointers,  # (rows, num_tensors) int64
    num_tensors,
    coefficients,  # (num_tensors, COLUMNS) float32, written
    partials,  # (num_chunks, 2) float32
    first_chunk,  # (num_tensors + 1,) int32
    adapts,  # (num_tensors,) int32
    numbers,  # (lr, grad_scale, weight_decay, trust_coefficient, eps, kept)
    HAS_SCALE: tl.constexpr,
    COUNTED: tl.constexpr,  # dampening, which the first step does without
    STEP: tl.constexpr,  # row of the step counts
    JOINT: tl.constexpr,
    CLIP: tl.constexpr,
    LR_IN_BUFFER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The trust ratio of one tensor, its coefficients, and its count of steps."""
    lr, grad_scale, weight_decay, trust_coefficient, eps, kept = numbers
    rate = tl.load(lr)
    multiplier = gradient_multiplier(grad_scale, 1.0, grad_scale, False, HAS_SCALE)
    share = kept
    if COUNTED:
        step = tensor_pointer(pointers, STEP, num_tensors, tensor, tl.float32, False)
        count = tl.load(step) + 1.0
        tl.store(step, count)
        share = tl.where(count == 1.0, 1.0, kept)

    scale = 1.0
    if tl.load(adapts + tensor) != 0:
        first, last = tl.load(first_chunk + tensor), tl.load(first_chunk + tensor + 1)
        weight_norm = tl.sqrt_rn(sum_partials(partials, 0, 2, first, last, BLOCK))
        norm = tl.sqrt_rn(sum_partials(partials, 1, 2, first, last, BLOCK))
        denominator = norm + eps
        if not JOINT:
            denominator = norm + weight_decay * weight_norm + eps
        if (weight_norm > 0) & (norm > 0):
            scale = trust_coefficient * weight_norm / denominator
        if CLIP:
            scale = tl.where(scale >= rate, 1.0, scale / tl.where(scale >= rate, 1.0, rate))

    step_size = rate
    if LR_IN_BUFFER:
        scale *= rate
        step_size = 1.0
    if MAXIMIZE:
        multiplier = -multiplier
    row = coefficients + tensor * WIDTH
    tl.store(row + MULTIPLIER, multiplier)
    tl.store(row + SCALE, scale)
    tl.store(row + KEPT, share)
    tl.store(row + STEP_SIZE, step_size)


@triton.jit
def _weights_block(
    values,  # what of this tensor is unpacked first
    start,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    p, master, g, b, size, multiplier, scale, share, step_size, momentum, weight_decay = values
    offsets = start + tl.arange(0, BLOCK)
    w = load_weight(p, master, offsets, size, MASKED, HAS_MASTER, P_DTYPE)
    d = (load_block(g, offsets, size, MASKED) * multiplier + weight_decay * w) * scale
    if HAS_BUFFER:
        buffer = momentum * load_block(b, offsets, size, MASKED) + share * d
        store_block(b, offsets, buffer, size, MASKED)
        if NESTEROV:
            d += momentum * buffer
        else:
            d = buffer
    store_weight(p, master, offsets, w - step_size * d, size, MASKED, HAS_MASTER, P_DTYPE)


@triton.jit
def weights_chunk(
    program,  # row of the chunk table
    tables,  # (pointers, sizes, chunks, num_tensors)
    coefficients,  # (num_tensors, COLUMNS) float32
    momentum,
    weight_decay,
    HAS_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 2."""
    pointers, sizes, chunks, num_tensors = tables
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    p = tensor_pointer(pointers, P, num_tensors, tensor, P_DTYPE, ALIGNED)
    g = tensor_pointer(pointers, G, num_tensors, tensor, G_DTYPE, ALIGNED)
    b = p
    if HAS_BUFFER:
        b = tensor_pointer(pointers, B, num_tensors, tensor, tl.float32, ALIGNED)
    master = master_pointer(pointers, MASTER, num_tensors, tensor, p, MASTER != P, ALIGNED)
    row = coefficients + tensor * WIDTH
    multiplier, scale = tl.load(row + MULTIPLIER), tl.load(row + SCALE)
    share, step_size = tl.load(row + KEPT), tl.load(row + STEP_SIZE)
    values = p, master, g, b, size, multiplier, scale, share, step_size, momentum, weight_decay
    if size - base >= CHUNK:
        for i in range(0, CHUNK, BLOCK):
            _weights_block(values, base + i, False, BLOCK, MASTER != P, P_DTYPE, HAS_BUFFER, NESTEROV)
    else:
        for i in range(0, (size - base).to(tl.int32), BLOCK):
            _weights_block(values, base + i, True, BLOCK, MASTER != P, P_DTYPE, HAS_BUFFER, NESTEROV)
