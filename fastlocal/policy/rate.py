"""An interval from the learning rate."""

import math
from typing import Any

from fastlocal.policy.base import Stats, require_bounds, require_count


class QSR:
    """The quadratic synchronisation rule: max(base, ⌊(alpha/lr)²⌋), so the interval grows as the rate decays.

    A rate of 0 asks for no limit at all, so it gives `maximum`.

    Args:
        base: the least number of local steps.
        alpha: the rate at which the rule gives 1; a larger one syncs less often. With peak rate · √base the rule
            begins at `base`.
        maximum: the interval never rises above it.
        start_step: local steps before the rule applies; until then, base. None waits until the rate is lower than it
            has been: the small rates of a warm-up are no reason to sync rarely.

    Raises:
        TypeError: an interval is not a whole number.
        ValueError: a value is out of its range.

    References:
        Gu et al., `A Quadratic Synchronization Rule <https://arxiv.org/abs/2310.14423>`_, 2024, equation 2
    """

    reads_drift = False
    decides_alike = True

    def __init__(self, base: int, alpha: float, *, maximum: int = 1024, start_step: int | None = None) -> None:
        self.base, self.maximum = require_bounds(base, maximum, "base")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        # NumPy's numbers are none that torch.load(weights_only=True) takes back.
        self.alpha = float(alpha)
        self.start_step = None if start_step is None else require_count("start_step", start_step, 0)
        self._highest, self._has_fallen = 0.0, False  # the rate so far

    def next_interval(self, stats: Stats) -> int:
        """From the learning rate at the beginning of the round."""
        self._has_fallen = self._has_fallen or stats.lr < self._highest
        self._highest = max(self._highest, float(stats.lr))
        if not self._has_fallen if self.start_step is None else stats.local_steps < self.start_step:
            return self.base
        if stats.lr <= 0 or self.alpha / stats.lr >= math.sqrt(self.maximum):
            return self.maximum
        # 0.3 / 0.1 is less than 3 by its last digit.
        return max(self.base, math.floor((self.alpha / stats.lr) ** 2 * (1 + 1e-12)))

    def state_dict(self) -> dict[str, Any]:
        """The settings, and whether the rate has fallen."""
        return {
            "base": self.base,
            "alpha": self.alpha,
            "maximum": self.maximum,
            "start_step": self.start_step,
            "highest": self._highest,
            "has_fallen": self._has_fallen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned. An older version's is empty: the settings then stay."""
        if state_dict:
            settings = dict(state_dict)
            highest, has_fallen = float(settings.pop("highest", 0.0)), bool(settings.pop("has_fallen", False))
            QSR.__init__(self, **settings)
            self._highest, self._has_fallen = highest, has_fallen
