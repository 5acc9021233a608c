"""Synchronous training in several processes: PyTorch's DistributedDataParallel, counted as the other methods are."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fastlocal.comm import Group
from fastlocal.flat import Workers
from fastlocal.policy import Stats


class DataParallel:
    """One worker a process, whose gradients DistributedDataParallel averages during the backward pass.

    Has the members of a wrapper that the training loop uses. The collectives overlap with the backward pass, so
    the seconds spent in them are not known: `stats.seconds_in_sync` counts those of the buffers alone.

    Args:
        inner: takes the steps.
        workers: the one worker of this process.
        group: the processes.
    """

    def __init__(self, inner: torch.optim.Optimizer, workers: Workers, group: Group) -> None:
        self.inner, self.group = inner, group
        self.model = DistributedDataParallel(workers[0], process_group=group.process_group)
        self.stats = Stats()
        payload = workers.rows.num_bytes
        self._bytes_a_step = 2 * (len(group) - 1) * payload // len(group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.inner.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step with the gradients, which are the mean already."""
        self.inner.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.stats.rounds += 1
        self.stats.local_steps += 1
        self.stats.bytes_on_wire += self._bytes_a_step
        self.stats.bytes_synchronous += self._bytes_a_step

    @torch.no_grad()
    def sync(self) -> None:
        """Take the buffers of process 0, as each forward pass does."""
        started = time.perf_counter()
        self.group.arrive("broadcast buffers", self.stats.local_steps)
        for buffer in self.model.module.buffers():
            self.group.broadcast_(buffer, 0)
        self.stats.seconds_in_sync += time.perf_counter() - started

    def observe(self, *, val_loss: float | None = None, train_loss: float | None = None) -> None:
        """No policy asks for it."""

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict with an entry "fastlocal"."""
        return {**self.inner.state_dict(), "fastlocal": {"method": "DataParallel", "stats": asdict(self.stats)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned.

        Raises:
            ValueError: it is a wrapper's, whose gradients were averaged within one process.
        """
        own = state_dict["fastlocal"]
        if own["method"] != "DataParallel":
            raise ValueError("synchronous training goes on with one worker a process, or with all of them in one")
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "fastlocal"})
        self.stats = Stats(**own["stats"])
