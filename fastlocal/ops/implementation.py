"""Which implementation carries out an operation: the choice, and the error when what was asked for cannot run."""

from typing import Literal, get_args

import torch

Implementation = Literal["auto", "triton", "portable", "reference"]
"""How an operation is carried out.

"triton" are the fused kernels, on CUDA tensors (or on CPU tensors in Triton's interpreter); "portable" is plain
PyTorch arranged to be fast on a CPU; "reference" is the readable definition; "auto" is "triton" on CUDA for the
dtypes it has and "portable" elsewhere. Every one but "auto" runs as asked or raises.
"""

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_implementation(impl: str) -> None:
    """Raise ValueError unless `impl` is the name of an implementation."""
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(get_args(Implementation))}, got {impl!r}")


def choose(impl: Implementation, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation for tensors of a device and dtype; never "auto".

    Raises:
        ValueError: `impl` is no implementation.
        RuntimeError: the one asked for cannot run there.
    """
    check_implementation(impl)
    if impl == "auto":
        can = device.type == "cuda" and dtype in _TRITON_DTYPES and not torch.compiler.is_compiling()
        return "triton" if can and _triton_is_installed() else "portable"
    if impl == "triton":
        if not _triton_is_installed():
            raise RuntimeError("impl='triton' needs the package triton, which is not installed")
        if dtype not in _TRITON_DTYPES:
            raise RuntimeError(f"impl='triton' has kernels for float32, bfloat16 and float16, got {dtype}")
        if device.type != "cuda" and not (device.type == "cpu" and _is_interpreting()):
            raise RuntimeError(
                f"impl='triton' needs tensors on a CUDA device, they are on {device} (`fused=True` requires all the "
                "params to be floating point Tensors there): use impl='auto', or set TRITON_INTERPRET=1 before "
                "Python starts to interpret the kernels on a CPU"
            )
    return impl


def _triton_is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:  # Triton is a dependency on Linux alone
        return False
    return True


def _is_interpreting() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
