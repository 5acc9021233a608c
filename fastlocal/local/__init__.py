"""LocalSGD, SlowMo and DiLoCo: any torch.optim optimizer, with a sync every few steps."""

from fastlocal.comm import LostRankError as LostRankError
from fastlocal.local.local_sgd import LocalSGD as LocalSGD
from fastlocal.local.meeting import DisagreementError as DisagreementError
from fastlocal.local.one_process import DivergedError as DivergedError
from fastlocal.local.slowmo import DiLoCo as DiLoCo
from fastlocal.local.slowmo import SlowMo as SlowMo
