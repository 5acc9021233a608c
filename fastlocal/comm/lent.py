"""Tensors in a collective, which a thread of gloo's holds a little longer than the collective takes.

Where that thread lets go of one when the interpreter is ending, it cannot have the interpreter's lock, and the
process aborts: "terminate called without an active exception". So one that ends waits until all have been let go of.
"""

import atexit
import time
import weakref
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import Work

_WAIT_SECONDS = 1.0  # a collective that failed may hold its tensors for as long as it likes

_lent: "list[weakref.ref[Tensor]]" = []
_under_way: "list[Work]" = []


def lent(tensor: Tensor) -> Tensor:
    """The same tensor, sharing its memory, as another object: for one collective, and nobody else to keep."""
    _lent[:] = [reference for reference in _lent if reference() is not None]
    other = tensor.detach()
    _lent.append(weakref.ref(other))
    return other


def keep(work: "Work") -> None:
    """Hold a collective that goes on while nobody waits for it, until it is let go of or has ended."""
    _under_way[:] = [other for other in _under_way if not other.is_completed()]
    _under_way.append(work)


def let_go(work: "Work") -> None:
    """Somebody has waited for it."""
    if work in _under_way:
        _under_way.remove(work)


@atexit.register
def wait_for_all() -> None:
    """Return when all tensors have been let go of; first what is under way ends, by its own timeout at the latest."""
    while any(not work.is_completed() for work in _under_way):
        time.sleep(0.001)
    _under_way.clear()
    until = time.monotonic() + _WAIT_SECONDS
    while any(reference() is not None for reference in _lent) and time.monotonic() < until:
        time.sleep(0.001)  # and leave the lock to who needs it
