"""A small team of convolutional workers, and what the tests of the wrappers do with it."""

import copy

import torch
from torch import nn

from fastlocal import FixedInterval, SlowMo, Workers


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class KeepsAverage(nn.Module):
    """A layer and, frozen, the moving average that a forward pass takes of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.average = copy.deepcopy(self.layer).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.average.weight.lerp_(self.layer.weight, 0.5)
        return self.layer(x)


def inner_of(team, optimizer):
    if optimizer == "sgd":
        return torch.optim.SGD(team.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(team.parameters(), lr=0.01)


def make(kind=SlowMo, workers=3, interval=4, optimizer="sgd", seed=0, **options):
    team = Workers(network(seed), workers)
    return kind(inner_of(team, optimizer), team, interval, **options), team


def run(optimizer, team, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for model in team:
            model(torch.randn(8, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def measured(interval):
    policy = FixedInterval(interval)
    policy.reads_drift = True
    return policy


def parameters_of(team):
    return torch.cat([p.detach().flatten() for p in team.parameters()])


def poison(model, value=torch.nan):
    with torch.no_grad():
        next(model.parameters())[1, 2, 0, 1] = value


def step_with(optimizer, team):
    for model in team:
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
