"""A call that may never return, such as a question to a store whose process is stopped, and for how long to wait."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_unanswered: list[threading.Thread] = []
"""Those left behind. A store takes one request at a time: the next would wait behind theirs."""


def require_answers() -> None:
    """Raise RuntimeError while an earlier call is still without an answer."""
    if any(thread.is_alive() for thread in _unanswered):
        raise RuntimeError("an earlier call has had no answer yet")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What the call returns; what it raises.

    Raises:
        RuntimeError: it takes longer, or an earlier call is still without an answer. The thread of one that takes
            longer is left behind, and ends with the process.
    """
    require_answers()
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # for whoever waits
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        _unanswered.append(thread)
        raise RuntimeError(f"no answer within {seconds:g} s")
    return returned[0]
