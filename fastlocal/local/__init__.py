"""LocalSGD, SlowMo and DiLoCo: any torch.optim optimizer, with a sync every few steps."""

from fastlocal.comm import LostRankError
from fastlocal.local.local_sgd import LocalSGD
from fastlocal.local.meeting import DisagreementError
from fastlocal.local.one_process import DivergedError
from fastlocal.local.slowmo import DiLoCo, SlowMo

__all__ = [
    "DiLoCo",
    "DisagreementError",
    "DivergedError",
    "LocalSGD",
    "LostRankError",
    "SlowMo",
]
