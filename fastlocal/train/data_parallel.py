"""Synchronous training in several processes: PyTorch's DistributedDataParallel, counted as the other methods are."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fastlocal.comm import Group, ring_bytes
from fastlocal.local.shared_buffers import merge_across_
from fastlocal.policy import Stats
from fastlocal.workers import Workers


class DataParallel:
    """One worker a process, whose gradients DistributedDataParallel averages during the backward pass.

    Has the members of a wrapper that the training loop uses. The collectives overlap with the backward pass, so
    the seconds spent in them are not known: `stats.seconds_in_sync` counts those of the buffers alone.

    Buffers are averaged by sync(), as LocalSGD does, and not broadcast before each forward pass: of a model that
    does not read them while it trains, such as one with BatchNorm, that would be bytes for nothing.

    Args:
        inner: takes the steps.
        workers: the one worker of this process.
        group: the processes.
    """

    def __init__(self, inner: torch.optim.Optimizer, workers: Workers, group: Group) -> None:
        self.inner, self.group = inner, group
        with group.watching("build DistributedDataParallel", 0):
            self.model = DistributedDataParallel(workers[0], process_group=group.process_group)
        self.model.broadcast_buffers = False  # as an argument it is called otherwise from PyTorch 2.13 on
        self.stats = Stats()
        self._bytes_a_step = ring_bytes(workers.rows.num_bytes, len(group))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.inner.param_groups

    def watching(self) -> AbstractContextManager[None]:
        """To be around forward and backward pass: it names a process that is lost there."""
        return self.group.watching("average gradients", self.stats.local_steps)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step with the gradients, which are the mean already."""
        self.inner.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.stats.rounds += 1
        self.stats.local_steps += 1
        self.stats.bytes_on_wire += self._bytes_a_step
        self.stats.bytes_synchronous += self._bytes_a_step

    @torch.no_grad()
    def sync(self) -> None:
        """Average the buffers over the processes."""
        started = time.perf_counter()
        self.group.arrive("average buffers", self.stats.local_steps)
        buffers = [[buffer] for buffer in self.model.module.buffers()]
        payload = merge_across_(buffers, "average", [[True]] * len(self.group), self.group)
        self.stats.bytes_on_wire += ring_bytes(payload, len(self.group))
        self.stats.seconds_in_sync += time.perf_counter() - started

    def observe(self, *, val_loss: float | None = None, train_loss: float | None = None) -> None:
        """No policy asks for it."""

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict with an entry "fastlocal"."""
        return {**self.inner.state_dict(), "fastlocal": {"method": "DataParallel", "stats": asdict(self.stats)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "fastlocal"})
        self.stats = Stats(**state_dict["fastlocal"]["stats"])
