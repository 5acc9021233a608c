"""The images: CIFAR-100 in its official layout, or a synthetic set of the same shape.

Neither ever stands in for the other. CIFAR-100 is known by its bytes, so that a figure can say which split it is of.
"""

import hashlib
import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastlocal.train.config import Config
from fastlocal.train.errors import UsageError

NUM_CLASSES = 100
_OFFICIAL_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
"""Of the files in cifar-100-python.tar.gz, as torchvision checks them."""

_RE_SPLIT = "e1cd009c0ab79cbff9615d02c0326f883162b47830c27bd6674e13b8c92bbc4a"
"""Splits.digest of the images that the figures in bench/results/study are of, split by class into 500 and 100."""

_SPLIT_SEED = 0  # which images validate does not depend on the seed of a run

_ARRAY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}
"""What a pickled array is made of."""


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes."""

    images: Tensor  # uint8, (n, 3, 32, 32)
    labels: Tensor  # int64, (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "ImageSet":
        """The images at these positions."""
        return ImageSet(self.images[indices], self.labels[indices])


Source = Literal["synthetic", "official", "re-split", "other"]
"""Where images come from: "official" and "re-split" are CIFAR-100, known by its bytes; "other" files are neither."""


@dataclass(frozen=True)
class Splits:
    """What trains, what chooses, and what is looked at once, at the end."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    source: Source
    digest: str
    """SHA-256 over all images and labels: a run is resumed on the images it began with."""


def load(config: Config) -> Splits:
    """The images of a run; a fifth of the training images validates.

    Raises:
        UsageError: a file is missing, damaged or not CIFAR-100, or there are too few images for one step.
    """
    folder = config.data_dir / "cifar-100-python"
    if config.dataset == "synthetic":
        train = synthetic(config.synthetic_images, seed=0)
        test = synthetic(max(1, config.synthetic_images // 6), seed=1)
    else:
        train, test = read_cifar100(folder / "train"), read_cifar100(folder / "test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    num_val = len(train) // 5
    parts = train.take(order[num_val:]), train.take(order[:num_val]), test
    if num_val == 0:
        raise UsageError(f"at least 5 images are needed, so that one validates, there are {len(train)}")
    if len(parts[0]) < config.workers * config.batch_size:
        raise UsageError(
            f"{config.workers} workers with batches of {config.batch_size} need at least "
            f"{config.workers * config.batch_size} training images, there are {len(parts[0])}"
        )
    digest = _digest(parts)
    return Splits(*parts, "synthetic" if config.dataset == "synthetic" else _source(folder, digest), digest)


def _digest(parts: tuple[ImageSet, ...]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.images.numpy().data)
        sha.update(part.labels.numpy().data)
    return sha.hexdigest()


def _source(folder: Path, digest: str) -> Source:
    """Which CIFAR-100 it is; the official files are known as they lie there, another split by its images."""
    for name, official in _OFFICIAL_MD5.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != official:
            return "re-split" if digest == _RE_SPLIT else "other"
    return "official"


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers; any other name in the file is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 moved numpy.core to numpy._core; files name either.
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) in _ARRAY_NAMES:
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only NumPy arrays are let in")


def read_cifar100(path: Path) -> ImageSet:
    """Read one file of the official Python version of CIFAR-100.

    Args:
        path: the file "train" or "test" of cifar-100-python.

    Raises:
        UsageError: the file is missing, cannot be read, names anything but NumPy arrays, or holds something else.
    """
    try:
        with path.open("rb") as file:
            entry = _ArrayUnpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing: unpack the Python version of CIFAR-100 into {path.parent.parent}, or fetch it with "
            f"`fastlocal train --dataset cifar100 --download --data-dir {path.parent.parent}`"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a changed byte of a pickle may come to any error, SystemError among them
        raise UsageError(f"{path} is damaged or no CIFAR-100 file: {error}; fetch it again") from None
    data, labels = (entry.get(b"data"), entry.get(b"fine_labels")) if isinstance(entry, dict) else (None, None)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise UsageError(f"{path} is no CIFAR-100 file: its entry 'data' is not (n, 3072) uint8; fetch it again")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise UsageError(f"{path} is no CIFAR-100 file: it has not one whole-number label an image; fetch it again")
    if not labels or min(labels) < 0 or max(labels) >= NUM_CLASSES:
        raise UsageError(f"{path} is no CIFAR-100 file: labels must lie in 0 … 99; fetch it again")
    return ImageSet(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels))


def synthetic(num_images: int, seed: int) -> ImageSet:
    """100 classes of 32×32 colour images, learnable and not trivial.

    A class is a smooth random pattern. An image shows its class's pattern shifted by up to four pixels, at a
    random contrast and brightness, behind another class's pattern and pixel noise.

    Args:
        num_images: n.
        seed: images of different seeds show the same classes.
    """
    classes = torch.Generator().manual_seed(100)
    patterns = torch.randn(NUM_CLASSES, 3, 8, 8, generator=classes)
    patterns = torch.nn.functional.interpolate(patterns, size=(40, 40), mode="bicubic", align_corners=False)
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)
    windows = patterns.unfold(2, 32, 1).unfold(3, 32, 1)  # (100, 3, 9, 9, 32, 32)

    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_images, 1, 1, 1, generator=generator)

    def shifted(labels: Tensor) -> Tensor:
        dy, dx = torch.randint(0, 9, (2, num_images), generator=generator)
        return windows[labels, :, dy, dx]

    labels = torch.randint(0, NUM_CLASSES, (num_images,), generator=generator)
    distractors = torch.randint(0, NUM_CLASSES, (num_images,), generator=generator)
    images = uniform(0.5, 1.2) * shifted(labels) + uniform(0.2, 0.8) * shifted(distractors)
    images += 0.5 * torch.randn(images.shape, generator=generator) + uniform(-0.5, 0.5)
    return ImageSet((127.5 + 45 * images).clamp_(0, 255).to(torch.uint8), labels)


def download(data_dir: Path) -> None:
    """Fetch CIFAR-100 into the folder, if it is not there.

    Raises:
        UsageError: torchvision is missing, or the files cannot be fetched.
    """
    if all((data_dir / "cifar-100-python" / name).exists() for name in ("train", "test")):
        return  # torchvision would replace another split by its own
    try:
        from torchvision.datasets import CIFAR100  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"--download needs torchvision, which does not import ({error}): pip install 'fastlocal[cifar]'"
        ) from None
    try:
        CIFAR100(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"CIFAR-100 could not be fetched into {data_dir}: {error}") from None
