"""Under torchrun: join the other processes of the program, and leave them."""

import os
import time
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastlocal.comm.find import find_group, is_initialized
from fastlocal.comm.group import Group

TIMEOUT_SECONDS = 300.0
"""How long a collective waits for a process before the others give it up."""

_SECONDS_BETWEEN_LOOKS = 0.02


class RendezvousError(RuntimeError):
    """The processes that were started did not find each other."""


def launched_processes() -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        ValueError: the environment says something else than a number.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if not (processes.isdecimal() and int(processes)):
        raise ValueError(f"WORLD_SIZE must be a whole number of at least 1, got {processes!r}")
    return int(processes)


def launched_rank() -> int:
    """This process's number among those that torchrun started; 0 without it.

    Raises:
        ValueError: the environment speaks of several processes, but not as torchrun does.
    """
    return 0 if launched_processes() == 1 else _number("RANK", launched_processes())


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def note_for_restarts(text: str) -> None:
    """Tell the processes that torchrun may start in this one's place."""
    if is_initialized():
        _job_store().set(f"fastlocal/{text}", "1")


def was_noted(text: str) -> bool:
    """Whether a process that failed had left this note; to be asked before any process of this attempt leaves it."""
    return is_initialized() and _job_store().check([f"fastlocal/{text}"])


def _job_store() -> Any:
    """The store that all attempts share."""
    from torch.distributed import distributed_c10d  # not in a torch that was built without

    store = distributed_c10d._get_default_store()
    while isinstance(store, distributed_c10d.PrefixStore):
        store = store.underlying_store
    return store


def join(device: torch.device, timeout: float = TIMEOUT_SECONDS) -> Group | None:
    """Meet the other processes, by NCCL for tensors on GPUs and gloo for the rest; None if there are no others.

    Args:
        device: of the parameters.
        timeout: seconds to wait for the others, and that a collective may take.

    Raises:
        ValueError: the environment speaks of several processes, but not as torchrun does, or torch has no
            torch.distributed.
        RendezvousError: one has not come, or the place to meet cannot be reached.
    """
    if launched_processes() == 1:
        return None
    rank, port = _read_environment()
    began, store = time.monotonic(), None
    try:
        job = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            port,
            is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0,
            timeout=timedelta(seconds=timeout),
        )
        store = _store_of_attempt(job, rank, began + timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=launched_processes(),
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{port}"
        raise RendezvousError(
            f"rank {rank} of {launched_processes()} did not meet the others at {place} (MASTER_ADDR and MASTER_PORT) "
            f"in {time.monotonic() - began:.1f} s: {_absent(store) or str(error).splitlines()[0]}"
        ) from error
    return find_group(None, timeout, [device])


def _read_environment() -> tuple[int, int]:
    """This process's rank, and the port where all meet."""
    processes = launched_processes()
    if not dist.is_available():
        raise ValueError(f"WORLD_SIZE is {processes}, but this torch was built without torch.distributed: start one")
    rank = _number("RANK", processes)
    _setting("MASTER_ADDR")
    return rank, _number("MASTER_PORT", 1 << 16)


def _setting(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"WORLD_SIZE is {launched_processes()} but {name} is not set: start with torchrun")
    return os.environ[name]


def _number(name: str, limit: int) -> int:
    value = _setting(name)
    if not (value.isdecimal() and int(value) < limit):
        raise ValueError(f"{name} must be a number from 0 to {limit - 1}, got {value!r}")
    return int(value)


def _store_of_attempt(job: Any, rank: int, end: float) -> Any:
    """The part of the store that this attempt's processes have to themselves.

    One store may serve every attempt, and gloo would find the addresses of processes that are dead: it then hangs.
    torchrun's count of restarts does not tell attempts apart: each machine counts its own processes' deaths alone.
    So rank 0 draws a name, and tells it to whoever asks by a token of its own: no earlier attempt knows either.
    """
    if rank != 0:
        token = uuid.uuid4().hex
        job.set(f"fastlocal/asks/{rank}", token)
        try:
            name = job.get(f"fastlocal/answer/{token}").decode()
        except dist.DistStoreError as error:
            raise RuntimeError("rank 0 did not come") from error
        store = dist.PrefixStore(name, job)  # pyright: ignore[reportPrivateImportUsage]
        store.set(_came(rank), token)
        return store
    name = f"fastlocal/attempt/{uuid.uuid4().hex}"
    store = dist.PrefixStore(name, job)  # pyright: ignore[reportPrivateImportUsage]
    store.set(_came(0), "1")
    absent = set(range(1, launched_processes()))
    while absent and time.monotonic() < end:
        absent = set()
        for other in range(1, launched_processes()):
            token = _entry(job, f"fastlocal/asks/{other}")
            if token and token == _entry(store, _came(other)):
                continue  # until it dies, is started again and asks anew
            absent.add(other)
            if token:  # which may be that of a process that is dead
                job.set(f"fastlocal/answer/{token.decode()}", name)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if absent:
        raise RuntimeError(_did_not_come(absent))
    return store


def _entry(store: Any, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""


def _came(rank: int) -> str:
    return f"fastlocal/came/{rank}"


def _absent(store: Any) -> str:
    """Which ranks have not come to the store, if it can tell."""
    try:
        absent = [] if store is None else [r for r in range(launched_processes()) if not store.check([_came(r)])]
    except RuntimeError:
        return ""
    return _did_not_come(absent) if absent else ""


def _did_not_come(ranks: Iterable[int]) -> str:
    return f"{', '.join(f'rank {rank}' for rank in sorted(ranks))} did not come"


def leave() -> None:
    """End the communication in good order; a process that fails does not wait for it."""
    if is_initialized():
        dist.destroy_process_group()
