"""How many local steps until the next sync.

A policy is asked once a round, when the round begins, and answers from the numbers in `Stats`. It is
deterministic, never sees a tensor, and its state travels in a checkpoint. Standard library only.
"""

from fastlocal.policy.base import Policy as Policy
from fastlocal.policy.base import Stats as Stats
from fastlocal.policy.base import require_interval as require_interval
from fastlocal.policy.drift import ConsensusDistance as ConsensusDistance
from fastlocal.policy.fixed import FixedInterval as FixedInterval
from fastlocal.policy.fixed import PostLocal as PostLocal
from fastlocal.policy.rate import QSR as QSR
from fastlocal.policy.train_loss import AdaComm as AdaComm
from fastlocal.policy.val_loss import OriginalValidationLoss as OriginalValidationLoss
from fastlocal.policy.val_loss import ValidationLoss as ValidationLoss
