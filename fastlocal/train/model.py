"""The networks: LeNet-5 as the study trained it, and a ResNet-18 for 32×32 images."""

from torch import Tensor, nn

from fastlocal.train.config import ModelName
from fastlocal.train.data import NUM_CLASSES


def build(name: ModelName) -> nn.Module:
    """A new network with PyTorch's default initialisation, drawn from the global generator."""
    return LeNet() if name == "lenet" else ResNet18()


class LeNet(nn.Sequential):
    """LeNet-5 for 32×32 colour images, 815,332 parameters.

    The ReLU follows the pooling: max-pooling commutes with it, and a quarter of the values are left to clip.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1600, 384),
            nn.ReLU(),
            nn.Linear(384, 192),
            nn.ReLU(),
            nn.Linear(192, NUM_CLASSES),
        )


class _Residual(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut; a 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu_()


class ResNet18(nn.Sequential):
    """ResNet-18 with a 3×3 stem and no first pooling, for 32×32 images; 11,220,132 parameters.

    References:
        He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2015
    """

    def __init__(self) -> None:
        blocks = [
            _Residual(channels_in, channels, stride)
            for channels_in, channels, stride in (
                (64, 64, 1),
                (64, 64, 1),
                (64, 128, 2),
                (128, 128, 1),
                (128, 256, 2),
                (256, 256, 1),
                (256, 512, 2),
                (512, 512, 1),
            )
        ]
        super().__init__(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, NUM_CLASSES),
        )
