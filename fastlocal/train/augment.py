"""Random crops and flips on the device, from uint8 images that stay there."""

import torch
from torch import Tensor

from fastlocal.train.data import ImageSet

PADDING = 4


class Normalizer:
    """uint8 images to float: zero mean and unit variance a channel, measured on the training images.

    Args:
        images: uint8, (n, 3, 32, 32).
    """

    def __init__(self, images: Tensor) -> None:
        counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
        values = torch.arange(256, dtype=torch.float64, device=images.device)
        mean = (counts * values).sum(dim=1) / counts.sum(dim=1)
        variance = (counts * (values - mean[:, None]).square()).sum(dim=1) / counts.sum(dim=1)
        scale = 1 / variance.sqrt().clamp_min(1e-6)
        self.scale = scale.float().view(1, 3, 1, 1)
        self.shift = (-mean * scale).float().view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """float32, channels_last."""
        return torch.addcmul(self.shift, images.float(), self.scale).contiguous(memory_format=torch.channels_last)


class Augmenter:
    """One worker's images: padded once, then cut as a plan says.

    Args:
        images: the worker's own part of the training set.
        normalize: applied to each batch.
    """

    def __init__(self, images: ImageSet, normalize: Normalizer) -> None:
        self.labels = images.labels
        self.normalize = normalize
        padded = torch.nn.functional.pad(images.images, (PADDING,) * 4)
        self.windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # a view: (n, 3, 9, 9, 32, 32)

    def plan(self, generator: torch.Generator) -> Tensor:
        """One epoch, drawn before it begins: int64, (4, n); n picks of an image, two shifts and a flip each.

        Drawn on the CPU, so that every device sees the same one.
        """
        n = len(self.labels)
        shifts = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5
        order = torch.randperm(n, generator=generator)
        return torch.cat([order[None], shifts, flip[None]]).to(self.labels.device)

    def batch(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Images (size, 3, 32, 32), float32, channels_last, and labels (size,).

        Args:
            picks: int64, (4, size), some columns of a plan.
        """
        chosen, dy, dx, flip = picks.unbind()
        images = self.windows[chosen, :, dy, dx]
        images = torch.where(flip.bool().view(-1, 1, 1, 1), images.flip(-1), images)
        return self.normalize(images), self.labels[chosen]
