"""One process at a time in a folder: an advisory lock, which the system lets go however its holder ends."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlocal.train.errors import UsageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_POLL_SECONDS = 0.1


class NoLocksError(UsageError):
    """The system or the filesystem has no locks."""


@contextmanager
def hold(folder: Path, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Keep a folder for this process; it is made if it is not there.

    The lock lies on the file `.lock` in it, which stays behind and says who held it last.

    Args:
        folder: what to keep.
        patience_seconds: how long to wait for another holder.

    Raises:
        UsageError: another process holds it (it is named), or the folder cannot be made.
        NoLocksError: this system or the folder's filesystem has no locks.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}") from None
    if fcntl is None:
        raise NoLocksError(f"{folder} cannot be locked: {platform.system()} has no flock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}; choose another --out") from None
    try:
        until = time.monotonic() + patience_seconds
        while not _taken(descriptor, path):
            if time.monotonic() >= until:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
                raise UsageError(f"{folder} is in use by process {holder}: wait for it, or choose another --out")
            time.sleep(_POLL_SECONDS)
        _sign(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int, path: Path) -> bool:
    assert fcntl
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocksError(
            f"{path} cannot be locked: {error.strerror}; choose an --out on a filesystem that has locks"
        ) from None
    return True


def _sign(descriptor: int, path: Path) -> None:
    """Write down whose the folder is."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another --out") from None
