"""The processes that train together: collectives that end in an error with a name, not in a hang.

Before its collectives each process leaves a note in the group's store, saying how far it has come. When a
collective fails or takes too long, the others read the notes and say who is missing.
"""

import ctypes
import math
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

Operation = Literal["sum", "max", "min", "mean"]

_GRACE_SECONDS = 3.0
"""How long the survivors of a broken collective look at the notes before they name who is missing."""


class LostRankError(RuntimeError):
    """A process of the group has ended, stalled, or went another way."""


class _Note(NamedTuple):
    """What a process has written about itself."""

    meetings: int  # how many points with collectives it has reached
    local_steps: int
    failed: int  # 1 once a collective has failed there


def several_processes_run() -> bool:
    """Whether torch.distributed is initialised with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_group(process_group: Any, timeout: float, device: torch.device) -> "Group | None":
    """The group to train with: the one given, else the default one; None if it has one process only.

    Args:
        process_group: a torch.distributed process group that this process is in, or None.
        timeout: seconds that a collective may take.
        device: of the parameters.

    Raises:
        TypeError: process_group is something else.
        ValueError: this process is not in it, or timeout is not positive.
    """
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
    if process_group is None:
        if not several_processes_run():
            return None
        process_group = dist.group.WORLD
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process is in: it is not")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {process_group!r}")
    return Group(process_group, timeout, device) if process_group.size() > 1 else None


class Group:
    """A process group of several processes.

    Args:
        process_group: which.
        timeout: seconds that a collective may take.
        device: of the parameters; messages travel there if the group cannot send from the CPU.

    Attributes:
        rank: this process's number in the group.
        takes_means: whether reduce_ can take a "mean" of tensors on `device`.
        ranks: the global rank of every process, in the group's order.
    """

    def __init__(self, process_group: dist.ProcessGroup, timeout: float, device: torch.device) -> None:
        self.process_group, self.timeout = process_group, timeout
        self.rank = process_group.rank()
        self.ranks: list[int] = dist.get_process_group_ranks(process_group)
        backends = dist.get_backend_config(process_group)
        sends_from_cpu = "cpu:" in backends
        # Gloo has no mean.
        self.takes_means = device.type == "cuda" and "cuda:nccl" in backends
        self._device = torch.device("cpu") if sends_from_cpu else device
        notes = distributed_c10d.PrefixStore(
            f"fastlocal/{process_group.group_name}", distributed_c10d._get_default_store()
        )
        # The n-th wrapper in one process is the n-th in every other: each has notes of its own.
        number = notes.add(f"wrappers/{self.rank}", 1)
        self._notes = distributed_c10d.PrefixStore(str(number), notes)
        self._own = _Note(0, 0, 0)
        self._purpose = ""

    def __len__(self) -> int:
        return len(self.ranks)

    def __deepcopy__(self, memo: dict) -> "Group":
        return self  # a copy of a wrapper talks to the copies in the same processes

    def __reduce__(self) -> Any:
        raise TypeError("a wrapper that is in a process group cannot be pickled: save its state_dict()")

    def arrive(self, purpose: str, local_steps: int) -> None:
        """Note that this process has come to a point where all meet, and what for."""
        self._purpose = purpose
        self._own = _Note(self._own.meetings + 1, local_steps, 0)
        self._leave_note()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, in the group's order; all give equally many."""
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        return torch.stack(self._gather_tensors(own)).tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Everybody's object, in the group's order: for rare, small messages."""
        packed = pickle.dumps(value)
        sizes = [int(size) for (size,) in self.gather([len(packed)])]
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        everybody = self._gather_tensors(own.to(self._device))
        return [pickle.loads(_bytes_of(each, size)) for each, size in zip(everybody, sizes, strict=True)]

    def broadcast_bytes(self, packed: bytes | None, size: int, source: int) -> bytes:
        """The bytes that process `source` of the group gives; all know how many they are."""
        if packed is None:
            message = torch.empty(size, dtype=torch.uint8, device=self._device)
        else:
            message = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self._device)
        self.broadcast_(message, source)
        return _bytes_of(message, size)

    def broadcast_object(self, value: Any, source: int) -> Any:
        """The object that process `source` of the group gives; the others' are ignored."""
        packed = pickle.dumps(value) if self.rank == source else None
        sizes = self.gather([0 if packed is None else len(packed)])
        return pickle.loads(self.broadcast_bytes(packed, int(sizes[source][0]), source))

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Overwrite the contiguous tensor with that of process `source` of the group."""
        if tensor.numel():
            self._run(
                lambda: dist.broadcast(tensor, self.ranks[source], group=self.process_group, async_op=True),
                tensor.device,
            )

    def reduce_(self, tensor: Tensor, operation: Operation) -> None:
        """Overwrite the contiguous tensor with the sum, maximum, minimum or mean over all processes."""
        operations = {
            "sum": dist.ReduceOp.SUM,
            "max": dist.ReduceOp.MAX,
            "min": dist.ReduceOp.MIN,
            "mean": dist.ReduceOp.AVG,
        }
        if tensor.numel():
            self._run(
                lambda: dist.all_reduce(tensor, operations[operation], group=self.process_group, async_op=True),
                tensor.device,
            )

    def _gather_tensors(self, own: Tensor) -> list[Tensor]:
        everybody = [torch.empty_like(own) for _ in self.ranks]
        # The host waits for messages: on CUDA too a process that does not come is noticed here.
        self._run(
            lambda: dist.all_gather(everybody, own, group=self.process_group, async_op=True),
            torch.device("cpu"),
        )
        return everybody

    def _run(self, start: Callable[[], dist.Work | None], device: torch.device) -> None:
        began = time.monotonic()
        try:
            work = start()
            assert work is not None
            if device.type == "cpu":
                work.wait(timedelta(seconds=self.timeout))
            else:
                work.wait()  # in stream order; the host goes on
        except RuntimeError as error:
            raise LostRankError(self._say_who_is_missing(time.monotonic() - began, error)) from error

    def _leave_note(self) -> None:
        try:
            self._notes.set(str(self.rank), ",".join(map(str, self._own)))
        except RuntimeError as error:
            raise LostRankError(self._without_store()) from error

    def _say_who_is_missing(self, seconds: float, error: RuntimeError) -> str:
        self._own = self._own._replace(failed=1)
        until = time.monotonic() + min(_GRACE_SECONDS, self.timeout)
        try:
            self._leave_note()
            while True:
                notes = self._read_notes()
                behind = [rank for rank, note in notes.items() if note.meetings < self._own.meetings]
                silent = [rank for rank, note in notes.items() if not note.failed and rank not in behind]
                late = behind and seconds >= self.timeout
                if late or not (behind or silent) or time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:
            return self._without_store()
        own = f"rank {self.ranks[self.rank]} waited {seconds:.1f} s to {self._purpose} at local step "
        own += f"{self._own.local_steps}"
        if behind:
            missing = ", ".join(
                f"rank {self.ranks[rank]} has not arrived ({self._last_seen(notes[rank])})" for rank in behind
            )
        elif silent:
            missing = ", ".join(f"rank {self.ranks[rank]} arrived and fell silent" for rank in silent)
        else:
            missing = f"all ranks had arrived, and the transfer failed: {error}"
        return f"{own}: {missing}. A process has ended, stalled or takes fewer steps; the group is broken"

    def _without_store(self) -> str:
        return (
            f"rank {self.ranks[self.rank]} wanted to {self._purpose} at local step {self._own.local_steps}, and "
            "torch.distributed's store no longer answers: the process that keeps it (rank 0, or torchrun) has ended"
        )

    def _read_notes(self) -> dict[int, _Note]:
        notes = {}
        for rank in range(len(self.ranks)):
            if rank != self.rank:
                known = self._notes.check([str(rank)])
                fields = self._notes.get(str(rank)).decode().split(",") if known else ("0", "0", "0")
                notes[rank] = _Note(*map(int, fields))
        return notes

    @staticmethod
    def _last_seen(note: _Note) -> str:
        return f"last seen at local step {note.local_steps}" if note.meetings else "never seen"


def _bytes_of(message: Tensor, size: int) -> bytes:
    return ctypes.string_at(message.cpu().data_ptr(), size)
