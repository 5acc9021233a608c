"""One process works while the others wait: its signs of life, in the store that all share."""

import threading
import time
from typing import Any

from fastlocal.comm.answer import within

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 20.0
"""Without a beat for so long, a process has ended or is stopped; threads of a busy one come to run sooner."""
_LONGEST_PAUSE_SECONDS = 0.1


class Turn:
    """One piece of work.

    Args:
        store: where the process that works leaves its signs.
        name: of the turn, another for each.
    """

    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._beats, self._ended = f"{name}/beats", f"{name}/ended"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def begin(self) -> None:
        """In the process that works: give signs of life until the end."""
        within(_SILENT_SECONDS, lambda: self._store.add(self._beats, 1))
        self._thread.start()

    def end(self) -> None:
        """In the process that works: it is done, or has failed."""
        self._stop.set()
        self._thread.join(_SILENT_SECONDS)
        self._store.set(self._ended, "1")

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            try:
                self._store.add(self._beats, 1)
            except RuntimeError:
                return  # the store is gone, which end() will say

    def _beats_so_far(self) -> int | None:
        """None once the turn has ended."""
        return None if self._store.check([self._ended]) else self._store.add(self._beats, 0)

    def wait(self) -> float:
        """In the others: until the end. Returns 0, or for how many seconds there was no sign of life."""
        beats, since, pause = -1, time.monotonic(), 0.001
        # Not store.wait(): it prints a warning whenever its time is up.
        while (seen := within(_SILENT_SECONDS, self._beats_so_far)) is not None:
            now = time.monotonic()
            if seen != beats:
                beats, since = seen, now
            elif now - since > _SILENT_SECONDS:
                return now - since
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return 0.0
