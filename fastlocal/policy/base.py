"""What a policy is, and the numbers it decides from. Standard library only."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass
class Stats:
    """What a wrapper has counted so far; policies read it, and so may anybody.

    Bytes are those of one worker under a ring all-reduce: 2(W − 1)/W times the payload for W workers. The few numbers
    by which processes agree on a round are not counted.
    """

    rounds: int = 0
    """Syncs done; during warm-up each step is one."""

    local_steps: int = 0
    """Optimizer steps completed, of each worker."""

    bytes_on_wire: int = 0
    """Sent by one worker."""

    bytes_synchronous: int = 0
    """What averaging the gradients in every step would have sent, in the parameters' own dtypes."""

    seconds_in_sync: float = 0.0
    """Wall time; on CUDA without the local steps that a sync waits for, and of the warm-up the host's alone."""

    interval: int = 1
    """Local steps of the round under way."""

    round_steps: int = 0
    """Local steps of the last round; 0 before the first and during warm-up."""

    drift: float = 0.0
    """Mean over the workers of ‖x_k − x̄‖ at the last sync that has ended; nan where the policy has
    `reads_drift = False`."""

    excluded: int = 0
    """Rows left out of a mean so far because they were not finite."""

    lr: float = 0.0
    """The largest learning rate when the round began."""

    observations: int = 0
    """Validation losses observed."""

    val_loss: float | None = None
    """The last one observed."""

    train_loss: float | None = None
    """The last one observed."""


@runtime_checkable
class Policy(Protocol):
    """What a wrapper asks for its interval. Anything with these three methods will do.

    In several processes rank 0's decides, and its state is sent to the others' when it has changed. Before the first
    step the class and its public numbers and strings are compared: a difference is an error on every rank.

    Two attributes, where a policy has them, save time and messages. `reads_drift = False` says that it does not read
    `stats.drift`, which costs passes over the parameters and a message and is then not measured; all of fastlocal's
    but ConsensusDistance say so, and True set on one of them brings the drift into the stats. `decides_alike = True`
    says that it decides from the steps and the learning rate alone, the same everywhere, and needs no message.
    """

    def next_interval(self, stats: Stats) -> int:
        """Local steps of the round that begins now, an int of at least 1; asked once a round, and where it
        `decides_alike` also at each step of a warm-up, whose answers do not count.

        It depends on the stats and on the policy's own state, never on the clock or a random number: a resumed run
        must come to the same answer. Losses given to `observe`, which must be finite, count from the next round on.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next answer depends on, as numbers, strings and lists: `torch.load(weights_only=True)` refuses
        the rest.
        """
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned. If it raises, the wrapper says so and keeps the state it had."""
        ...


class Stateless:
    """A policy whose answer depends on the stats and its settings alone, which are its state."""

    reads_drift = False
    decides_alike = True


def decides_alike(policy: Policy) -> bool:
    """Whether every process comes to the same interval by itself, see `Policy`."""
    return getattr(policy, "decides_alike", False)


def require_interval(name: str, interval: int) -> int:
    """Return `interval`, or raise TypeError or ValueError if it is not a whole number of at least 1."""
    if isinstance(interval, bool) or not isinstance(interval, int):
        raise TypeError(f"{name} must be an int, got {interval!r}")
    if interval < 1:
        raise ValueError(f"{name} must be at least 1, got {interval}")
    return interval


def require_count(name: str, count: float, least: int) -> int:
    """Return `count` as an int, or raise ValueError if it is not a whole number of at least `least`."""
    if not least <= count < math.inf or count != int(count):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {count}")
    return int(count)


def require_bounds(minimum: int, maximum: int, name: str = "minimum") -> tuple[int, int]:
    """Return both, or raise ValueError unless 1 ≤ minimum ≤ maximum."""
    require_interval(name, minimum)
    if require_interval("maximum", maximum) < minimum:
        raise ValueError(f"maximum must be at least {name} = {minimum}, got {maximum}")
    return minimum, maximum


def require_within(name: str, interval: int, minimum: int, maximum: int) -> int:
    """Return `interval`, or raise TypeError or ValueError if it is not a whole number from minimum to maximum."""
    if not minimum <= require_interval(name, interval) <= maximum:
        raise ValueError(f"{name} must lie in [minimum, maximum] = [{minimum}, {maximum}], got {interval}")
    return interval
