"""How many local steps until the next sync.

A policy is asked once a round, when the round begins, and answers from the numbers in `Stats`. It is
deterministic, never sees a tensor, and its state travels in a checkpoint. Standard library only.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass
class Stats:
    """What a wrapper has counted so far; policies read it, and so may anybody.

    Bytes are those of one worker under a ring all-reduce: 2(W − 1)/W times the payload for W workers.
    """

    rounds: int = 0  # syncs done; during warm-up each step is one
    local_steps: int = 0  # optimizer steps completed, of each worker
    bytes_on_wire: int = 0  # sent by one worker
    bytes_synchronous: int = 0  # what averaging the gradients in every step would have sent
    seconds_in_sync: float = 0.0  # on CUDA with what the device had still to do before
    interval: int = 1  # local steps of the round under way
    round_steps: int = 0  # local steps of the last round; 0 before the first and during warm-up
    drift: float = 0.0  # mean over the workers of ‖x_k − x̄‖ at the last sync; nan if it was not measured
    excluded: int = 0  # rows left out of a mean so far because they were not finite
    lr: float = 0.0  # the largest learning rate when the round began
    observations: int = 0  # validation losses observed
    val_loss: float | None = None  # the last one observed
    train_loss: float | None = None  # the last one observed


@runtime_checkable
class Policy(Protocol):
    """What a wrapper asks for its interval. Anything with these three methods will do.

    In several processes rank 0's decides, and the others' load its state. There the drift costs a pass over the
    parameters and a message: a policy that does not read it says so with `reads_drift = False`.
    """

    def next_interval(self, stats: Stats) -> int:
        """Local steps of the round that begins now, at least 1."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on after a restart: plain numbers, strings and lists."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        ...


class _Stateless:
    """A policy whose answer depends on the stats and its settings alone."""

    reads_drift = False

    def state_dict(self) -> dict[str, Any]:
        """Nothing needs to be kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""


class FixedInterval(_Stateless):
    """The same number of local steps in every round.

    Args:
        interval: local steps a round, at least 1.
    """

    def __init__(self, interval: int) -> None:
        self.interval = require_interval("interval", interval)

    def next_interval(self, stats: Stats) -> int:
        """The interval."""
        return self.interval


class PostLocal(_Stateless):
    """A sync after every step at first, then an interval.

    Args:
        start_step: local steps before the interval applies, at least 0.
        interval: local steps a round from there on, at least 1.

    References:
        Lin et al., `Don't Use Large Mini-Batches, Use Local SGD <https://arxiv.org/abs/1808.07217>`_, 2020
    """

    def __init__(self, start_step: int, interval: int) -> None:
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {start_step}")
        self.start_step = start_step
        self.interval = require_interval("interval", interval)

    def next_interval(self, stats: Stats) -> int:
        """1 before the start step, then the interval."""
        return self.interval if stats.local_steps >= self.start_step else 1


class ValidationLoss:
    """Double the interval when the validation loss stalls, halve it when the loss rises.

    One observation an epoch. With δ = (v₋₂ − v₋₁)/v₋₂ from the last two losses: 0 < δ < threshold doubles;
    after 30 % of the epochs, δ < −0.02 halves. The threshold is 0.02 in the first 20 % of the epochs, 0.005
    until 80 %, 0.001 after.

    Args:
        initial: local steps of the first round.
        total_epochs: how many observations the whole run will make.
        minimum: the interval never falls below it.
        maximum: nor rises above it.
    """

    reads_drift = False

    def __init__(self, initial: int, *, total_epochs: int, minimum: int = 4, maximum: int = 64) -> None:
        if total_epochs < 1:
            raise ValueError(f"total_epochs must be at least 1, got {total_epochs}")
        self.total_epochs = total_epochs
        self.minimum, self.maximum = require_bounds(minimum, maximum)
        self.interval = require_interval("initial", initial)
        if not minimum <= initial <= maximum:
            raise ValueError(f"initial must lie in [minimum, maximum] = [{minimum}, {maximum}], got {initial}")
        self.previous_loss: float | None = None
        self.observations = 0

    def next_interval(self, stats: Stats) -> int:
        """The interval, changed if a loss was observed since the last call."""
        if stats.val_loss is None or stats.observations == self.observations:
            return self.interval
        loss, previous = stats.val_loss, self.previous_loss
        self.previous_loss, self.observations = loss, stats.observations
        if previous:
            progress = self.observations / self.total_epochs
            threshold = 0.02 if progress <= 0.2 else 0.005 if progress <= 0.8 else 0.001
            delta = (previous - loss) / previous
            if 0 < delta < threshold:
                self.interval = min(2 * self.interval, self.maximum)
            elif progress > 0.3 and delta < -0.02:
                self.interval = max(self.interval // 2, self.minimum)
        return self.interval

    def state_dict(self) -> dict[str, Any]:
        """The interval, the last loss and how many were seen."""
        return {
            "interval": self.interval,
            "previous_loss": self.previous_loss,
            "observations": self.observations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned."""
        self.interval = state_dict["interval"]
        self.previous_loss = state_dict["previous_loss"]
        self.observations = state_dict["observations"]


