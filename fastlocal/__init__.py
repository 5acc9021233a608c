"""Communication-efficient, large-batch training for PyTorch."""

from fastlocal.local import DiLoCo, DisagreementError, DivergedError, LocalSGD, LostRankError, SlowMo
from fastlocal.optim import LAMB, LARS
from fastlocal.policy import QSR, AdaComm, ConsensusDistance, FixedInterval, PostLocal, Stats, ValidationLoss
from fastlocal.workers import Workers

__all__ = [
    "LAMB",
    "LARS",
    "QSR",
    "AdaComm",
    "ConsensusDistance",
    "DiLoCo",
    "DisagreementError",
    "DivergedError",
    "FixedInterval",
    "LocalSGD",
    "LostRankError",
    "PostLocal",
    "SlowMo",
    "Stats",
    "ValidationLoss",
    "Workers",
]

__version__ = "0.1.0"
