"""Under torchrun: join the other processes of the program, and leave them."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastlocal.comm.group import Group, find_group

TIMEOUT_SECONDS = 300.0
"""How long a collective waits for a process before the others give it up."""


def launched_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def note_for_restarts(text: str) -> None:
    """Tell the processes that torchrun may start in this one's place."""
    if dist.is_initialized():
        _job_store().set(f"fastlocal/{text}", "1")


def was_noted(text: str) -> bool:
    """Whether a process that failed had left this note."""
    return _attempt() > 0 and dist.is_initialized() and _job_store().check([f"fastlocal/{text}"])


def _job_store() -> Any:
    """The store that all attempts share."""
    store = distributed_c10d._get_default_store()
    while isinstance(store, distributed_c10d.PrefixStore):
        store = store.underlying_store
    return store


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join(device: torch.device) -> Group | None:
    """Meet the other processes, by NCCL for tensors on GPUs and gloo for the rest; None if there are no others.

    Raises:
        ValueError: the environment speaks of several processes, but not all that torchrun says.
    """
    if launched_processes() == 1:
        return None
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"WORLD_SIZE is {launched_processes()} but {name} is not set: start with torchrun")
    # One store serves every attempt, and gloo would find the addresses of processes that are dead: it then hangs.
    store = distributed_c10d.PrefixStore(
        f"attempt_{_attempt()}",
        dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0",
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        ),
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=launched_processes(),
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    return find_group(None, TIMEOUT_SECONDS, device)


def leave() -> None:
    """End the communication in good order; a process that fails does not wait for it."""
    if dist.is_initialized():
        dist.destroy_process_group()
