"""LAMB in two phases that recompute the update from the moments: 40 bytes a float32 parameter, no temporary.

    phase 1: m ← β1 m + β3 g, v ← β2 v + (1 − β2) g², Σw², Σu²         reads g, m, v, w; writes m, v: 24 bytes
    ratio:   r = ‖w‖/‖u‖ of each tensor
    phase 2: w ← w − lr·r·u, u computed again from m and v             reads m, v, w; writes w:       16 bytes

Master weights of a bfloat16 or float16 parameter add 4 bytes to phase 1 and 8 to phase 2; both phases take the
parameter's value where it no longer is its master's rounding.

Coefficients that depend on the step count, the learning rate, the loss scale or the clip are computed on the
device, one row a tensor, by `prepare_kernel`: a step never waits for the host.
"""

import triton
import triton.language as tl

from fastlocal.kernels.trust_ratio_common import (
    find_chunk,
    gradient_multiplier,
    load_block,
    load_weight,
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
TENSORS = 128
_COLUMNS = tl.constexpr(COLUMNS)

# Rows of the pointer table.
P = tl.constexpr(0)
G = tl.constexpr(1)
M = tl.constexpr(2)
V = tl.constexpr(3)
MASTER = tl.constexpr(4)  # where there are master weights


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
    max_norm,
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

    row = coefficients + tensors * _COLUMNS
    tl.store(row + MULTIPLIER, tl.zeros([TENSORS], dtype=tl.float32) + multiplier, mask=mask)
    tl.store(row + INVERSE1, inverse1, mask=mask)
    tl.store(row + INVERSE2, inverse2, mask=mask)
    tl.store(row + SHRINK, tl.zeros([TENSORS], dtype=tl.float32) + shrink, mask=mask)
    tl.store(row + STEP_SIZE, step_size, mask=mask)


@triton.jit
def _update(w, m, v, inverse1, inverse2, eps, update_decay):
    """u = m̂/(√v̂ + ε) + λw."""
    return m * inverse1 / (tl.sqrt(v) * inverse2 + eps) + update_decay * w


@triton.jit
def _moments_block(
    values,  # as below
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
    l2_decay,
    update_decay,
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
    program = tl.program_id(0)
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    p = tensor_pointer(pointers, P, num_tensors, tensor, P_DTYPE, ALIGNED)
    g = tensor_pointer(pointers, G, num_tensors, tensor, G_DTYPE, ALIGNED)
    m = tensor_pointer(pointers, M, num_tensors, tensor, tl.float32, ALIGNED)
    v = tensor_pointer(pointers, V, num_tensors, tensor, tl.float32, ALIGNED)
    master = p
    if HAS_MASTER:
        master = tensor_pointer(pointers, MASTER, num_tensors, tensor, tl.float32, ALIGNED)
    row = coefficients + tensor * _COLUMNS
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
def ratio_kernel(
    partials,  # (num_chunks, 2) float32
    first_chunk,  # (num_tensors + 1,) int32
    adapts,  # (num_tensors,) int32
    coefficients,  # (num_tensors, COLUMNS) float32, STEP_SIZE multiplied by the ratio
    found_inf,  # () float32
    low,
    high,
    HAS_FOUND: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The trust ratio of each tensor that has one, 1 where a norm is zero."""
    if HAS_FOUND:
        if tl.load(found_inf) != 0:
            return
    tensor = tl.program_id(0)
    if tl.load(adapts + tensor) == 0:
        return
    first, last = tl.load(first_chunk + tensor), tl.load(first_chunk + tensor + 1)
    weight_norm = tl.sqrt(sum_partials(partials, 0, 2, first, last, BLOCK))
    update_norm = tl.sqrt(sum_partials(partials, 1, 2, first, last, BLOCK))
    if (weight_norm > 0) & (update_norm > 0):
        ratio = weight_norm / update_norm
        if HAS_CLIP:
            ratio = tl.minimum(tl.maximum(ratio, low), high)
        step_size = coefficients + tensor * _COLUMNS + STEP_SIZE
        tl.store(step_size, tl.load(step_size) * ratio)


@triton.jit
def _weights_block(
    values,  # as below
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
def weights_kernel(
    pointers,  # (5 or 6, num_tensors) int64: P, G, M, V, masters if any, step counts
    sizes,  # (num_tensors,) int64
    chunks,  # (num_chunks, 2) int32
    coefficients,  # (num_tensors, COLUMNS) float32
    num_tensors,
    found_inf,  # () float32
    eps,
    update_decay,
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
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    p = tensor_pointer(pointers, P, num_tensors, tensor, P_DTYPE, ALIGNED)
    m = tensor_pointer(pointers, M, num_tensors, tensor, tl.float32, ALIGNED)
    v = tensor_pointer(pointers, V, num_tensors, tensor, tl.float32, ALIGNED)
    master = p
    if HAS_MASTER:
        master = tensor_pointer(pointers, MASTER, num_tensors, tensor, tl.float32, ALIGNED)
    row = coefficients + tensor * _COLUMNS
    shrink, step_size = tl.load(row + SHRINK), tl.load(row + STEP_SIZE)
    inverse1, inverse2 = tl.load(row + INVERSE1), tl.load(row + INVERSE2)
    values = p, master, m, v, size, inverse1, inverse2, shrink, step_size, eps, update_decay
    if size - base >= CHUNK:
        for i in range(0, CHUNK, BLOCK):
            _weights_block(values, base + i, False, BLOCK, HAS_MASTER, P_DTYPE)
    else:
        for i in range(0, (size - base).to(tl.int32), BLOCK):
            _weights_block(values, base + i, True, BLOCK, HAS_MASTER, P_DTYPE)
