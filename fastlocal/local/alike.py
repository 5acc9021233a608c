"""Whether the workers of several processes hold the same, and giving all what the first one holds.

Every function is called by all processes of the group alike. `everything` is a list of tensors, each a list of its
twins in the workers of this process.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal import comm
from fastlocal.checksum import checksum
from fastlocal.comm import Group
from fastlocal.flat import Rows
from fastlocal.following import drop_gradients
from fastlocal.local.meeting import FIRST_GRADIENTS, DisagreementError, gather
from fastlocal.ops.averaging import accumulate_dtype
from fastlocal.outer import Outer

MOST_ROUNDED = 1e-4
"""Of a tensor's norm: what steps together leave between processes is far below, what another model has far above."""

_MOST_APART = 1e-2
"""Of the norm of an anchor or a slow momentum: what unlike processors leave between them in hundreds of rounds of
rounded progress is far below, what another run has is far above."""


def are_alike(everything: Sequence[Sequence[Tensor]], group: Group) -> bool:
    """Whether all workers hold the same bytes, as a checksum of each tensor tells."""
    if not everything:
        return True
    home = everything[0][0].device  # a model may lie on several
    sums = [torch.stack([checksum(twin).to(home) for twin in twins]) for twins in everything]
    by_worker = torch.stack(sums, dim=1).tolist()  # one read from the device
    halves = [half for own in by_worker for each in own for half in _halves(each)]
    width = 2 * len(everything)
    workers = {tuple(said[at : at + width]) for said in group.gather(halves) for at in range(0, len(said), width)}
    return len(workers) == 1


def are_close(everything: Sequence[Sequence[Tensor]], group: Group, most: float = MOST_ROUNDED) -> bool:
    """Whether each tensor is as near the first process's first one, as a share of its norm, as roundings leave it."""
    close = True
    for twins in everything:
        first = twins[0].clone()
        group.broadcast_(first, source=0)
        dtype = accumulate_dtype(first.dtype)
        farthest = max(most, 2 * torch.finfo(first.dtype).eps) * first.norm(dtype=dtype)
        close = close and all((own - first).norm(dtype=dtype) <= farthest for own in twins)  # NaN is far
    return all(all(said) for said in group.gather([close]))


@torch.no_grad()
def take_first_(twins: Sequence[Tensor], group: Group) -> None:
    """Overwrite a tensor of each worker with that of the first process's first, byte by byte, of any dtype."""
    message = twins[0].flatten().view(torch.uint8)
    group.broadcast_(message, source=0)
    for twin in twins:
        twin.copy_(message.view(twin.dtype).view(twin.shape))


def share_rows(rows: Rows, parts: Sequence[Tensor], group: Group) -> None:
    """Overwrite the rows' parts, each of shape (k, columns), with the first process's first row; where that changes a
    worker, its gradients, which were computed elsewhere, become zero.
    """
    replaced = [False] * len(rows)
    for part in parts:
        before = part.clone()
        group.broadcast_(part[0], source=0)
        part.copy_(part[0].clone().expand_as(part))
        replaced = [r or not torch.equal(a, b) for r, a, b in zip(replaced, before, part, strict=True)]
    rows.push()
    for parameters in itertools.compress(rows.parameters, replaced):
        drop_gradients(parameters.values())


def share_states(outers: Sequence[Outer], group: Group) -> None:
    """Give all the first process's anchors and slow momenta, which may differ by roundings where they were loaded.

    Raises:
        DisagreementError: on every process, if they differ by more.
    """
    kept = [[value] for outer in outers for value in outer.state_dict().values() if torch.is_tensor(value)]
    if are_alike(kept, group):
        return
    if not are_close(kept, group, _MOST_APART):
        raise DisagreementError(
            "the processes go on from different anchors or slow momenta: each must load the state that was saved by "
            "the same run, after the same step"
        )
    for (tensor,) in kept:
        group.broadcast_(tensor, source=0)


def warn_of_equal_gradients(rows: Rows, group: Group) -> None:
    """Warn on every process if all have the same gradients, to the bit: their workers learn nothing apart.

    That is how a DistributedDataParallel shows that was put around the model after it was handed over.
    """
    grads = [p.grad for parameters in rows.parameters for p in parameters.values() if p.grad is not None]
    strided: list[Any] = [grad.detach() for grad in grads if grad.layout is torch.strided]
    # Of a sum still to be taken the summands tell as much.
    pieces = [(grad.to_local() if comm.is_sharded(grad) else grad).resolve_neg() for grad in strided]
    size, total = 0.0, 0
    if pieces:
        home = pieces[0].device
        norms = torch.stack([piece.norm(dtype=accumulate_dtype(piece.dtype)).to(home) for piece in pieces])
        sums = torch.stack([checksum(piece).to(home) for piece in pieces])
        size, total = float(norms.max()), int(checksum(sums))
    everybody = gather(group, FIRST_GRADIENTS, 0, [size, *_halves(total)])
    if 0 < size < math.inf and all(said == everybody[0] for said in everybody):
        warnings.warn(
            "all processes have the same gradients in their first step: they read the same data, or something else "
            "averages gradients, such as a DistributedDataParallel that was put around the model after this "
            "optimizer was built: call forward and backward inside of its no_sync(), or leave it out",
            stacklevel=5,  # who calls step(), which torch wraps
        )


def _halves(total: int) -> tuple[int, int]:
    """Numbers are gathered in float64, which holds half of a checksum."""
    return total >> 32, total & 0xFFFFFFFF
