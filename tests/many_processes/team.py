"""A small team of convolutional workers in each process, and the same team in one."""

from typing import Any

import torch
import torch.distributed as dist

from fastlocal import DiLoCo, LocalSGD, SlowMo, Workers
from tests.local_runs import inner_of, network, parameters_of

WORLD = 4
KINDS = (LocalSGD, SlowMo, DiLoCo)
WEIGHTS = [1.0, 3.0, 2.0, 5.0]
# Four terms summed in another order differ by at most 3 · 2⁻²⁴ of their size in each of three syncs; the steps in
# between carry it on. Weights here are below 1.
ROUNDED = {"rtol": 3e-6, "atol": 3e-6}
ALONE: list[Any] = []  # the group of this process alone, which is none: the run to compare with


def build(kind, k, interval=3, group=None, model=None, optimizer="sgd", seed=0, **options):
    team = Workers(model or network(seed), k)
    inner = inner_of(team, optimizer)
    # A group of one process is none: the run to compare with.
    return kind(inner, team, interval, process_group=group or ALONE[0], timeout=20.0, **options), team


def backward(model, step, worker):
    generator = torch.Generator().manual_seed(1000 * step + worker)
    model(torch.randn(8, 3, 6, 6, generator=generator)).square().mean().backward()


def run(optimizer, team, steps, first=0, worker=0):
    """`worker` is the number of this process's first worker among all."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for number, model in enumerate(team, start=worker):
            backward(model, step, number)
        optimizer.step()


def tensors_of(model):
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


def stats_of(optimizer):
    counted = dict(vars(optimizer.stats))
    del counted["seconds_in_sync"], counted["drift"]
    return counted


def assert_equal_everywhere(tensor, group):
    everybody = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, tensor.contiguous(), group=group)
    assert all(torch.equal(tensor, other) for other in everybody)


def against_one_process(kind, rank, group, k, tolerance, steps=8, **options):
    """The same training in `group` and with all workers in this process."""
    workers = k * dist.get_world_size(group)
    spread, own = build(kind, k, group=group, **options)
    run(spread, own, steps, worker=k * dist.get_rank(group))
    spread.sync()
    single, team = build(kind, workers, **options)
    run(single, team, steps)
    single.sync()
    for ours, theirs in zip(tensors_of(own[0]), tensors_of(team[0]), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert stats_of(spread) == stats_of(single)
    assert_equal_everywhere(parameters_of(own[0]), group)
    assert all(torch.equal(parameters_of(own[0]), parameters_of(model)) for model in own)
    return spread, single
