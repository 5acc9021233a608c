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


# What these start takes a GPU where there is one: processes would share it, and its sums differ in their last bits.
ON_CPU = (
    "test_train_",
    "test_bench_run",
    "test_examples",
    "test_process_examples",
    "test_swap_optimizer",
    "test_readme",
)


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    """The trainer and the examples run on the CPU, in processes of their own too, but where the marker says gpu."""
    if not torch.cuda.is_available() or request.node.get_closest_marker("gpu"):
        return
    if request.path.name.startswith(ON_CPU):
        torch.cuda.init()  # which finds no GPU for good while the variable says so
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pytest_collection_modifyitems(items):
    """Tests with the marker `gpu` are skipped, with the reason, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
