"""Parameter shapes of the models that the benchmarks step and average, so that no model has to be built."""

import math

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """ResNet-18 with 100 classes and a 3x3 stem, as for CIFAR-100: 62 tensors, 11,220,132 parameters."""
    shapes: Shapes = [(64, 3, 3, 3), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if channels != width:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (100, 512), (100,)]


def resnet50() -> Shapes:
    """161 tensors, 25,557,032 parameters, in the order of torchvision's model."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def bert(layers: int, width: int) -> Shapes:
    """An encoder with embeddings and pooler: base is (12, 768), 199 tensors; large (24, 1024), 391."""
    shapes: Shapes = [(30522, width), (512, width), (2, width), (width,), (width,)]
    for _ in range(layers):
        shapes += 4 * [(width, width), (width,)] + [(width,), (width,)]
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,)]
    return [*shapes, (width, width), (width,)]


def lenet() -> Shapes:
    """The network of the CIFAR-100 study, 815,332 parameters."""
    shapes: Shapes = [(64, 3, 5, 5), (64,), (64, 64, 5, 5), (64,)]
    return [*shapes, (384, 1600), (384,), (192, 384), (192,), (100, 192), (100,)]


def tiny() -> Shapes:
    """2,000 tensors of 1,000 elements: nothing but overhead."""
    return [(1000,)] * 2000


def num_parameters(shapes: Shapes) -> int:
    """Elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)


SHAPES = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "bert-base": lambda: bert(12, 768),
    "bert-large": lambda: bert(24, 1024),
    "lenet": lenet,
    "tiny": tiny,
}
