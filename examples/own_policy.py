"""A policy of one's own: it decides how many local steps a round has.

Anything with its three methods is a policy: python examples/own_policy.py
"""

from typing import Any

import torch
from torch import nn

import fastlocal


class Doubling:
    """Starts with 1 local step and doubles the interval after every `rounds` rounds, up to a maximum."""

    def __init__(self, rounds: int, maximum: int) -> None:
        self.rounds, self.maximum = rounds, maximum
        self.asked = 0

    def next_interval(self, stats: fastlocal.Stats) -> int:
        """Asked once, when a round begins; `stats` has losses, drift, rates and counts to decide by."""
        interval = min(2 ** (self.asked // self.rounds), self.maximum)
        self.asked += 1
        return interval

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"asked": self.asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.asked = state_dict["asked"]


def main(steps: int = 60) -> tuple[list[int], float]:
    """Fits a line with two workers; returns the intervals of all rounds and the last loss."""
    torch.manual_seed(0)
    workers = fastlocal.Workers(nn.Linear(8, 1), 2)
    inner = torch.optim.SGD(workers.parameters(), lr=0.05)
    optimizer = fastlocal.LocalSGD(inner, workers, Doubling(rounds=3, maximum=16))
    truth, intervals, loss = torch.randn(8, 1), [], torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        for worker in workers:
            x = torch.randn(32, 8)
            loss = nn.functional.mse_loss(worker(x), x @ truth)
            loss.backward()
        optimizer.step()
        if optimizer.steps_in_round == 0:  # the round is over
            intervals.append(optimizer.stats.round_steps)
    optimizer.sync()
    print("local steps of each round:", *intervals)
    saved = 1 - optimizer.stats.bytes_on_wire / optimizer.stats.bytes_synchronous
    print(f"loss {loss.item():.4f}, {saved:.0%} fewer bytes than synchronous")
    return intervals, loss.item()


if __name__ == "__main__":
    main()
