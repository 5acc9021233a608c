"""Communication-efficient, large-batch training for PyTorch."""

from fastlocal.optim import LAMB, LARS

__version__ = "0.1.0"

__all__ = ["LAMB", "LARS"]
