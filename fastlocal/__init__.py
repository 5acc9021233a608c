"""Communication-efficient, large-batch training for PyTorch."""

from fastlocal.flat import Workers as Workers
from fastlocal.local import DiLoCo as DiLoCo
from fastlocal.local import LocalSGD as LocalSGD
from fastlocal.local import SlowMo as SlowMo
from fastlocal.optim import LAMB as LAMB
from fastlocal.optim import LARS as LARS
from fastlocal.policy import QSR as QSR
from fastlocal.policy import AdaComm as AdaComm
from fastlocal.policy import ConsensusDistance as ConsensusDistance
from fastlocal.policy import FixedInterval as FixedInterval
from fastlocal.policy import PostLocal as PostLocal
from fastlocal.policy import Stats as Stats
from fastlocal.policy import ValidationLoss as ValidationLoss

__version__ = "0.1.0"
