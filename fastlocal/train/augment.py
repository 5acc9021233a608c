"""Random crops and flips on the device, from uint8 images that stay there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlocal.train.data import ImageSet

PADDING = 4


@dataclass(frozen=True)
class Plan:
    """One worker's epoch, drawn before it begins: which image at each position, how shifted, whether mirrored."""

    order: Tensor  # int64, (n,)
    dy: Tensor  # int64, (n,), 0 … 2·PADDING
    dx: Tensor  # int64, (n,)
    flip: Tensor  # bool, (n,)


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

    def plan(self, generator: torch.Generator) -> Plan:
        """Draw one epoch, on the CPU, so that every device sees the same one."""
        n, device = len(self.labels), self.labels.device
        dy, dx = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5
        order = torch.randperm(n, generator=generator)
        return Plan(order.to(device), dy.to(device), dx.to(device), flip.to(device))

    def batch(self, plan: Plan, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Images (size, 3, 32, 32), float32, channels_last, and labels (size,), of `size` positions of a plan."""
        part = slice(start, start + size)
        chosen, flip = plan.order[part], plan.flip[part]
        images = self.windows[chosen, :, plan.dy[part], plan.dx[part]]
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        return self.normalize(images), self.labels[chosen]
