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

    def stop(self) -> None:
        """What counts has been issued."""
        self._stopped = time.perf_counter()
        self._end = self._event()

    def is_done(self) -> bool:
        """Whether it has been carried out too."""
        return self._end is None or self._end.query()

    def seconds(self) -> float:
        """From the start to the stop, once all that was issued in between is done; on a CPU, by the host's clock."""
        if self._begin is None or self._end is None:
            return self._stopped - self._started
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
