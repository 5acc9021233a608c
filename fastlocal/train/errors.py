"""What a person can mend: each is shown as one line, without a traceback."""


class UsageError(Exception):
    """Something asked for cannot be: a flag, a data file, a checkpoint, a folder. Exit code 2."""


class RunError(Exception):
    """Something failed on the way: training diverged, the disk is full. Exit code 1."""


class RunDivergedError(RunError):
    """The loss or all workers' parameters are no longer finite: the same run would end so again."""
