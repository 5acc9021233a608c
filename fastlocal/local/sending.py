"""A sync that is under way: the workers go on from what they have sent, and take over later what became of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlocal.comm import Sum

_COLUMNS_AT_ONCE = 2**20


@dataclass
class Sending:
    """What a round that was closed needs to end.

    Attributes:
        rows: of each block, shape (k, n): what was sent; while it lands, what each worker has done since.
        rates: of each block, one a parameter; None for what takes the plain mean.
        weights: relative ones, of all workers.
        reads_drift: whether somebody wants to know it.
        sums: of each block over the processes; None where there are no others, or where the state was loaded: the
            rows are sent again at the end then.
    """

    rows: list[Tensor]
    rates: list[list[float | None]]
    weights: list[float]
    reads_drift: bool
    sums: list[Sum] | None = None

    def go_on(self) -> None:
        """Send what follows the first messages. All processes do that at the same point."""
        for each in self.sums or ():
            each.go_on()

    def wait(self) -> None:
        """Until the sums are there. All processes do that at the same point."""
        for each in self.sums or ():
            each.wait()

    def state_dict(self) -> dict[str, Any]:
        """All but what is under way: a process that saves may be the only one."""
        return {
            "blocks": [
                {"rows": rows, "rates": _as_tensor([math.nan if rate is None else rate for rate in rates])}
                for rows, rates in zip(self.rows, self.rates, strict=True)
            ],
            "weights": _as_tensor(self.weights),
            "reads_drift": self.reads_drift,
        }


def exchange_with_progress_(rows: Tensor, sent: Tensor) -> None:
    """rows ← sent and sent ← rows − sent, without a third tensor of their size."""
    for now, then in zip(rows.split(_COLUMNS_AT_ONCE, dim=1), sent.split(_COLUMNS_AT_ONCE, dim=1), strict=True):
        progress = now - then
        now.copy_(then)
        then.copy_(progress)


def sending_from(state: dict[str, Any], blocks: Sequence[Tensor]) -> Sending:
    """What state_dict() returned, in memory of its own, on the devices of the blocks."""
    return Sending(
        rows=[own["rows"].to(block.device, copy=True) for own, block in zip(state["blocks"], blocks, strict=True)],
        rates=[[None if math.isnan(rate) else rate for rate in own["rates"].tolist()] for own in state["blocks"]],
        weights=state["weights"].tolist(),
        reads_drift=state["reads_drift"],
    )


def form_of_sending(blocks: Sequence[Tensor], num_slots: Sequence[int], num_workers: int) -> dict[str, Any]:
    """What state_dict() returns, as far as its form goes."""
    return {
        "blocks": [
            {"rows": block, "rates": torch.empty(slots, device="cpu")}
            for block, slots in zip(blocks, num_slots, strict=True)
        ],
        "weights": torch.empty(num_workers, device="cpu"),
        "reads_drift": False,
    }


def _as_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
