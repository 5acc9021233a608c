"""The processes of a run: one alone, or those that torchrun started. Each holds an equal number of the workers."""

from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor

from fastlocal.comm import Group
from fastlocal.train.errors import RunError, UsageError

T = TypeVar("T")


class Processes:
    """What a run needs of them beside the sync.

    Args:
        group: the processes; None if this one is alone.

    Attributes:
        rank: this process's number; 0 writes the run's folder.
        local_step: where the run stands, for the error should another process be lost.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank
        self.local_step = 0

    def __len__(self) -> int:
        return 1 if self.group is None else len(self.group)

    def share(self, workers: int) -> range:
        """Which of the run's workers are here.

        Raises:
            UsageError: they cannot be shared equally.
        """
        if workers % len(self):
            raise UsageError(f"--workers must be a multiple of the {len(self)} processes, got {workers}")
        here = workers // len(self)
        return range(self.rank * here, (self.rank + 1) * here)

    def sum_(self, values: Tensor) -> None:
        """Overwrite the tensor with its sum over the processes."""
        if self.group is not None:
            self.group.arrive("add up figures", self.local_step)
            self.group.reduce_(values, "sum")

    def gather(self, value: T) -> list[T]:
        """Everybody's value, process by process."""
        if self.group is None:
            return [value]
        self.group.arrive("gather states", self.local_step)
        return self.group.gather_objects(value)

    def told_by_first(self, value: T) -> T:
        """Process 0's value."""
        if self.group is None:
            return value
        self.group.arrive("hear from the first", self.local_step)
        return self.group.broadcast_object(value, source=0)

    def from_first(self, call: Callable[[], T]) -> T:
        """What the call returns in process 0, where alone it is made, or the error that it ends with.

        The others wait while process 0 is alive, as long as a download takes.
        """
        if self.group is None:
            return call()

        def attempt() -> tuple[T | None, UsageError | RunError | None]:
            try:
                return call(), None
            except (UsageError, RunError) as error:
                return None, error

        self.group.arrive("hear from the first", self.local_step)
        value, error = self.group.broadcast_object(self.group.by_one(0, attempt), source=0)
        if error is not None:
            raise error
        return cast(T, value)
