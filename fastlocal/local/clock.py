"""How long a stretch of work takes where it is done: on a GPU not how long the host waits for what came before."""

import time

import torch


class Clock:
    """Starts now, in stream order.

    Args:
        device: that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._begin = self._event()

    def seconds(self) -> float:
        """Since the start, once all that was issued in between is done; on a CPU, by the host's clock."""
        end = self._event()
        if self._begin is None or end is None:
            return time.perf_counter() - self._started
        end.synchronize()
        return self._begin.elapsed_time(end) / 1e3

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
