"""Large-batch optimizers, drop-in for `torch.optim`: state and parameter groups only."""

from fastlocal.optim.lamb import LAMB
from fastlocal.optim.lars import LARS

__all__ = ["LAMB", "LARS"]
