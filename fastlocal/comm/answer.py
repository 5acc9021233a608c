"""A call that may never return, such as a question to a store whose process is stopped, and for how long to wait."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What the call returns; what it raises.

    Raises:
        RuntimeError: it takes longer. Its thread is left behind, and ends with the process.
    """
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
        raise RuntimeError(f"no answer within {seconds:g} s")
    return returned[0]
