"""What a person can mend: each is shown as one line, without a traceback."""

import errno

_NO_MEMORY = ("can't allocate memory", "out of memory")
"""PyTorch's words, of the processor's and of a GPU's."""


class UsageError(Exception):
    """Something asked for cannot be: a flag, a data file, a checkpoint, a folder. Exit code 2."""


class RunError(Exception):
    """Something failed on the way: training diverged, the disk is full. Exit code 1."""


class RunDivergedError(RunError):
    """The loss or all workers' parameters are no longer finite: the same run would end so again."""


def of_the_machine(error: Exception) -> RunError | None:
    """What the machine refused, memory or a file, in one line; None for any other error, which is a defect of ours.

    What a run keeps has errors of its own. This is for all else: standard output, something small, a folder that
    may not be entered.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return RunError(f"{error.filename} cannot be used: {error.strerror}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"standard output or a file cannot be written: {error.strerror}")
    # PyTorch has a class of its own for a GPU's memory alone.
    refused = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    if refused or isinstance(error, MemoryError):
        return RunError(f"out of memory: take fewer images, workers, or images a batch ({error})")
    return None