class QSR(_Stateless):
    """The quadratic synchronisation rule: max(base, ⌊(alpha/lr)²⌋), so the interval grows as the rate decays.

    A rate of 0 asks for no limit at all, so it gives `maximum`.

    Args:
        base: the least number of local steps.
        alpha: the rate at which the rule gives 1; larger is rarer.
        maximum: the interval never rises above it.
        start_step: local steps before the rule applies; until then, base. A warm-up's small rates are no reason
            to sync rarely.

    References:
        Gu et al., `A Quadratic Synchronization Rule <https://arxiv.org/abs/2310.14423>`_, 2024, equation 2
    """

    def __init__(self, base: int, alpha: float, *, maximum: int = 1024, start_step: int = 0) -> None:
        self.base, self.maximum = require_bounds(base, maximum, "base")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {start_step}")
        self.alpha, self.start_step = alpha, start_step

    def next_interval(self, stats: Stats) -> int:
        """From the learning rate at the beginning of the round."""
        if stats.local_steps < self.start_step:
            return self.base
        if stats.lr <= 0 or self.alpha / stats.lr >= math.sqrt(self.maximum):
            return self.maximum
        return max(self.base, math.floor((self.alpha / stats.lr) ** 2))


class AdaComm:
    """⌈initial · √(F/F₀)⌉ for the training loss F: the interval shrinks as the loss does.

    Args:
        initial: local steps while the first observed loss, F₀, is the last one.
        maximum: the interval never rises above it.

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


class ConsensusDistance:
    """Steer the interval so that the workers' drift at a sync stays near a target.

    Drift grows with the interval, so the next interval is the last one times target/drift, at most doubled
    or halved. The sync measures the drift anyway: this policy costs no communication.

    Args:
        target: the wanted drift, mean over the workers of ‖x_k − x̄‖.
        initial: local steps of the first round.
        minimum: the interval never falls below it.
        maximum: nor rises above it.

    References:
        Kong et al., `Consensus Control <https://arxiv.org/abs/2102.04828>`_, 2021
    """

    reads_drift = True

    def __init__(self, target: float, *, initial: int = 16, minimum: int = 1, maximum: int = 1024) -> None:
        if not (target > 0 and math.isfinite(target)):
            raise ValueError(f"target must be positive and finite, got {target}")
        self.target = target
        self.minimum, self.maximum = require_bounds(minimum, maximum)
        self.interval = require_interval("initial", initial)
        self.rounds = 0

    def next_interval(self, stats: Stats) -> int:
        """The interval, steered once a round by the drift of the last sync.

        A round cut short says little: below half the interval it is ignored, above it is scaled up.
        """
        measured = stats.rounds > self.rounds and 2 * stats.round_steps >= self.interval
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


def require_interval(name: str, interval: int) -> int:
    """Return `interval`, or raise TypeError or ValueError if it is not a whole number of at least 1."""
    if isinstance(interval, bool) or not isinstance(interval, int):
        raise TypeError(f"{name} must be an int, got {interval!r}")
    if interval < 1:
        raise ValueError(f"{name} must be at least 1, got {interval}")
    return interval


def require_bounds(minimum: int, maximum: int, name: str = "minimum") -> tuple[int, int]:
    """Return both, or raise ValueError unless 1 ≤ minimum ≤ maximum."""
    require_interval(name, minimum)
    if require_interval("maximum", maximum) < minimum:
        raise ValueError(f"maximum must be at least {name} = {minimum}, got {maximum}")
    return minimum, maximum
