"""A run's checkpoint: one file, written whole or not at all, refused if a byte of it changed."""

import contextlib
import errno
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from fastlocal.train.errors import RunError, UsageError

_DIGEST_TAG = b"\nfastlocal-sha256:"
_TRAILER_LENGTH = len(_DIGEST_TAG) + 64
_ADVICE = dict.fromkeys((errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM), "; use another folder")
_ADVICE |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space, or use another folder")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever is killed on the way leaves the old one.

    Raises:
        RunError: the file cannot be written; the old one is untouched and nothing new is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        raise RunError(f"{path} cannot be written: {error.strerror}{advice}") from None
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: torch.load reads it too, its digest stands behind the last byte.

    Raises:
        RunError: the file cannot be written; the last checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_bytes(path, content + _DIGEST_TAG + hashlib.sha256(content).hexdigest().encode())


def read(path: Path) -> bytes:
    """The bytes of a checkpoint, found whole.

    Raises:
        UsageError: it cannot be read, or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    body, trailer = content[:-_TRAILER_LENGTH], content[-_TRAILER_LENGTH:]
    if trailer != _DIGEST_TAG + hashlib.sha256(body).hexdigest().encode():
        raise UsageError(f"{path} is damaged (its SHA-256 does not match): delete it to begin the run again")
    return body


def decode(content: bytes) -> dict[str, Any]:
    """The state in what read() returned."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
