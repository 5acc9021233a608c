"""K workers in one process: what a cluster would do, without one.

    python examples/workers_in_one_process.py [interval]

Each worker has a part of the data to itself. They step alone for an interval, then their parameters are averaged.
"""

import sys

import torch
from torch import nn

import fastlocal

WORKERS, BATCH_SIZE, EPOCHS = 4, 64, 2


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points around ten centres, 64 dimensions."""
    centres = torch.randn(10, 64)
    labels = torch.randint(10, (10_240,))
    return centres[labels] + 1.5 * torch.randn(len(labels), 64), labels


def main(interval: int = 8) -> tuple[float, int, int]:
    """Trains; returns the mean model's accuracy in percent, the bytes a worker sent, and what synchronous sends."""
    torch.manual_seed(0)
    points, labels = make_data()
    train, test = slice(0, 8192), slice(8192, None)
    parts = list(zip(points[train].chunk(WORKERS), labels[train].chunk(WORKERS), strict=True))

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    workers = fastlocal.Workers(model, WORKERS)
    inner = torch.optim.SGD(workers.parameters(), lr=0.05, momentum=0.9)
    optimizer = fastlocal.LocalSGD(inner, workers, interval)
    accuracy = 0.0
    for epoch in range(EPOCHS):
        orders = [torch.randperm(len(part)).split(BATCH_SIZE) for part, _ in parts]
        for batches in zip(*orders, strict=True):  # one batch a worker
            optimizer.zero_grad()
            for worker, (x, y), batch in zip(workers, parts, batches, strict=True):
                nn.functional.cross_entropy(worker(x[batch]), y[batch]).backward()
            optimizer.step()  # syncs by itself when the interval is over
        optimizer.sync()  # evaluate the mean: close the round under way
        with torch.no_grad():
            accuracy = (workers.mean()(points[test]).argmax(1) == labels[test]).float().mean().item() * 100
        print(f"epoch {epoch + 1}: {accuracy:.1f} % of unseen points, {optimizer.stats.rounds} syncs")
    sent, synchronous = optimizer.stats.bytes_on_wire, optimizer.stats.bytes_synchronous
    print(f"a worker sent {sent / 1e6:.1f} MB; averaging in every step sends {synchronous / 1e6:.1f} MB")
    return accuracy, sent, synchronous


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
