"""The processes that train together: collectives that end in an error with a name, not in a hang.

When a collective fails or takes too long, the notes in the group's store say who is missing.
"""

import ctypes
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastlocal.comm.answer import require_answers, within
from fastlocal.comm.lent import keep, lent, let_go
from fastlocal.comm.notes import Notes
from fastlocal.comm.turn import Turn

T = TypeVar("T")
Operation = Literal["sum", "max", "min", "mean"]

_GRACE_SECONDS = 3.0
"""How long the survivors of a broken collective look at the notes before they name who is missing."""

_ANSWER_SECONDS = 5.0
"""How long the store may take to answer: a request to it has no time limit of its own."""

_WATCHDOG_SECONDS = 30.0
"""How much later NCCL's own watchdog may end the process: by then the error with a name has been raised."""


class LostRankError(RuntimeError):
    """A process of the group has ended, stalled, or went another way.

    What was to be averaged may be half averaged: go on from a checkpoint.
    """


def ring_bytes(payload: int, workers: int) -> int:
    """Bytes that one worker sends in a ring all-reduce of `payload` bytes."""
    return 2 * (workers - 1) * payload // workers


class Group:
    """A process group of several processes.

    Args:
        process_group: which.
        timeout: seconds that a collective may take.
        device: of the parameters; messages travel there if the group cannot send from the CPU.

    Attributes:
        rank: this process's number in the group.
        in_stream_order: whether what is sent from `device` ends on it, and the host goes on (NCCL).
        ranks: the global rank of every process, in the group's order.
        number: which of the wrappers of this process in the process group it is for, the first being 1.
    """

    def __init__(self, process_group: "dist.ProcessGroup", timeout: float, device: torch.device) -> None:
        from torch.distributed import distributed_c10d  # not in a torch that was built without

        self.process_group, self.timeout = process_group, timeout
        self.rank = process_group.rank()
        self.ranks: list[int] = dist.get_process_group_ranks(process_group)
        backends = dist.get_backend_config(process_group)
        sends_from_cpu = "cpu:" in backends
        self._has_nccl = "cuda:nccl" in backends
        self.in_stream_order = self._by_nccl(device)
        self._device = torch.device("cpu") if sends_from_cpu else device
        store = distributed_c10d.PrefixStore(
            f"fastlocal/{process_group.group_name}", distributed_c10d._get_default_store()
        )
        # The n-th wrapper in one process is the n-th in every other: each has notes of its own.
        self.number: int = store.add(f"wrappers/{self.rank}", 1)
        self._store = distributed_c10d.PrefixStore(str(self.number), store)
        self._notes = Notes(self._store, self.rank, self.ranks)
        self._purpose, self._local_steps, self._turns = "", 0, 0

    def __len__(self) -> int:
        return len(self.ranks)

    def __deepcopy__(self, memo: dict) -> "Group":
        return self  # a copy of a wrapper talks to the copies in the same processes

    def __reduce__(self) -> Any:
        raise TypeError("a wrapper that is in a process group cannot be pickled: save its state_dict()")

    def arrive(self, purpose: str, local_steps: int) -> None:
        """Note that this process has come to a point where all meet, and what for."""
        self._purpose, self._local_steps = purpose, local_steps
        self._asking(lambda: self._notes.arrive(local_steps))

    @contextmanager
    def watching(self, purpose: str, local_steps: int) -> Iterator[None]:
        """Around collectives that others start, such as DistributedDataParallel: who is lost there is named too.

        On CUDA they end in stream order, and a process that is lost is found at the next message between hosts.
        """
        self.arrive(purpose, local_steps)
        began = time.monotonic()
        try:
            with self._notes.waiting():
                yield
        except RuntimeError as error:
            if not _is_of_a_transfer(error):
                raise
            raise self._lost(time.monotonic() - began, error) from error

    def finish(self, is_done: Callable[[], bool]) -> None:
        """Wait until the device has ended what was sent to it, and no longer than `timeout`.

        A wait with a timeout of torch's own looks once a millisecond, and holds up the sends that follow.
        """
        began = time.monotonic()
        with self._notes.waiting():
            while not is_done():
                seconds = time.monotonic() - began
                if seconds >= self.timeout:
                    raise self._lost(seconds, None)
                time.sleep(0 if seconds < 0.01 else 0.001)

    def by_one(self, source: int, call: Callable[[], T]) -> T | None:
        """What the call returns in process `source`, where alone it is made; None in the others.

        They wait for as long as it takes, past `timeout` too, and no longer than that process is alive.
        """
        self.gather([source])  # a process that is lost already is found here
        self._turns += 1
        turn = Turn(self._store, f"turn/{self._turns}")
        if self.rank == source:
            self._asking(turn.begin)
            try:
                return call()
            finally:
                self._asking(turn.end)
        began = time.monotonic()
        silent = self._asking(turn.wait)
        if silent:
            raise LostRankError(
                f"{self._waited(time.monotonic() - began)}: rank {self.ranks[source]}, at work alone, has given no "
                f"sign of life for {silent:.0f} s. It has ended or is stopped; the group is broken"
            )
        return None

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, in the group's order; all give equally many.

        Each sends its own to all others at once: an all-gather would pass them around a ring, hop after hop.
        """
        own = torch.tensor([[*values]] * len(self), dtype=torch.float64, device=self._device)
        received = torch.empty_like(own)
        # The host waits for messages: on CUDA too a process that does not come is noticed here.
        self._run(lambda: self._all_to_all(received, own), own.device, host_waits=True)
        return received.tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Everybody's object, in the group's order: for rare, small messages."""
        packed = pickle.dumps(value)
        sizes = [int(size) for (size,) in self.gather([len(packed)])]
        own = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        own[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        everybody = self._gather_tensors(own.to(self._device))
        return [pickle.loads(_bytes_of(each, size)) for each, size in zip(everybody, sizes, strict=True)]

    def broadcast_bytes(self, packed: bytes | None, size: int, source: int) -> bytes:
        """The bytes that process `source` of the group gives; all know how many they are."""
        if packed is None:
            message = torch.empty(size, dtype=torch.uint8, device=self._device)
        else:
            message = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self._device)
        self._broadcast_(message, source, host_waits=True)
        return _bytes_of(message, size)

    def broadcast_object(self, value: Any, source: int) -> Any:
        """The object that process `source` of the group gives; the others' are ignored."""
        packed = pickle.dumps(value) if self.rank == source else None
        sizes = self.gather([0 if packed is None else len(packed)])
        return pickle.loads(self.broadcast_bytes(packed, int(sizes[source][0]), source))

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Overwrite the contiguous tensor with that of process `source` of the group."""
        self._broadcast_(tensor, source, host_waits=False)

    def _broadcast_(self, tensor: Tensor, source: int, host_waits: bool) -> None:
        if tensor.numel():
            options = self._options("Broadcast", tensor.device)
            options.rootRank = source
            self._run(lambda: self.process_group.broadcast([lent(tensor)], options), tensor.device, host_waits)

    def reduce_(self, tensor: Tensor, operation: Operation) -> None:
        """Overwrite the contiguous tensor with the sum, maximum, minimum or mean over all processes."""
        if tensor.numel():
            self._run(lambda: self._all_reduce(tensor, operation), tensor.device)

    def _all_reduce(self, tensor: Tensor, operation: Operation) -> "dist.Work":
        operations = {
            "sum": dist.ReduceOp.SUM,
            "max": dist.ReduceOp.MAX,
            "min": dist.ReduceOp.MIN,
            "mean": dist.ReduceOp.AVG,
        }
        options = self._options("Allreduce", tensor.device)
        options.reduceOp = operations[operation]
        return self.process_group.allreduce([lent(tensor)], options)

    def send_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to overwrite the contiguous tensor with the sum over all processes; returns what waits for it."""
        return self._begin(lambda: self._all_reduce(tensor, "sum"), tensor.device)

    def send_parts(self, received: Tensor, parts: Tensor) -> Callable[[], None]:
        """Begin to send parts[i] to the i-th process, and to receive its own; returns what waits for that."""
        return self._begin(lambda: self._all_to_all(received, parts), parts.device)

    def send_to_all(self, received: Tensor, own: Tensor) -> Callable[[], None]:
        """Begin to send all a tensor, and to receive theirs; returns what waits for that."""
        return self._begin(lambda: self._all_gather(received.unbind(), own), own.device)

    def _begin(self, start: "Callable[[], dist.Work]", device: torch.device) -> Callable[[], None]:
        with self._waiting():
            work = start()
        keep(work)

        def wait() -> None:
            with self._waiting():
                self._wait(work, device, host_waits=False)
            let_go(work)

        return wait

    def _all_to_all(self, received: Tensor, parts: Tensor) -> "dist.Work":
        """What all send this process, in the group's order, who sends parts[i] to the i-th of them."""
        options = self._options("AllToAll", parts.device)
        return self.process_group.alltoall_base(lent(received), lent(parts), [], [], options)

    def _gather_tensors(self, own: Tensor) -> list[Tensor]:
        everybody = [torch.empty_like(own) for _ in self.ranks]
        self._run(lambda: self._all_gather(everybody, own), own.device, host_waits=True)
        return everybody

    def _all_gather(self, everybody: Sequence[Tensor], own: Tensor) -> "dist.Work":
        options = self._options("Allgather", own.device)
        return self.process_group.allgather([list(map(lent, everybody))], [lent(own)], options)

    def _by_nccl(self, device: torch.device) -> bool:
        return self._has_nccl and device.type == "cuda"

    def _options(self, collective: str, device: torch.device) -> Any:
        """Of a collective: its time. Gloo ends it then, since one that nobody waits for any more holds up the exit.

        NCCL's watchdog ends the whole process then, and so comes after whoever waits here.
        """
        options = getattr(dist.distributed_c10d, f"{collective}Options")()
        seconds = self.timeout + _WATCHDOG_SECONDS if self._by_nccl(device) else self.timeout
        options.timeout, options.asyncOp = timedelta(seconds=seconds), True
        return options

    def _run(self, start: "Callable[[], dist.Work]", device: torch.device, host_waits: bool = False) -> None:
        """Start a collective of tensors on the device, and wait for it: by NCCL in stream order, unless told else."""
        with self._waiting():
            self._wait(start(), device, host_waits)

    def _wait(self, work: "dist.Work", device: torch.device, host_waits: bool) -> None:
        if not self._by_nccl(device):
            work.wait(timedelta(seconds=self.timeout))
            return
        if host_waits:  # not by a wait with a timeout, which calls the watchdog
            self.finish(work.is_completed)
        work.wait()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around what may find that a process is lost."""
        began = time.monotonic()
        try:
            with self._notes.waiting():
                yield
        except LostRankError:
            raise
        except RuntimeError as error:
            raise self._lost(time.monotonic() - began, error) from error

    def _asking(self, ask: Callable[[], T]) -> T:
        """What the store says."""
        try:
            require_answers()
            return ask()
        except RuntimeError as error:
            raise LostRankError(self._without_store()) from error

    def _lost(self, seconds: float, error: RuntimeError | None) -> LostRankError:
        """Who is missing, now that a collective has failed or taken too long."""
        late = seconds >= self.timeout
        grace = min(_GRACE_SECONDS, self.timeout)
        limit = grace + _ANSWER_SECONDS
        missing = self._asking(lambda: within(limit, lambda: self._notes.find_missing(late, grace)))
        failed = "did not end" if error is None else f"failed: {error}"
        said = missing or f"all ranks had arrived, and the transfer {failed}"
        return LostRankError(
            f"{self._waited(seconds)}: {said}. A process has ended, stalled or takes fewer steps; the group is broken"
        )

    def _waited(self, seconds: float) -> str:
        return f"rank {self._named()} waited {seconds:.1f} s to {self._purpose} at local step {self._local_steps}"

    def _without_store(self) -> str:
        return (
            f"rank {self._named()} wanted to {self._purpose} at local step {self._local_steps}, and "
            "torch.distributed's store no longer answers: the process that keeps it (rank 0, or torchrun) has ended "
            "or is stopped"
        )

    def _named(self) -> int:
        return self.ranks[self.rank]


def _is_of_a_transfer(error: RuntimeError) -> bool:
    """Whether torch.distributed failed, and not what was computed. Gloo's errors are told by their file alone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _bytes_of(message: Tensor, size: int) -> bytes:
    on_host = message.cpu()  # a copy, if it came by the device: it must outlive the read
    return ctypes.string_at(on_host.data_ptr(), size)
