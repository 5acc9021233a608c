"""How tables come onto the device without the host waiting for it, inside the capture of a CUDA graph too."""

import torch
from torch import Tensor

from fastlocal.kernels.device import is_capturing

_ALIGNMENT = 16


class Staging:
    """Pinned memory that tables built in a capture are copied from.

    From pageable memory a copy waits for the device, and newer versions of torch refuse it in a capture. A capture
    itself may ask for pinned memory from torch 2.11 on alone, so some is set aside before, for one step: further ones
    in the same capture ask.
    """

    def __init__(self) -> None:
        self._aside: Tensor | None = None  # uint8
        self._used = 0  # bytes of it

    def set_aside(self, num_bytes: int) -> None:
        """Outside of captures: make room for what the next one may upload if so much was uploaded before it."""
        # A capture may add a queue, and divide the tensors into other buckets.
        wanted = 2 * num_bytes + 64 * _ALIGNMENT if num_bytes else 0
        if wanted and (self._aside is None or self._used or self._aside.numel() < wanted):
            self._aside, self._used = self._pinned(wanted), 0

    def upload(self, device: torch.device, table: Tensor, on_host: list[Tensor]) -> Tensor:
        """The table on the device; what it is copied from is added to `on_host`, to be kept as long as the copy."""
        if device.type != "cuda":
            return table
        on_host.append(self.place(table) if is_capturing(device) else table.pin_memory())
        return on_host[-1].to(device, non_blocking=True)

    def place(self, table: Tensor) -> Tensor:
        """A copy in what was set aside, which is never given out twice."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._aside is None or start + table.nbytes > self._aside.numel():
            return table.pin_memory()
        self._used = start + table.nbytes
        return self._aside[start : self._used].view(table.dtype).view(table.shape).copy_(table)

    @staticmethod
    def _pinned(num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
