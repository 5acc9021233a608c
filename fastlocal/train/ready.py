"""What can be known to be missing before any run is started: the images and the device. Trains nothing."""

from collections.abc import Iterable

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
