"""An interval from the workers' drift."""

import math
from typing import Any

from fastlocal.policy.base import Stats, require_bounds, require_within


class ConsensusDistance:
    """Steer the interval so that the workers' drift at a sync stays near a target.

    Drift grows with the interval, so the next interval is the last one times target/drift, at most doubled
    or halved. The rule is ours; that drift below some target costs no accuracy is the paper's finding.

    Args:
        target: the wanted drift, mean over the workers of ‖x_k − x̄‖.
        initial: local steps of the first round.
        minimum: the interval never falls below it.
        maximum: nor rises above it.

    Raises:
        TypeError: an interval is not a whole number.
        ValueError: a value is out of its range.

    References:
        Kong et al., `Consensus Control <https://arxiv.org/abs/2102.04828>`_, 2021
    """

    reads_drift = True

    def __init__(self, target: float, *, initial: int = 16, minimum: int = 1, maximum: int = 1024) -> None:
        if not (target > 0 and math.isfinite(target)):
            raise ValueError(f"target must be positive and finite, got {target}")
        self.target = float(target)
        self.minimum, self.maximum = require_bounds(minimum, maximum)
        self.interval = require_within("initial", initial, minimum, maximum)
        self.rounds = 0

    def next_interval(self, stats: Stats) -> int:
        """The interval, steered once a round by the drift of the last sync.

        A round cut short says little: from half the interval on its drift is scaled up, below that it counts only
        where it exceeds the target already.
        """
        tells = 2 * stats.round_steps >= self.interval or stats.drift > self.target
        measured = stats.rounds > self.rounds and stats.round_steps > 0 and tells
        if measured and math.isfinite(stats.drift):
            drift = stats.drift * self.interval / stats.round_steps
            factor = min(max(self.target / drift, 0.5), 2.0) if drift > 0 else 2.0
            self.interval = min(max(round(self.interval * factor), self.minimum), self.maximum)
        self.rounds = stats.rounds
        return self.interval

    def state_dict(self) -> dict[str, Any]:
        """The interval and the rounds seen."""
        return {"interval": self.interval, "rounds": self.rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        self.interval, self.rounds = state_dict["interval"], state_dict["rounds"]
