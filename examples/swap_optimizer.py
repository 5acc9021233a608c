"""A plain training loop in which one line changes: the optimizer.

    python examples/swap_optimizer.py [sgd|lars|lamb]

The data are made up on the spot: ten classes of noisy 64-dimensional points.
"""

import sys

import torch
from torch import nn

import fastlocal

BATCH_SIZE, EPOCHS = 2048, 15


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The one line."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    if name == "lars":
        return fastlocal.LARS(model.parameters(), lr=20.0, momentum=0.9, weight_decay=1e-4)
    if name == "lamb":
        return fastlocal.LAMB(model.parameters(), lr=0.03, weight_decay=0.01)
    raise ValueError(f"optimizer must be sgd, lars or lamb, got {name}")


def main(name: str = "lamb") -> float:
    """Trains, prints each epoch's loss, returns the accuracy on points not trained on, in percent."""
    torch.manual_seed(0)
    centres = torch.randn(10, 64)
    labels = torch.randint(10, (20_480,))
    points = centres[labels] + 1.5 * torch.randn(len(labels), 64)
    train, test = slice(0, 16_384), slice(16_384, None)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = make_optimizer(name, model)
    steps = EPOCHS * len(points[train]) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for x, y in zip(points[train].split(BATCH_SIZE), labels[train].split(BATCH_SIZE), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        print(f"epoch {epoch + 1:2}: loss {total / len(points[train]):.4f}")
    with torch.no_grad():
        accuracy = (model(points[test]).argmax(1) == labels[test]).float().mean().item() * 100
    print(f"{name}: {accuracy:.1f} % of {len(points[test]):,} unseen points")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
