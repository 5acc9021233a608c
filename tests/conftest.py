"""Settings shared by all tests. Without a GPU the kernels run in Triton's interpreter."""

import os

import torch

# Triton reads this when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors here are small: a second thread costs more than it brings, the more so on a busy machine.
torch.set_num_threads(1)
