"""Where a kernel is launched, and whether into a graph."""

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether launches on this device are being recorded as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
