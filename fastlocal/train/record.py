"""What a run tells while it goes on: a Record an epoch, and where it stands after each step. Numbers alone."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Record:
    """One epoch. Losses are cross-entropies in nats, accuracies are percent, bytes are one worker's."""

    epoch: int  # 1 is the first
    local_steps: int  # of each worker, so far
    rounds: int
    bytes_on_wire: int
    bytes_synchronous: int
    interval: int
    drift: float | None  # None where it was not measured
    excluded: int
    lr: float  # of the last step
    train_loss: float  # mean over the epoch, as seen while training
    val_loss: float | None  # of the averaged model; None where the epoch was not evaluated
    val_accuracy: float | None
    train_seconds: float  # so far, without evaluation and checkpoints
    sync_seconds: float | None  # None where messages overlap with the backward pass


class Standing(NamedTuple):
    """Where a run stands, for whoever displays it."""

    epoch: int
    epochs: int
    step: int  # in the epoch
    steps: int  # an epoch
    interval: int
    bytes_on_wire: int
    bytes_synchronous: int
