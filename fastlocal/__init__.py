"""Communication-efficient, large-batch training for PyTorch."""

from fastlocal.flat import Workers
from fastlocal.local import DiLoCo, LocalSGD, SlowMo
from fastlocal.optim import LAMB, LARS
from fastlocal.policy import QSR, AdaComm, ConsensusDistance, FixedInterval, PostLocal, Stats, ValidationLoss

__all__ = [
    "LAMB",
    "LARS",
    "QSR",
    "AdaComm",
    "ConsensusDistance",
    "DiLoCo",
    "FixedInterval",
    "LocalSGD",
    "PostLocal",
    "SlowMo",
    "Stats",
    "ValidationLoss",
    "Workers",
]

__version__ = "0.1.0"
