"""Settings shared by all tests. Without a GPU the kernels run in Triton's interpreter."""

import os

import pytest
import torch

if torch.cuda.is_available():
    # Convolutions and products in full float32, so that two ways to the same numbers agree in more than three digits.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
else:
    # Triton reads this when a kernel is defined, so it must be set before any kernel module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors here are small: a second thread costs more than it brings, the more so on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests with the marker `gpu` are skipped, with the reason, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
