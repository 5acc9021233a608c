"""The two phases of LAMB on one chunk of a tensor, and its trust ratio between them.

    phase 1: m ← β1 m + β3 g, v ← β2 v + (1 − β2) g², Σw², Σu²         reads g, m, v, w; writes m, v: 24 bytes
    ratio:   r = ‖w‖/‖u‖ of each tensor
    phase 2: w ← w − lr·r·u, u computed again from m and v             reads m, v, w; writes w:       16 bytes

Master weights of a bfloat16 or float16 parameter add 4 bytes to phase 1 and 8 to phase 2; both phases take the
parameter's value where it no longer is its master's rounding.
"""

import triton
import triton.language as tl

from fastlocal.kernels.trust_ratio_common import (
    find_chunk,
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
INVERSE1 = tl.constexpr(1)  # of m in the update
INVERSE2 = tl.constexpr(2)  # of √v in the update
SHRINK = tl.constexpr(3)  # of w, for decoupled decay
STEP_SIZE = tl.constexpr(4)  # of u; phase 2 finds the trust ratio multiplied in
COLUMNS = 5
WIDTH = tl.constexpr(COLUMNS)

# Rows of the pointer table.
P = tl.constexpr(0)
G = tl.constexpr(1)
M = tl.constexpr(2)
V = tl.constexpr(3)
MASTER = tl.constexpr(4)  # where there are master weights


@triton.jit
def _update(w, m, v, inverse1, inverse2, eps, update_decay):
    """u = m̂/(√v̂ + ε) + λw."""
    return m * inverse1 / (tl.sqrt_rn(v) * inverse2 + eps) + update_decay * w


@triton.jit
def _moments_block(
    values,  # what of this tensor is unpacked first
    start,
    weight_squares,
    update_squares,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    (
        p, master, g, m, v, size, multiplier, inverse1, inverse2, shrink, beta1, beta2, beta3, beta4, eps, l2_decay,
        update_decay,
    ) = values  # fmt: skip
    offsets = start + tl.arange(0, BLOCK)
    w = load_weight(p, master, offsets, size, MASKED, HAS_MASTER, P_DTYPE)
    gradient = load_block(g, offsets, size, MASKED) * multiplier + l2_decay * w
    first = beta1 * load_block(m, offsets, size, MASKED) + beta3 * gradient
    second = beta2 * load_block(v, offsets, size, MASKED) + beta4 * gradient * gradient
    store_block(m, offsets, first, size, MASKED)
    store_block(v, offsets, second, size, MASKED)
    w *= shrink
    u = _update(w, first, second, inverse1, inverse2, eps, update_decay)
    if MASKED:
        u = tl.where(offsets < size, u, 0.0)  # 0/0 beyond the end where eps is 0
    return weight_squares + w * w, update_squares + u * u


@triton.jit
def moments_chunk(
    program,  # row of the chunk table
    tables,  # (pointers, sizes, chunks, num_tensors)
    coefficients,  # (num_tensors, COLUMNS) float32
    numbers,  # (beta1, beta2, beta3, beta4, eps, l2_decay, update_decay)
    partials,  # (num_chunks, 2) float32, written: Σw², Σu²
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 1."""
    pointers, sizes, chunks, num_tensors = tables
    beta1, beta2, beta3, beta4, eps, l2_decay, update_decay = numbers
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    p = tensor_pointer(pointers, P, num_tensors, tensor, P_DTYPE, ALIGNED)
    g = tensor_pointer(pointers, G, num_tensors, tensor, G_DTYPE, ALIGNED)
    m = tensor_pointer(pointers, M, num_tensors, tensor, tl.float32, ALIGNED)
    v = tensor_pointer(pointers, V, num_tensors, tensor, tl.float32, ALIGNED)
    master = master_pointer(pointers, MASTER, num_tensors, tensor, p, HAS_MASTER, ALIGNED)
    row = coefficients + tensor * WIDTH
    multiplier, shrink = tl.load(row + MULTIPLIER), tl.load(row + SHRINK)
    inverse1, inverse2 = tl.load(row + INVERSE1), tl.load(row + INVERSE2)

    values = (
        p, master, g, m, v, size, multiplier, inverse1, inverse2, shrink, beta1, beta2, beta3, beta4, eps, l2_decay,
        update_decay,
    )  # fmt: skip
    ww = tl.zeros([BLOCK], dtype=tl.float32)
    uu = tl.zeros([BLOCK], dtype=tl.float32)
    if size - base >= CHUNK:
        for i in range(0, CHUNK, BLOCK):
            ww, uu = _moments_block(values, base + i, ww, uu, False, BLOCK, HAS_MASTER, P_DTYPE)
    else:
        for i in range(0, (size - base).to(tl.int32), BLOCK):
            ww, uu = _moments_block(values, base + i, ww, uu, True, BLOCK, HAS_MASTER, P_DTYPE)
    tl.store(partials + program * 2, tl.sum(ww))
    tl.store(partials + program * 2 + 1, tl.sum(uu))


@triton.jit
def multiply_by_ratio(
    tensor,
    partials,
    first_chunk,
    adapts,
    coefficients,
    low,  # least trust ratio, where HAS_CLIP
    high,  # greatest
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The trust ratio of a tensor that has one, 1 where a norm is zero, into its step size."""
    if tl.load(adapts + tensor) != 0:
        first, last = tl.load(first_chunk + tensor), tl.load(first_chunk + tensor + 1)
        weight_norm = tl.sqrt_rn(sum_partials(partials, 0, 2, first, last, BLOCK))
        update_norm = tl.sqrt_rn(sum_partials(partials, 1, 2, first, last, BLOCK))
        if (weight_norm > 0) & (update_norm > 0):
            ratio = weight_norm / update_norm
            if HAS_CLIP:
                ratio = tl.maximum(ratio, low, propagate_nan=tl.PropagateNan.ALL)
                ratio = tl.minimum(ratio, high, propagate_nan=tl.PropagateNan.ALL)
            step_size = coefficients + tensor * WIDTH + STEP_SIZE
            tl.store(step_size, tl.load(step_size) * ratio)


@triton.jit
def _weights_block(
    values,  # what of this tensor is unpacked first
    start,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    p, master, m, v, size, inverse1, inverse2, shrink, step_size, eps, update_decay = values
    offsets = start + tl.arange(0, BLOCK)
    w = load_weight(p, master, offsets, size, MASKED, HAS_MASTER, P_DTYPE) * shrink
    first = load_block(m, offsets, size, MASKED)
    second = load_block(v, offsets, size, MASKED)
    u = _update(w, first, second, inverse1, inverse2, eps, update_decay)
    store_weight(p, master, offsets, w - step_size * u, size, MASKED, HAS_MASTER, P_DTYPE)


@triton.jit
def weights_chunk(
    program,  # row of the chunk table
    tables,  # (pointers, sizes, chunks, num_tensors)
    coefficients,  # (num_tensors, COLUMNS) float32
    eps,
    update_decay,  # λ where decay is "update", else 0
    HAS_MASTER: tl.constexpr,
    P_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 2."""
    pointers, sizes, chunks, num_tensors = tables
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    p = tensor_pointer(pointers, P, num_tensors, tensor, P_DTYPE, ALIGNED)
    m = tensor_pointer(pointers, M, num_tensors, tensor, tl.float32, ALIGNED)
    v = tensor_pointer(pointers, V, num_tensors, tensor, tl.float32, ALIGNED)
    master = master_pointer(pointers, MASTER, num_tensors, tensor, p, HAS_MASTER, ALIGNED)
    row = coefficients + tensor * WIDTH
    shrink, step_size = tl.load(row + SHRINK), tl.load(row + STEP_SIZE)
    inverse1, inverse2 = tl.load(row + INVERSE1), tl.load(row + INVERSE2)
    values = p, master, m, v, size, inverse1, inverse2, shrink, step_size, eps, update_decay
    if size - base >= CHUNK:
        for i in range(0, CHUNK, BLOCK):
            _weights_block(values, base + i, False, BLOCK, HAS_MASTER, P_DTYPE)
    else:
        for i in range(0, (size - base).to(tl.int32), BLOCK):
            _weights_block(values, base + i, True, BLOCK, HAS_MASTER, P_DTYPE)
