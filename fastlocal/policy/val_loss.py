"""An interval from the validation loss: our rule, and that of the student study from which it came."""

from typing import Any

from fastlocal.policy.base import Stats, require_bounds, require_count, require_interval, require_within

_RISE = 0.02
"""A loss this much higher has risen."""
_NEAR = 0.01
"""Above the lowest loss by more than this, a stall is no reason to sync less."""


class _FromValidationLoss:
    """Counts the observations, and keeps the interval within its bounds.

    Args:
        initial: local steps of the first round.
        total_epochs: how many observations the whole run will make.
        minimum: the interval never falls below it.
        maximum: nor rises above it.
    """

    reads_drift = False

    def __init__(self, initial: int, *, total_epochs: int, minimum: int, maximum: int) -> None:
        self.total_epochs = require_count("total_epochs", total_epochs, 1)
        self.minimum, self.maximum = require_bounds(minimum, maximum)
        self.interval = require_within("initial", initial, minimum, maximum)
        self.observations = 0

    @property
    def progress(self) -> float:
        """The part of the run that was observed."""
        return self.observations / self.total_epochs

    @property
    def threshold(self) -> float:
        """A relative decrease between two observations below this is a stall."""
        return 0.02 if self.progress <= 0.2 else 0.005 if self.progress <= 0.8 else 0.001

    def next_interval(self, stats: Stats) -> int:
        """The interval, changed if a loss was observed since the last call."""
        if stats.val_loss is not None and stats.observations != self.observations:
            self.observations = stats.observations
            self._observe(stats.val_loss, stats.train_loss)
        return self.interval

    def _observe(self, loss: float, train_loss: float | None) -> None:
        raise NotImplementedError

    def _double(self) -> None:
        self.interval = min(2 * self.interval, self.maximum)

    def _halve(self) -> None:
        self.interval = max(self.interval // 2, self.minimum)


class ValidationLoss(_FromValidationLoss):
    """Double the interval when the validation loss stalls, halve it when the loss rises.

    One observation an epoch. The losses are smoothed, s; the lowest s since the last halving is the mark.

    - A stall: s fell by less than the threshold since the last observation and lies within 1 % of the mark.
      The threshold is 2 % in the first 20 % of the epochs, 0.5 % until 80 %, 0.1 % after. `patience` stalls in
      a row double the interval; after each halving it takes twice as many as before.
    - A rise: s lies more than 2 % above the mark, and the training loss, if observed too, has not fallen since the
      last observation: where it falls the model overfits, which more syncs do not mend. After 30 % of the epochs,
      `patience` rises in a row halve the interval.

    So one noisy loss changes nothing, a change must earn the next one, and an interval that was too long is
    tried again later each time.

    Args:
        initial: local steps of the first round.
        total_epochs: how many observations the whole run will make.
        minimum: the interval never falls below it.
        maximum: nor rises above it.
        smoothing: the weight of the past in the moving average, in [0, 1); 0 takes each loss as it comes.
        patience: observations in a row before a change, at least 1.

    Raises:
        TypeError: an interval is not a whole number.
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        initial: int,
        *,
        total_epochs: int,
        minimum: int = 4,
        maximum: int = 64,
        smoothing: float = 0.8,
        patience: int = 3,
    ) -> None:
        super().__init__(initial, total_epochs=total_epochs, minimum=minimum, maximum=maximum)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = float(smoothing)
        self.patience = require_interval("patience", patience)
        self.stalls_needed = patience
        self.stalls = self.rises = 0  # in a row
        self.weighted_sum = self.weight = 0.0  # their quotient is the smoothed loss, from the first one on
        self.mark = 0.0
        self.train_loss: float | None = None

    def _observe(self, loss: float, train_loss: float | None) -> None:
        overfits = train_loss is not None and self.train_loss is not None and train_loss < self.train_loss
        self.train_loss = train_loss
        previous = self.weighted_sum / self.weight if self.weight else None
        self.weighted_sum = self.smoothing * self.weighted_sum + (1 - self.smoothing) * loss
        self.weight = self.smoothing * self.weight + 1 - self.smoothing
        smoothed = self.weighted_sum / self.weight
        if previous is None:
            self.mark = smoothed
            return
        self.mark = min(self.mark, smoothed)
        above = smoothed - self.mark
        stalled = previous - smoothed < self.threshold * abs(previous) and above <= _NEAR * abs(self.mark)
        risen = self.progress > 0.3 and above > _RISE * abs(self.mark) and not overfits
        self.stalls = self.stalls + 1 if stalled else 0
        self.rises = self.rises + 1 if risen else 0
        if self.stalls >= self.stalls_needed:
            self._double()
            self.stalls = 0
        elif self.rises >= self.patience:
            self._halve()
            self.rises, self.mark = 0, smoothed
            self.stalls_needed *= 2

    def state_dict(self) -> dict[str, Any]:
        """The interval, the smoothed loss and what was counted."""
        return {
            "interval": self.interval,
            "observations": self.observations,
            "stalls_needed": self.stalls_needed,
            "stalls": self.stalls,
            "rises": self.rises,
            "weighted_sum": self.weighted_sum,
            "weight": self.weight,
            "mark": self.mark,
            "train_loss": self.train_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        self.interval, self.observations = state_dict["interval"], state_dict["observations"]
        self.stalls_needed = state_dict["stalls_needed"]
        self.stalls, self.rises = state_dict["stalls"], state_dict["rises"]
        self.weighted_sum, self.weight = state_dict["weighted_sum"], state_dict["weight"]
        self.mark = state_dict["mark"]
        self.train_loss = state_dict.get("train_loss")  # not there before it mattered


class OriginalValidationLoss(_FromValidationLoss):
    """The rule of the student study that fastlocal grew from, for comparison: two losses decide, however noisy.

    With δ = (v₋₂ − v₋₁)/v₋₂ from the last two losses: 0 < δ < threshold doubles the interval; after 30 % of the
    epochs, δ < −0.02 halves it. The threshold is 0.02 in the first 20 % of the epochs, 0.005 until 80 %, 0.001
    after.

    Args:
        initial: local steps of the first round.
        total_epochs: how many observations the whole run will make.
        minimum: the interval never falls below it.
        maximum: nor rises above it.

    Raises:
        TypeError: an interval is not a whole number.
        ValueError: a value is out of its range.
    """

    def __init__(self, initial: int, *, total_epochs: int, minimum: int = 4, maximum: int = 64) -> None:
        super().__init__(initial, total_epochs=total_epochs, minimum=minimum, maximum=maximum)
        self.previous_loss: float | None = None

    def _observe(self, loss: float, train_loss: float | None) -> None:
        previous, self.previous_loss = self.previous_loss, loss
        if not previous:
            return
        delta = (previous - loss) / abs(previous)
        if 0 < delta < self.threshold:
            self._double()
        elif self.progress > 0.3 and delta < -_RISE:
            self._halve()

    def state_dict(self) -> dict[str, Any]:
        """The interval, the last loss and how many were seen."""
        return {
            "interval": self.interval,
            "observations": self.observations,
            "previous_loss": self.previous_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        self.interval, self.observations = state_dict["interval"], state_dict["observations"]
        self.previous_loss = state_dict["previous_loss"]
