"""What can be known before any run is started: a missing device, missing images, a slow way. Trains nothing."""

from collections.abc import Iterable

import torch

from fastlocal.train import build, data
from fastlocal.train.config import Config
from fastlocal.train.errors import UsageError


def require_ready(configs: Iterable[Config]) -> None:
    """Look once at each device and each folder of images that the runs name.

    Raises:
        UsageError: there is no such device, or a file of the images is missing or damaged.
    """
    wanted = list(configs)
    for device in dict.fromkeys(config.device for config in wanted):
        build.require_device(device)
    for data_dir in dict.fromkeys(config.data_dir for config in wanted if config.dataset == "cifar100"):
        for name in ("train", "test"):
            data.read_cifar100(data_dir / "cifar-100-python" / name)


def what_is_missing(configs: Iterable[Config]) -> str | None:
    """What `require_ready` would say; None where it would say nothing."""
    try:
        require_ready(configs)
    except UsageError as error:
        return str(error)
    return None


def what_is_slow(configs: Iterable[Config]) -> str | None:
    """That runs ask for bf16 where the processor has no instructions for it; None where none does."""
    for device in dict.fromkeys(config.device for config in configs if config.precision == "bf16"):
        if emulates_bf16(build.kind_of(device)):
            return (
                "this processor has no instructions for bfloat16: --precision bf16 is emulated, on CPUs about ten "
                "times slower than fp32"
            )
    return None


def emulates_bf16(kind: str) -> bool:
    """Whether PyTorch is known to compute bfloat16 without the processor's help.

    Args:
        kind: cpu or cuda.
    """
    if kind == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
