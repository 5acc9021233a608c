"""How many local steps until the next sync.

A policy is asked once a round, when the round begins, and answers from the numbers in `Stats`. It is
deterministic, never sees a tensor, and its state travels in a checkpoint. Standard library only.
"""

from fastlocal.policy.base import Policy, Stats, decides_alike, require_interval
from fastlocal.policy.drift import ConsensusDistance
from fastlocal.policy.fixed import FixedInterval, PostLocal
from fastlocal.policy.rate import QSR
from fastlocal.policy.train_loss import AdaComm
from fastlocal.policy.val_loss import OriginalValidationLoss, ValidationLoss

__all__ = [
    "QSR",
    "AdaComm",
    "ConsensusDistance",
    "FixedInterval",
    "OriginalValidationLoss",
    "Policy",
    "PostLocal",
    "Stats",
    "ValidationLoss",
    "decides_alike",
    "require_interval",
]
