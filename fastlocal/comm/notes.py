"""What processes write about themselves, so that after a failed collective the others can say who is missing.

Before its collectives each leaves a note in the group's store, saying how far it has come; that costs it
microseconds, since the store does not answer. While it waits in one, a thread gives signs of life: when a process
ends, only its neighbours in a ring hear of it, and the others wait on.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

_BEAT_SECONDS = 0.25
_ended = threading.Event()
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Ends them before the interpreter does: inside of a call to the store, that would abort the process."""
    _ended.set()
    for thread in list(_threads):
        thread.join(1.0)


class _Note(NamedTuple):
    """What a process has written about itself."""

    meetings: int  # how many points with collectives it has reached
    local_steps: int
    failed: int  # 1 once a collective has failed there


class Notes:
    """The notes of a group. Every method raises RuntimeError if the store no longer answers.

    Args:
        store: of the group.
        rank: of this process in the group.
        ranks: the global rank of every process.
    """

    def __init__(self, store: Any, rank: int, ranks: Sequence[int]) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._own = _Note(0, 0, 0)
        self._waits = False
        self._beats = 0
        self._thread: threading.Thread | None = None

    def arrive(self, local_steps: int) -> None:
        """This process has come to the next point where all meet."""
        self._leave(_Note(self._own.meetings + 1, local_steps, 0))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective."""
        if self._thread is None:
            self._thread = threading.Thread(target=_give_signs, args=(weakref.ref(self),), daemon=True)
            _threads.add(self._thread)
            self._thread.start()
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def give_sign(self) -> None:
        """If this process waits, tell that it lives."""
        if self._waits:
            self._beats += 1
            self._store.set(f"alive/{self._rank}", str(self._beats))

    def find_missing(self, late: bool, grace_seconds: float) -> str | None:
        """Who has not come, or has ended since; None if all are there.

        Args:
            late: whether the others have had all the time they may take.
            grace_seconds: how long to look for others that know of the failure.
        """
        self._leave(self._own._replace(failed=1))
        until = time.monotonic() + grace_seconds
        signs = self._read_signs()
        while True:
            notes = self._read()
            behind = [rank for rank, note in notes.items() if note.meetings < self._own.meetings]
            silent = [rank for rank, note in notes.items() if not note.failed and rank not in behind]
            if (late and behind) or not (behind or silent) or time.monotonic() > until:
                break
            time.sleep(0.05)
        later = self._read_signs()
        silent = [rank for rank in silent if later[rank] == signs[rank]]
        if behind:
            return ", ".join(
                f"rank {self._ranks[rank]} has not arrived ({_last_seen(notes[rank])})" for rank in behind
            )
        return ", ".join(f"rank {self._ranks[rank]} arrived and fell silent" for rank in silent) or None

    def _leave(self, note: _Note) -> None:
        self._own = note
        self._store.set(str(self._rank), ",".join(map(str, note)))

    def _read(self) -> dict[int, _Note]:
        notes = {}
        for rank in range(len(self._ranks)):
            if rank != self._rank:
                known = self._store.check([str(rank)])
                fields = self._store.get(str(rank)).decode().split(",") if known else ("0", "0", "0")
                notes[rank] = _Note(*map(int, fields))
        return notes

    def _read_signs(self) -> list[str]:
        keys = [f"alive/{rank}" for rank in range(len(self._ranks))]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]


def _give_signs(reference: "weakref.ref[Notes]") -> None:
    """Until the notes are gone, or the store that they are in."""
    while (notes := reference()) is not None:
        try:
            notes.give_sign()
        except RuntimeError:
            return
        del notes
        if _ended.wait(_BEAT_SECONDS):
            return


def _last_seen(note: _Note) -> str:
    return f"last seen at local step {note.local_steps}" if note.meetings else "never seen"
