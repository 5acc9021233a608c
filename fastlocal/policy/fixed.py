"""Intervals that are settled before the run."""

from typing import Any

from fastlocal.policy.base import Stateless, Stats, require_count, require_interval


class FixedInterval(Stateless):
    """The same number of local steps in every round.

    Args:
        interval: local steps a round, at least 1.

    Raises:
        TypeError: the interval is not a whole number.
        ValueError: it is below 1.
    """

    def __init__(self, interval: int) -> None:
        self.interval = require_interval("interval", interval)

    def next_interval(self, stats: Stats) -> int:
        """The interval."""
        return self.interval

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {"interval": self.interval}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned. An older version's is empty: the settings then stay."""
        if state_dict:
            FixedInterval.__init__(self, **state_dict)


class PostLocal(Stateless):
    """A sync after every step at first, then an interval.

    Args:
        start_step: local steps before the interval applies, at least 0.
        interval: local steps a round from there on, at least 1.

    Raises:
        TypeError: an interval is not a whole number.
        ValueError: a value is out of its range.

    References:
        Lin et al., `Don't Use Large Mini-Batches, Use Local SGD <https://arxiv.org/abs/1808.07217>`_, 2020
    """

    def __init__(self, start_step: int, interval: int) -> None:
        self.start_step = require_count("start_step", start_step, 0)
        self.interval = require_interval("interval", interval)

    def next_interval(self, stats: Stats) -> int:
        """1 before the start step, then the interval."""
        return self.interval if stats.local_steps >= self.start_step else 1

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {"start_step": self.start_step, "interval": self.interval}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned. An older version's is empty: the settings then stay."""
        if state_dict:
            PostLocal.__init__(self, **state_dict)
