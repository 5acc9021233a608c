"""A sync that is under way: the workers go on from what they have sent, and take over later what became of it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlocal.comm import Sum


@dataclass
class Sending:
    """What a round that was closed needs to end once the sums are there.

    Attributes:
        rows: of each block, shape (k, n): what was sent.
        sums: of each block, over the processes, if there are several.
        rates: of each block, one a parameter; None for what takes the plain mean.
        weights: relative ones, of all workers.
        reads_drift: whether somebody wants to know it.
    """

    rows: list[Tensor]
    sums: list[Sum]
    rates: list[list[float | None]]
    weights: list[float]
    reads_drift: bool

    def go_on(self) -> None:
        """Send what follows the first messages. All processes do that after the same step."""
        for each in self.sums:
            each.go_on()

    def wait(self) -> None:
        """Until the sums are there. All processes do that after the same step."""
        for each in self.sums:
            each.wait()

    def state_dict(self) -> dict[str, Any]:
        """All of it, once what is under way is there; sends nothing, as one process may save alone."""
        blocks: list[dict[str, Tensor]] = []
        for rows, rates in zip(self.rows, self.rates, strict=True):
            blocks.append({"rows": rows, "rates": _as_tensor([math.nan if rate is None else rate for rate in rates])})
        for own, each in zip(blocks, self.sums, strict=False):
            each.receive()
            own["sum"] = each.tensor if each.parts is None else each.parts
        in_parts = any(each.parts is not None for each in self.sums)
        return {
            "blocks": blocks,
            "weights": _as_tensor(self.weights),
            "reads_drift": self.reads_drift,
            "in_parts": in_parts,
        }


def rates_from(saved: Tensor) -> list[float | None]:
    """Of one block, as a saved state has them."""
    return [None if math.isnan(rate) else rate for rate in saved.tolist()]


def _as_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
