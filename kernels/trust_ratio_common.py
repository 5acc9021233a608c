"""What the LAMB and LARS kernels share: table look-ups, the per-tensor norms, the norm of all gradients.

A launch serves any number of tensors. Program i works on row i of the chunk table (tensor, chunk within the
tensor), and finds the tensor's addresses in the pointer table, so nothing is flattened or copied. Sums of
squares are deterministic: one partial sum a chunk, then one program a tensor adds them in a fixed order.
"""

import triton
import triton.language as tl

from fastlocal.kernels.launch import BLOCK as BLOCK
from fastlocal.kernels.launch import NUM_WARPS as NUM_WARPS
from fastlocal.kernels.rounding import round_to

# Elements a program. Elements a loop iteration, BLOCK, divide it. Not yet measured on a GPU; chosen for 16-byte
# accesses without spills in the machine code for sm_90.
CHUNK = 4096
RATIO_BLOCK = tl.constexpr(BLOCK)  # of the sums between the phases, whatever the phases' own


@triton.jit
def tensor_pointer(
    pointers,  # (rows, num_tensors) int64, addresses
    row,  # which of the table's rows
    num_tensors,
    tensor,  # index of the tensor
    DTYPE: tl.constexpr,  # what the address points to
    ALIGNED: tl.constexpr,  # every address in the table is a multiple of 16
):
    """The address of one tensor. Without the hint, loads through it would be 4 bytes wide."""
    address = tl.load(pointers + row * num_tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def master_pointer(
    pointers,  # (rows, num_tensors) int64, addresses
    row,  # of the master weights
    num_tensors,
    tensor,  # index of the tensor
    p,  # address of the parameter, which is its own master where it has none
    HAS_MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The address of one tensor's master weights."""
    master = p
    if HAS_MASTER:
        master = tensor_pointer(pointers, row, num_tensors, tensor, tl.float32, ALIGNED)
    return master


@triton.jit
def find_chunk(
    program,  # row of the chunk table
    chunks,  # (num_chunks, 2) int32
    sizes,  # (num_tensors,) int64, elements
    CHUNK: tl.constexpr,
):
    """The chunk's tensor, its first element within the tensor, and the tensor's size."""
    tensor = tl.load(chunks + 2 * program)
    base = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    return tensor, base, tl.load(sizes + tensor)


@triton.jit
def load_block(pointer, offsets, size, MASKED: tl.constexpr):
    """One block in float32, zeros beyond the end. Without the mask, 16 bytes a thread."""
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    return tl.load(pointer + offsets).to(tl.float32)


@triton.jit
def store_block(pointer, offsets, values, size, MASKED: tl.constexpr):
    """Stores values that already have the pointer's dtype."""
    if MASKED:
        tl.store(pointer + offsets, values, mask=offsets < size)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def load_weight(p, master, offsets, size, MASKED: tl.constexpr, HAS_MASTER: tl.constexpr, P_DTYPE: tl.constexpr):
    """A block of weights: the master's elements, or the parameter's where it has been written to since."""
    w = load_block(p, offsets, size, MASKED)
    if HAS_MASTER:
        exact = load_block(master, offsets, size, MASKED)
        w = tl.where(round_to(exact, P_DTYPE).to(tl.float32) == w, exact, w)
    return w


@triton.jit
def store_weight(p, master, offsets, w, size, MASKED: tl.constexpr, HAS_MASTER: tl.constexpr, P_DTYPE: tl.constexpr):
    """Stores a block of weights, rounded to the parameter's dtype, and as they are in the master."""
    if HAS_MASTER:
        store_block(master, offsets, w, size, MASKED)
    store_block(p, offsets, round_to(w, P_DTYPE), size, MASKED)


@triton.jit
def sum_partials(partials, column, columns, first, last, BLOCK: tl.constexpr):
    """Sum of partials[first:last, column], in an order that depends on nothing else."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(partials + rows.to(tl.int64) * columns + column, mask=rows < last, other=0.0)
    return tl.sum(total)


@triton.jit
def gradient_multiplier(
    norm,  # () float32, ‖G‖ of the gradients as stored
    max_norm,  # what ‖G‖ is bounded by, where HAS_NORM
    grad_scale,  # () float32, what the loss was multiplied by
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """1/s, and 1/max(1, ‖G/s‖/max_norm) where gradients are clipped."""
    multiplier = 1.0
    if HAS_SCALE:
        multiplier = 1.0 / tl.load(grad_scale)
    if HAS_NORM:
        excess = tl.load(norm) * multiplier / max_norm
        multiplier = multiplier / tl.maximum(excess, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return multiplier


@triton.jit
def _square_block(pointer, start, size, total, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK)
    x = load_block(pointer, offsets, size, MASKED)
    return total + x * x


@triton.jit
def square_kernel(
    pointers,  # (rows, num_tensors) int64
    sizes,  # (num_tensors,) int64, elements
    chunks,  # (num_chunks, 2) int32
    partials,  # (num_chunks, 1) float32, written
    num_tensors,
    ROW: tl.constexpr,  # of the pointer table
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[i] = Σ x² over chunk i. Moves one tensor's bytes once."""
    program = tl.program_id(0)
    tensor, base, size = find_chunk(program, chunks, sizes, CHUNK)
    x = tensor_pointer(pointers, ROW, num_tensors, tensor, G_DTYPE, ALIGNED)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if size - base >= CHUNK:
        for i in range(0, CHUNK, BLOCK):
            total = _square_block(x, base + i, size, total, False, BLOCK)
    else:
        for i in range(0, (size - base).to(tl.int32), BLOCK):
            total = _square_block(x, base + i, size, total, True, BLOCK)
    tl.store(partials + program, tl.sum(total))


@triton.jit
def tensor_sum_kernel(
    partials,  # (num_chunks, 1) float32
    first_chunk,  # (num_tensors + 1,) int32
    sums,  # (num_tensors,) float32, written
    BLOCK: tl.constexpr,
):
    """sums[t] = Σ of tensor t's partials."""
    tensor = tl.program_id(0)
    first, last = tl.load(first_chunk + tensor), tl.load(first_chunk + tensor + 1)
    tl.store(sums + tensor, sum_partials(partials, 0, 1, first, last, BLOCK))


@triton.jit
def norm_kernel(sums, num_sums, norm, BLOCK: tl.constexpr):
    """norm = √Σ sums, by one program. (`tl.sqrt` would take a subnormal sum for zero.)"""
    tl.store(norm, tl.sqrt_rn(sum_partials(sums, 0, 1, 0, num_sums, BLOCK)))
