"""An interval from the training loss."""

import math
from typing import Any

from fastlocal.policy.base import Stats, require_bounds


class AdaComm:
    """⌈initial · √(F/F₀)⌉ for the training loss F: the interval shrinks as the loss does.

    The paper's basic rule, without what it adds for a plateau and for a learning rate that falls.

    Args:
        initial: local steps while the first observed loss, F₀, is the last one.
        maximum: the interval never rises above it.

    Raises:
        TypeError: an interval is not a whole number.
        ValueError: a value is out of its range.

    References:
        Wang and Joshi, `Adaptive Communication Strategies <https://arxiv.org/abs/1810.08313>`_, 2019, section 4
    """

    reads_drift = False

    def __init__(self, initial: int, *, maximum: int = 1024) -> None:
        self.initial, self.maximum = require_bounds(initial, maximum, "initial")
        self.first_loss: float | None = None

    def next_interval(self, stats: Stats) -> int:
        """From the last observed training loss."""
        if stats.train_loss is None:
            return self.initial
        if self.first_loss is None:
            if stats.train_loss <= 0:
                raise ValueError(f"train_loss must be positive at first, got {stats.train_loss}")
            self.first_loss = stats.train_loss
        ratio = max(stats.train_loss, 0.0) / self.first_loss
        return min(max(1, math.ceil(self.initial * math.sqrt(ratio))), self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """The first observed loss."""
        return {"first_loss": self.first_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        self.first_loss = state_dict["first_loss"]
