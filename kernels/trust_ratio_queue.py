"""Both phases of a step in one launch: which program works on what, and how a phase waits for the one before.

Phase 2 of a tensor reads what its phase 1 read and wrote. In two launches all other tensors come between, and nothing
of a large model is in L2 any more; here they are queued right behind each other. Hardware starts programs in no order
that one may rely on, so a program takes the next ticket of an atomic counter and works on that entry of the queue. An
entry of phase 2 waits for the whole of its tensor's phase 1, whose tickets are all lower: the programs that have them
run already and wait for nothing, so the wait ends, however few programs run at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def queue_of(counts: Tensor, lag: int) -> Tensor:
    """(2·num_chunks,) int32: c stands for phase 1 of chunk c, -1 - c for phase 2 of it.

    Args:
        counts: (num_tensors,) int64, chunks of each tensor.
        lag: how many chunks of other tensors' phase 1 come between the phases of a tensor, if there are as many.
            The more, the less a program waits; the fewer, the more is still in L2.
    """
    end = counts.cumsum(0)
    first = end - counts
    chunk = torch.arange(int(end[-1]), device=counts.device)
    # A tensor's phase 2 is queued when phase 1 has come so far.
    due = (end + lag).clamp(max=len(chunk))
    first_phase = chunk + torch.cat([first, end[-1:]])[torch.searchsorted(end + lag, chunk, right=True)]
    # Last chunk first: within a tensor that is larger than L2, what phase 1 touched last is still there.
    second_phase = (due + first + end - 1).repeat_interleave(counts) - chunk
    queue = torch.empty(2 * len(chunk), dtype=torch.int32, device=counts.device)
    queue[first_phase], queue[second_phase] = chunk.to(torch.int32), (-1 - chunk).to(torch.int32)
    return queue


# `counters` holds the next ticket, then how many chunks of each tensor have arrived at the end of phase 1, then
# whether each tensor's coefficients are ready for phase 2.


@triton.jit
def take_ticket(
    counters,  # (1 + 2·num_tensors,) int32
    queue,  # (2·num_chunks,) int32
    chunks,  # (num_chunks, 2) int32
):
    """The chunk that this program works on, its tensor, and whether in phase 2."""
    entry = tl.load(queue + tl.atomic_add(counters, 1, sem="relaxed"))
    second = entry < 0
    chunk = tl.where(second, -1 - entry, entry)
    return chunk, tl.load(chunks + 2 * chunk), second


@triton.jit
def arrive(counters, tensor, first_chunk):
    """Ends phase 1 of a chunk: whether it was its tensor's last, which may read what all of them stored."""
    tl.debug_barrier()  # one thread of the program speaks for the stores of all
    arrived = tl.atomic_add(counters + 1 + tensor, 1, sem="acq_rel")
    return arrived + 1 == tl.load(first_chunk + tensor + 1) - tl.load(first_chunk + tensor)


@triton.jit
def announce(counters, tensor, num_tensors):
    """Lets phase 2 of a tensor begin, with all that its phase 1 and this program have stored."""
    tl.debug_barrier()
    tl.atomic_xchg(counters + 1 + num_tensors + tensor, 1, sem="release")


@triton.jit
def wait_for(counters, tensor, num_tensors):
    """Until `announce` was called for this tensor."""
    while tl.atomic_add(counters + 1 + num_tensors + tensor, 0, sem="acquire") == 0:
        pass
