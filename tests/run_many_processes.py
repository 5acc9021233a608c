"""The processes of test_many_processes.py: four ranks that run every scenario below, one after the other.

Each rank writes FOLDER/SCENARIO.RANK: "ok", or the traceback. A scenario has groups of its own, so that one that
fails does not break the next.
"""

import copy
import functools
import io
import math
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastlocal import ConsensusDistance, DiLoCo, FixedInterval, LocalSGD, SlowMo, Workers
from fastlocal.comm import LostRankError, find_group
from fastlocal.local import DisagreementError, DivergedError
from fastlocal.policy import OriginalValidationLoss
from fastlocal.train.data_parallel import DataParallel

WORLD = 4
KINDS = (LocalSGD, SlowMo, DiLoCo)
WEIGHTS = [1.0, 3.0, 2.0, 5.0]
# Four terms summed in another order differ by at most 3 · 2⁻²⁴ of their size in each of three syncs; the steps in
# between carry it on. Weights here are below 1.
ROUNDED = {"rtol": 3e-6, "atol": 3e-6}


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def build(kind, k, interval=3, group=None, model=None, optimizer="sgd", seed=0, **options):
    team = Workers(model or network(seed), k)
    if optimizer == "sgd":
        inner = torch.optim.SGD(team.parameters(), lr=0.05, momentum=0.9)
    else:
        inner = torch.optim.AdamW(team.parameters(), lr=0.01)
    # A group of one process is none: the run to compare with.
    return kind(inner, team, interval, process_group=group or ALONE, timeout=20.0, **options), team


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


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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


def four_times_one_equals_one_times_four(rank, new_group):
    group = new_group()
    for kind in KINDS:
        spread, _ = against_one_process(kind, rank, group, 1, ROUNDED)
        assert math.isnan(spread.stats.drift)
        assert 0 < spread.stats.seconds_in_sync < 60


def two_times_two_equals_one_times_four_and_measures_drift(rank, new_group):
    pairs = [new_group([0, 1]), new_group([2, 3])]
    for kind in KINDS:
        policy = FixedInterval(3)
        policy.reads_drift = True
        spread, single = against_one_process(kind, rank, pairs[rank // 2], 2, ROUNDED, interval=policy)
        assert spread.stats.drift == pytest.approx(single.stats.drift, rel=1e-4)
        spread, _ = against_one_process(kind, rank, pairs[rank // 2], 2, ROUNDED)
        assert math.isnan(spread.stats.drift)


def two_times_one_is_bit_equal_to_one_times_two(rank, new_group):
    pairs = [new_group([0, 1]), new_group([2, 3])]
    exact = {"rtol": 0, "atol": 0}
    for kind in KINDS:
        against_one_process(kind, rank, pairs[rank // 2], 1, exact)
    for inner_state in ("average", "reset"):
        for optimizer in ("sgd", "adamw"):
            options = {"inner_state": inner_state, "optimizer": optimizer}
            against_one_process(SlowMo, rank, pairs[rank // 2], 1, exact, **options)
    against_one_process(DiLoCo, rank, pairs[rank // 2], 1, exact, warmup_steps=3)


def a_bfloat16_wire_gives_the_mean_of_the_rounded_progress_on_every_rank(rank, new_group):
    group, pairs = new_group(), [new_group([0, 1]), new_group([2, 3])]
    # The same roundings in the same order where each process has one worker; where it has two, it sends their sum.
    exact, rounded = {"rtol": 0, "atol": 0}, {"rtol": 0, "atol": 1e-3}
    for kind in KINDS:
        against_one_process(kind, rank, group, 1, ROUNDED, wire_dtype=torch.bfloat16)  # the buffers differ
        against_one_process(kind, rank, pairs[rank // 2], 1, exact, wire_dtype=torch.bfloat16)
        against_one_process(kind, rank, pairs[rank // 2], 2, rounded, wire_dtype=torch.bfloat16)
    outcomes = []
    for k, own_group, weights in ((1, group, [WEIGHTS[rank]]), (WORLD, None, WEIGHTS)):
        optimizer, team = build(SlowMo, k, 3, own_group, wire_dtype=torch.bfloat16, weights=weights)
        run(optimizer, team, 7, worker=rank if k == 1 else 0)
        optimizer.sync()
        outcomes.append(parameters_of(team[0]))
    assert torch.equal(*outcomes)
    optimizer, team = build(LocalSGD, 1, 100, group=group, wire_dtype=torch.bfloat16)
    start = parameters_of(team[0]).double()
    run(optimizer, team, 4, worker=rank)
    if rank == 2:
        poison(team[0])
    own = parameters_of(team[0]).double() - start
    everybody = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(everybody, own, group=group)
    optimizer.sync()
    mean = start + sum(everybody[k].bfloat16().double() for k in (0, 1, 3)) / 3
    progress = torch.stack([everybody[k].abs() for k in (0, 1, 3)]).sum(0)
    # The sum is rounded once, whatever the number of processes.
    assert ((parameters_of(team[0]).double() - mean).abs() <= 2**-8 * progress / 3 + 1e-7).all()
    assert_equal_everywhere(parameters_of(team[0]), group)
    assert optimizer.stats.excluded == 1
    optimizer, team = build(LocalSGD, 1, 100, group=group, wire_dtype=torch.bfloat16 if rank == 1 else None)
    with pytest.raises(DisagreementError, match="rank 1 has wire_dtype 'torch.bfloat16', rank 0 has 'None'"):
        run(optimizer, team, 1)


def another_default_device_or_dtype_changes_nothing(rank, new_group):
    group = new_group()
    for options in ({}, {"wire_dtype": torch.bfloat16}, {"warmup_steps": 2, "inner_state": "average"}):
        policy = FixedInterval(3)
        policy.reads_drift = True
        optimizer, team = build(SlowMo, 1, policy, group, **options)
        for step in range(8):
            optimizer.zero_grad()
            backward(team[0], step, rank)
            with torch.device("meta"):  # what is made there by mistake has no values
                optimizer.step()
        with torch.device("meta"):
            optimizer.sync()
        single, alone = build(SlowMo, WORLD, policy, **options)
        run(single, alone, 8)
        single.sync()
        for ours, theirs in zip(tensors_of(team[0]), tensors_of(alone[0]), strict=True):
            torch.testing.assert_close(ours, theirs, **ROUNDED)
    for kind, k in ((SlowMo, 1), (DiLoCo, 1), (SlowMo, 2)):
        outcomes = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            optimizer, team = build(kind, k, 3, group)
            for step in range(6):
                optimizer.zero_grad()
                for number, model in enumerate(team):
                    backward(model, step, k * rank + number)
                torch.set_default_dtype(dtype)
                optimizer.step()
                torch.set_default_dtype(torch.float32)
            outcomes.append(parameters_of(team[0]))
        assert torch.equal(outcomes[0], outcomes[1])
        assert torch.equal(outcomes[0], outcomes[2])


def ranks_that_left_the_warmup_apart_meet_again(rank, new_group):
    group = new_group()
    for kind, wire_dtype in ((SlowMo, None), (LocalSGD, torch.bfloat16), (SlowMo, torch.bfloat16)):
        optimizer, team = build(kind, 1, 2, group=group, warmup_steps=2, wire_dtype=wire_dtype)
        run(optimizer, team, 2, worker=rank)
        with torch.no_grad():
            for parameter in team.parameters():  # as CPUs that round otherwise leave them
                parameter.mul_(1 + 1e-3 * rank)
        run(optimizer, team, 4, first=2, worker=rank)
        assert_equal_everywhere(parameters_of(team[0]), group)


def rank_0_gives_parameters_and_buffers_to_begin_with(rank, new_group):
    model = network(rank)
    model[0].weight.requires_grad_(False)  # frozen ones too
    optimizer, team = build(LocalSGD, 1, 100, group=new_group(), model=model)
    with torch.no_grad():
        team[0][1].running_mean.fill_(rank + 1.0)
        optimizer.zero_grad()
        for parameter in team.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters_of(team[0]), parameters_of(network(0)))
    assert team[0][1].running_mean.tolist() == [1.0] * 4


class Motley(nn.Module):
    """Everything that a flat exchange may trip over."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.low = nn.Linear(4, 3).bfloat16()
        self.exact = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.unused = nn.Parameter(torch.randn(5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.one = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.tensor([3, 4], dtype=torch.int32))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("rotary", torch.tensor([1 + 1j, 2.0]))
        self.register_buffer("low_buffer", torch.tensor([1.0], dtype=torch.bfloat16))

    def forward(self, x, use=False):
        y = self.low(self.tied(self.first(x)).bfloat16()).double() * self.exact * self.one
        return y + self.unused.sum() if use else y


def odd_tensors_are_averaged_and_keep_their_storage(rank, new_group):
    group, outcomes = new_group(), []
    for k, own_group, first in ((1, group, rank), (4, None, 0)):
        optimizer, team = build(SlowMo, k, 2, group=own_group, model=Motley())
        places = [(p.data_ptr(), p.stride()) for p in team.parameters()]
        for step in range(5):
            for worker, model in enumerate(team, start=first):
                model.zero_grad(set_to_none=True)
                x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + worker))
                model(x, use=step > 1 and worker == 2).square().mean().backward()
                model.one.grad = None if worker % 2 else model.one.grad  # by rank
                model.seen[0] = worker + step
                model.flag.fill_(worker == 3)
                model.rotary.imag[0] = worker
                model.low_buffer.fill_(worker)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        optimizer.sync()
        assert [(p.data_ptr(), p.stride()) for p in team.parameters()] == places
        outcomes.append((tensors_of(team[0]), dict(team[0].named_buffers()), stats_of(optimizer)))
    (ours, buffers, counted), (theirs, _, expected) = outcomes
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **ROUNDED)
    assert buffers["seen"].tolist() == [3 + 4, 4]
    assert buffers["flag"].item()
    assert torch.equal(buffers["mask"], Motley().mask)
    assert buffers["rotary"].tolist() == [1 + 1.5j, 2.0]
    assert buffers["low_buffer"].item() == 1.5
    # 15 low-precision values travel as float32 between processes: 2 more bytes each, 3 rounds, 2 · 3/4 times.
    assert counted == expected | {"bytes_on_wire": expected["bytes_on_wire"] + 3 * 15 * 2 * 6 // 4}


def buffers_are_kept_or_broadcast_as_chosen(rank, new_group):
    group = new_group()
    for choice in ("broadcast", "keep"):
        optimizer, team = build(LocalSGD, 1, 100, group=group, buffers=choice)
        run(optimizer, team, 1, worker=rank)
        team[0][1].running_mean.fill_(torch.nan if rank == 0 else rank)
        team[0][1].num_batches_tracked.fill_(7 + rank)
        if rank == 1 and choice == "keep":
            poison(team[0])
        optimizer.sync()
        mean = team[0][1].running_mean[0].item()
        if choice == "broadcast":
            assert mean == 1.0  # rank 0's was not finite
            assert team[0][1].num_batches_tracked.item() == 7
        elif rank == 1:
            assert mean == 2.0  # left out, and rank 2 is the first of the others whose buffer is finite
            assert team[0][1].num_batches_tracked.item() == 7
        else:
            assert math.isnan(mean) if rank == 0 else mean == rank


def settings_that_differ_are_named_on_every_rank(rank, new_group):
    group = new_group()
    optimizer, team = build(SlowMo, 1, 5 if rank == 1 else 4, group=group, slow_lr=0.5 if rank == 3 else 1.0)
    with pytest.raises(DisagreementError) as error:
        run(optimizer, team, 1)
    assert "rank 1 has FixedInterval.interval 5, rank 0 has 4" in str(error.value)
    assert "rank 3 has slow_lr 0.5, rank 0 has 1.0" in str(error.value)
    model = nn.Sequential(nn.Linear(3, 2 + (rank == 2)))
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, 2, process_group=group)
    with pytest.raises(
        DisagreementError, match=r"rank 2 has the tensor 0.weight \(3, 3\) .*, rank 0 0.weight \(2, 3\)"
    ):
        optimizer.step()


def other_numbers_of_steps_and_rates_are_errors_on_every_rank(rank, new_group):
    optimizer, team = build(LocalSGD, 1, 100, group=new_group())
    run(optimizer, team, 2 if rank == 2 else 3)
    with pytest.raises(DisagreementError) as error:
        optimizer.sync()
    assert "rank 2 is at local step 2, rank 0 at 3;" in str(error.value)
    optimizer, team = build(SlowMo, 1, 100, group=new_group())
    run(optimizer, team, 1)
    optimizer.param_groups[0]["lr"] = 0.05 * (1 + rank)
    run(optimizer, team, 1)
    with pytest.raises(DisagreementError, match="rank 1 is at sum of learning rates"):
        optimizer.sync()


def a_slow_rate_that_one_rank_alone_sets_is_an_error_on_every_rank(rank, new_group):
    group = new_group()
    for kind, name in ((SlowMo, "slow_lr"), (DiLoCo, "slow_momentum")):
        optimizer, team = build(kind, 1, 2, group)
        run(optimizer, team, 2, worker=rank)
        setattr(optimizer, name, 0.25)  # in all alike
        run(optimizer, team, 2, first=2, worker=rank)
        assert_equal_everywhere(parameters_of(team[0]), group)
        if rank == 1:
            setattr(optimizer, name, 0.125)
        with pytest.raises(DisagreementError, match=f"rank 1 is at {name} 0.125, rank 0 at 0.25"):
            run(optimizer, team, 2, first=4, worker=rank)


def layers_that_ranks_freeze_differently_are_an_error_of_slow_momentum_alone(rank, new_group):
    group = new_group()
    for kind in (LocalSGD, DiLoCo):
        optimizer, team = build(kind, 1, 2, group)
        run(optimizer, team, 2, worker=rank)
        frozen = team[0][0] if rank == 1 else team[0][4]
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        if kind is LocalSGD:
            run(optimizer, team, 2, first=2, worker=rank)
            assert_equal_everywhere(parameters_of(team[0]), group)
            continue
        with pytest.raises(
            DisagreementError, match=r"rank 1 is at frozen parameters with checksum \d+, rank 0 at with"
        ):
            run(optimizer, team, 2, first=2, worker=rank)


def rank_0_alone_decides_the_interval(rank, new_group):
    group = new_group()
    optimizer, team = build(LocalSGD, 1, OriginalValidationLoss(4, total_epochs=100), group=group)
    intervals = []
    for epoch in range(6):
        run(optimizer, team, 4, first=4 * epoch, worker=rank)
        optimizer.sync()
        optimizer.observe(val_loss=1.0 - 0.001 * epoch if rank == 0 else 5.0 + rank * epoch)
        if rank == 2:
            optimizer.observe(val_loss=torch.nan)  # of a worker that will be healed, say
        intervals.append(optimizer.stats.interval)
    assert intervals == [4, 4, 8, 16, 32, 64]
    run(optimizer, team, 1, first=99, worker=rank)
    assert optimizer.stats.val_loss == 0.995
    state = optimizer.state_dict()["fastlocal"]
    said = [({}, 0)] * WORLD
    dist.all_gather_object(said, (state["policy"], state["stats"]["observations"]), group=group)
    assert said[0] == said[rank] == ({"name": "OriginalValidationLoss", "state": said[0][0]["state"]}, 6)


def drift_is_measured_for_a_policy_that_reads_it(rank, new_group):
    def make(k, group):
        return build(LocalSGD, k, ConsensusDistance(0.01, initial=4), group=group)

    optimizer, team = make(1, new_group())
    run(optimizer, team, 4, worker=rank)
    single, workers = make(4, None)
    run(single, workers, 4)
    assert optimizer.stats.drift == pytest.approx(single.stats.drift, rel=1e-5)
    torch.testing.assert_close(parameters_of(team[0]), parameters_of(workers[0]), **ROUNDED)
    run(optimizer, team, 1, first=9, worker=rank)
    run(single, workers, 1, first=9)
    assert optimizer.stats.interval == single.stats.interval != 4
    # Whoever asks for it on the way has it, and with it all.
    optimizer, team = build(LocalSGD, 1, 2, group=new_group())
    run(optimizer, team, 2, worker=rank)
    if rank == 1:
        optimizer.policy.reads_drift = True
    run(optimizer, team, 2, first=2, worker=rank)
    assert optimizer.stats.drift > 0


def poison(model):
    with torch.no_grad():
        next(model.parameters())[1, 2, 0, 1] = torch.nan


def a_worker_that_is_not_finite_is_left_out_and_healed(rank, new_group):
    pairs = [new_group([0, 1]), new_group([2, 3])]
    quartet = new_group()
    for kind, inner_state, optimizer in (
        (LocalSGD, "keep", "sgd"),
        (SlowMo, "average", "adamw"),
        (DiLoCo, "average", "sgd"),
    ):
        for k, group in ((1, quartet), (2, pairs[rank // 2])):
            outcomes = []
            for rows, own_group in ((k, group), (4, None)):
                wrapped, team = build(kind, rows, 100, own_group, inner_state=inner_state, optimizer=optimizer)
                first = rows * dist.get_rank(own_group) if own_group else 0
                run(wrapped, team, 3, worker=first)
                for worker, model in enumerate(team, start=first):
                    if worker in (0, 3):
                        poison(model)
                wrapped.sync()
                assert wrapped.stats.excluded == 2
                run(wrapped, team, 3, first=3, worker=first)
                wrapped.sync()
                assert wrapped.stats.excluded == 2
                outcomes.append((tensors_of(team[0]), stats_of(wrapped)))
            for ours, theirs in zip(outcomes[0][0], outcomes[1][0], strict=True):
                torch.testing.assert_close(ours, theirs, **ROUNDED)
            assert outcomes[0][1] == outcomes[1][1]


def without_a_finite_worker_every_rank_raises(rank, new_group):
    optimizer, team = build(LocalSGD, 1, 100, group=new_group())
    run(optimizer, team, 2)
    poison(team[0])
    with pytest.raises(DivergedError, match="after 2 local steps no worker's parameters are finite"):
        optimizer.sync()


def a_step_that_gradscaler_skips_on_one_rank_counts_there_too(rank, new_group):
    for fused in (False, True):
        for warmup in (0, 2):
            group = new_group()
            model = network()
            inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
            optimizer = SlowMo(inner, model, 4, process_group=group, timeout=20.0, warmup_steps=warmup)
            twin = copy.deepcopy(model)
            plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            for step in range(4 + warmup):
                optimizer.zero_grad()
                plain.zero_grad()
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(8, 3, 6, 6, generator=generator)
                scaler.scale(model(x).square().mean()).backward()
                twin(x).square().mean().backward()
                skipped = step == 1
                if skipped and rank == 2:
                    model[4].bias.grad.fill_(torch.inf)
                before = parameters_of(model)
                scaler.step(optimizer)
                scaler.update()
                if not skipped or (rank != 2 and not warmup):
                    plain.step()
                if optimizer.stats.local_steps < 4 + warmup:
                    torch.testing.assert_close(parameters_of(model), parameters_of(twin), **ROUNDED)
                    assert torch.equal(before, parameters_of(model)) == (skipped and (rank == 2 or warmup > 0))
            assert optimizer.stats.local_steps == 4 + warmup
            assert optimizer.stats.rounds == 1 + warmup
            assert not hasattr(inner, "found_inf")
            assert scaler.get_scale() == (2.0**9 if rank == 2 else 2.0**10)
            assert_equal_everywhere(parameters_of(model), group)


def warmup_averages_gradients_that_only_some_ranks_have(rank, new_group):
    model = nn.ParameterList([torch.zeros(2), torch.zeros(3), torch.zeros(4, dtype=torch.float64)])
    model[1].data.fill_(5.0)
    inner = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
    optimizer = LocalSGD(inner, model, 5, process_group=new_group(), warmup_steps=1)
    if rank == 1:
        model[0].grad = torch.tensor([4.0, 8.0])
    if rank > 1:
        model[2].grad = torch.full((4,), 2.0 * rank, dtype=torch.float64)
    optimizer.step()
    assert model[0].tolist() == [-1.0, -2.0]
    assert model[1].tolist() == [5.0] * 3  # nobody had a gradient: no weight decay either
    assert model[2].tolist() == [-2.5] * 4


def warmup_equals_the_one_process_run(rank, new_group):
    group = new_group()
    against_one_process(SlowMo, rank, group, 1, ROUNDED, warmup_steps=4)
    pairs = [new_group([0, 1]), new_group([2, 3])]
    against_one_process(LocalSGD, rank, pairs[rank // 2], 2, ROUNDED, warmup_steps=6)
    against_one_process(LocalSGD, rank, pairs[rank // 2], 2, ROUNDED, warmup_steps=100)  # sync() merges buffers


def weights_weigh_the_workers_of_all_ranks(rank, new_group):
    model = nn.Linear(1, 1, bias=False)
    optimizer = LocalSGD(
        torch.optim.SGD(model.parameters(), lr=1.0), model, 1, process_group=new_group(), weights=[1.0 + rank]
    )
    with torch.no_grad():
        model.weight.zero_()
    model.weight.grad = torch.full((1, 1), -10.0 * rank)
    optimizer.step()
    assert model.weight.item() == pytest.approx((0 * 1 + 10 * 2 + 20 * 3 + 30 * 4) / 10, rel=1e-6)
    optimizer.weights = [1.0 if rank < 2 else 1e-9]
    model.weight.grad = torch.full((1, 1), -10.0 * rank)
    optimizer.step()
    assert model.weight.item() == pytest.approx(20 + 5, rel=1e-6)


def weights_weigh_the_gradients_of_the_warmup(rank, new_group):
    quartet, pairs = new_group(), [new_group([0, 1]), new_group([2, 3])]
    gradients = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    exact = -torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) @ gradients.double() / 10
    for k, group in ((1, quartet), (2, pairs[rank // 2])):
        first = k * dist.get_rank(group)
        team = Workers(nn.ParameterList([torch.zeros(5), torch.zeros(3, dtype=torch.bfloat16)]), k)
        weights = [1.0 + first + row for row in range(k)]
        inner = torch.optim.SGD(team.parameters(), lr=1.0)
        optimizer = LocalSGD(inner, team, 5, process_group=group, warmup_steps=1, weights=weights)
        for worker, model in enumerate(team, start=first):
            model[0].grad = gradients[worker].clone()
            model[1].grad = torch.full((3,), 5.0, dtype=torch.bfloat16) if worker == 2 else None
        optimizer.step()
        for model in team:
            torch.testing.assert_close(model[0].detach().double(), exact, rtol=3e-7, atol=3e-7)
            assert model[1].tolist() == [-1.5] * 3


def a_line_search_in_the_warmup_takes_the_same_step_on_every_rank(rank, new_group):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    single = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    batches = [(1 + 3 * n) * torch.randn(8, 3, generator=generator, dtype=torch.float64) for n in range(WORLD)]

    def closure_of(module, optimizer, own):
        def closure():
            optimizer.zero_grad()
            loss = sum((module(x) - x[:, :2].sin()).square().mean() for x in own) / len(own)
            loss.backward()
            return loss

        return closure

    options = {"max_iter": 5, "line_search_fn": "strong_wolfe"}
    inner = torch.optim.LBFGS(list(model.parameters()), **options)
    spread = LocalSGD(inner, model, 2, process_group=new_group(), timeout=20.0, warmup_steps=3)
    plain = torch.optim.LBFGS(list(single.parameters()), **options)
    for _ in range(3):
        ours = spread.step(closure_of(model, spread, batches[rank : rank + 1]))
        assert ours.item() == pytest.approx(plain.step(closure_of(single, plain, batches)).item(), rel=1e-9)
    for parameter, exact in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(parameter, exact, rtol=1e-8, atol=1e-8)


def an_optimizer_that_begins_after_another_leaves_what_that_one_has_stepped(rank, new_group):
    results = []
    for group, k in ((new_group(), 1), (ALONE, WORLD)):
        torch.manual_seed(0)
        team = Workers(nn.Linear(3, 2, dtype=torch.float64), k)
        wrapped = []
        for dim in (1, 2):
            inner = torch.optim.SGD([p for p in team.parameters() if p.dim() == dim], lr=0.1)
            wrapped.append(LocalSGD(inner, team, 3, process_group=group, timeout=20.0))
        for _ in range(3):
            for number, model in enumerate(team, start=rank if k == 1 else 0):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, number)
            for optimizer in wrapped:
                optimizer.step()
        results.append(parameters_of(team[0]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def factored_moments_are_averaged_and_kept_buffers_may_differ_in_shape(rank, new_group):
    finished = []
    for group, k in ((new_group(), 1), (ALONE, WORLD)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3, dtype=torch.float64)
        model.register_buffer("cache", torch.zeros(0))
        for name in ("a", "b") if rank % 2 else ("b", "a"):
            model.register_buffer(name, torch.tensor(ord(name)))
        team = Workers(model, k)
        inner = torch.optim.Adafactor(team.parameters(), lr=0.1)
        options = {"inner_state": "average", "buffers": "keep", "process_group": group, "timeout": 20.0}
        optimizer = LocalSGD(inner, team, 2, **options)
        for step in range(6):
            for number, worker in enumerate(team, start=rank if k == 1 else 0):
                worker.cache = torch.full((number + 1,), float(number))
                worker.zero_grad()
                generator = torch.Generator().manual_seed(10 * step + number)
                x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
                worker(x).square().sum().backward()
                if (step, number) == (3, 2):
                    worker.weight.data[0, 0] = torch.nan
            optimizer.step()
        mine = team[0 if k == 1 else rank]
        assert mine.cache.tolist() == [float(rank)] * (rank + 1)
        assert (mine.a, mine.b) == (ord("a"), ord("b"))  # rank 2's are healed with its parameters
        assert optimizer.stats.excluded == 1
        finished.append((parameters_of(mine), optimizer.stats.bytes_on_wire))
    torch.testing.assert_close(finished[0][0], finished[1][0], rtol=1e-10, atol=1e-10)
    assert finished[0][1] == finished[1][1]


def data_parallel_averages_as_one_process_and_counts_every_byte(rank, new_group):
    group = find_group(new_group(), 20.0, [torch.device("cpu")])
    team = Workers(network(), 1)
    parallel = DataParallel(torch.optim.SGD(team.parameters(), lr=0.05, momentum=0.9), team, group)
    sent = []

    def counted(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(group.process_group, bucket)

    parallel.model.register_comm_hook(None, counted)
    single, workers = build(LocalSGD, 4, 1, warmup_steps=100)
    for steps in (3, 2):
        for step in range(steps):
            parallel.model.zero_grad()
            with parallel.watching():
                backward(parallel.model, step, rank)
            parallel.step()
        run(single, workers, steps)
        means = group.gather(team[0][1].running_mean.tolist())
        assert len(set(map(tuple, means))) == WORLD  # no forward pass has sent them
        parallel.sync()
        single.sync()
        for ours, theirs in zip(tensors_of(team[0]), tensors_of(workers[0]), strict=True):
            torch.testing.assert_close(ours, theirs, **ROUNDED)
    parameters = 4 * (3 * 4 * 9 + 4 + 2 * 4 + 4 * 16 * 5 + 5)
    buffers = 4 * (4 + 4) + 8
    assert sum(sent) == 5 * parameters
    assert parallel.stats.bytes_on_wire == 5 * (2 * 3 * parameters // 4) + 2 * (2 * 3 * buffers // 4)
    assert stats_of(parallel) == stats_of(single) | {"interval": parallel.stats.interval}


def work_that_a_device_never_ends_is_an_error_after_the_timeout(rank, new_group):
    process_group = new_group()
    group = find_group(process_group, 1.0, [torch.device("cpu")])
    group.arrive("close a round", 7)
    done = iter([False, False, True])
    group.finish(lambda: next(done))
    assert next(done, "all asked") == "all asked"
    everybody_came = "close a round at local step 7: all ranks had arrived, and the transfer did not end"
    with pytest.raises(LostRankError, match=rf"waited 1\.\d s to {everybody_came}"):
        group.finish(lambda: False)
    with pytest.raises(ValueError, match=r"must have a backend for parameters on meta, and has cpu:gloo"):
        find_group(process_group, 1.0, [torch.device("cpu"), torch.device("meta")])


def resume_is_bit_exact_in_the_middle_of_a_round(rank, new_group):
    group = new_group()
    for kind in KINDS:
        straight, team = build(kind, 1, 4, group, optimizer="adamw")
        run(straight, team, 11, worker=rank)
        first, first_team = build(kind, 1, 4, group, optimizer="adamw")
        run(first, first_team, 6, worker=rank)
        file = io.BytesIO()
        torch.save({"model": first_team.state_dict(), "optimizer": first.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second, second_team = build(kind, 1, 4, group, optimizer="adamw", seed=5 + rank)
        second_team.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
        run(second, second_team, 5, first=6, worker=rank)
        for ours, theirs in zip(tensors_of(second_team[0]), tensors_of(team[0]), strict=True):
            assert torch.equal(ours, theirs)
        assert stats_of(second) == stats_of(straight)


def a_state_goes_on_in_another_number_of_processes_at_a_rounds_end(rank, new_group):
    first, team = build(SlowMo, 1, 4, new_group())
    run(first, team, 8, worker=rank)
    state, model = copy.deepcopy(first.state_dict()), copy.deepcopy(team.state_dict())
    run(first, team, 1, first=8, worker=rank)
    pairs = [new_group([0, 1]), new_group([2, 3])]
    second, pair = build(SlowMo, 1, 4, pairs[rank // 2], seed=3)
    pair.load_state_dict(model)
    second.load_state_dict(state)
    anchor = second.state_dict()["fastlocal"]["outer"][0]["anchor"]
    assert torch.equal(anchor, state["fastlocal"]["outer"][0]["anchor"])
    run(second, pair, 4, first=8, worker=rank % 2)
    assert second.stats.rounds == 3
    assert_equal_everywhere(parameters_of(pair[0]), pairs[rank // 2])
    with pytest.raises(ValueError, match="of the number of workers 4 in the middle of a round, this optimizer has 2"):
        second.load_state_dict(first.state_dict())


def a_model_under_ddp_without_its_own_sync_is_averaged(rank, new_group):
    group = new_group()
    plain, team = build(SlowMo, 1, 3, group)
    run(plain, team, 6, worker=rank)
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
    inner = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    optimizer = SlowMo(inner, wrapped, 3, process_group=group)
    for step in range(6):
        optimizer.zero_grad()
        with wrapped.no_sync():
            backward(wrapped, step, rank)
        optimizer.step()
    assert torch.equal(parameters_of(model), parameters_of(team[0]))


def copies_talk_to_the_copies_in_the_other_processes(rank, new_group):
    group = new_group()
    optimizer, team = build(SlowMo, 1, 3, group)
    run(optimizer, team, 4, worker=rank)
    twin = copy.deepcopy(optimizer)
    run(optimizer, team, 4, first=4, worker=rank)
    run(twin, twin.rows.modules, 4, first=4, worker=rank)
    assert torch.equal(parameters_of(team[0]), parameters_of(twin.rows.modules[0]))


def pieces_of_a_sharded_model_are_averaged_as_the_whole_would_be(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replicas, shards = mesh.get_group("replicate"), mesh.get_group("shard")
    own = dist.get_rank(replicas)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def train(optimizer, workers, first, poisoned=False):
        for step in range(8):
            optimizer.zero_grad()
            for worker, net in enumerate(workers, start=first):
                x = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + worker))
                net(x).square().mean().backward()
            optimizer.step()
            if poisoned and step == 4:  # one value, in one piece of one worker
                for worker, net in enumerate(workers, start=first):
                    parameter = net[2].weight
                    piece = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                    if worker == 1 and (first == 0 or dist.get_rank(shards) == 0):
                        with torch.no_grad():
                            piece[0, 0] = torch.inf
        optimizer.sync()

    def sharded(kind, interval, **options):
        net = model()
        for layer in (net[0], net[2]):
            fully_shard(layer, mesh=mesh["shard"])
        fully_shard(net, mesh=mesh["shard"])
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return net, kind(inner, net, interval, process_group=replicas, timeout=20.0, **options)

    for kind in (LocalSGD, SlowMo):
        for poisoned, options in (
            (False, {"warmup_steps": 2}),
            (True, {}),
            (True, {"inner_state": "average"}),
            (True, {"wire_dtype": torch.bfloat16}),
        ):
            # Gradients whose last digit differs may be rounded to the other side: by 1/128 of a round's progress.
            tolerance = {"rtol": 0, "atol": 2e-3} if "wire_dtype" in options else ROUNDED
            net, optimizer = sharded(kind, ConsensusDistance(1.0, initial=3), **options)
            places = [p.to_local().data_ptr() for p in net.parameters()]
            train(optimizer, [net], own, poisoned)
            team = Workers(model(), 2)
            inner = torch.optim.SGD(team.parameters(), lr=0.1, momentum=0.9)
            single = kind(inner, team, ConsensusDistance(1.0, initial=3), process_group=ALONE, **options)
            train(single, team, 0, poisoned)
            for ours, theirs in zip(net.parameters(), team[0].parameters(), strict=True):
                torch.testing.assert_close(ours.full_tensor().detach(), theirs.detach(), **tolerance)
            assert [p.to_local().data_ptr() for p in net.parameters()] == places
            assert stats_of(optimizer) == stats_of(single)
            assert optimizer.stats.excluded == poisoned
            assert optimizer.stats.drift == pytest.approx(single.stats.drift, rel=1e-4)
    net = sharded(LocalSGD, 2)[0]
    with pytest.raises(ValueError, match=r"the ranks \[0, 1\] hold pieces of the same one|the ranks \[2, 3\] hold"):
        LocalSGD(torch.optim.SGD(net.parameters(), lr=0.1), net, 2, process_group=shards)


def a_rank_that_stalls_is_named_by_the_others(rank, new_group):
    optimizer, team = build(LocalSGD, 1, 3, group=new_group())
    optimizer._group.timeout = 2.0
    run(optimizer, team, 3)
    if rank == 3:  # an exception in the data loader, say: this one never comes
        run(optimizer, team, 1)
        dist.barrier()
        return
    run(optimizer, team, 2)
    with pytest.raises(LostRankError) as error:
        run(optimizer, team, 1)
    dist.barrier()
    said = str(error.value)
    assert f"rank {rank} waited 2." in said
    assert "to close a round at local step 6" in said
    assert "rank 3 has not arrived (last seen at local step 3)" in said
    assert all(f"rank {other} has" not in said for other in range(3))


def a_rank_that_dies_between_header_and_transfer_is_named_by_the_others(rank, new_group):
    group = new_group()
    SURVIVORS.append(new_group([0, 1, 2]))
    optimizer, team = build(LocalSGD, 1, 2, group=group, model=nn.Linear(1000, 1000))
    layer = team[0]
    for step in range(4):
        layer.zero_grad()
        layer(torch.ones(1, 1000)).sum().backward()
        if step == 3 and rank == 3:
            optimizer._group.reduce_ = lambda tensor, operation: os.kill(os.getpid(), signal.SIGKILL)
        if step < 3:
            optimizer.step()
    # Rank 1 is no neighbour of rank 3's in a ring: here, where nobody leaves, its time must run out.
    optimizer._group.timeout = 5.0
    with pytest.raises(LostRankError) as error:
        optimizer.step()
    assert "to close a round at local step 4: rank 3 arrived and fell silent. A process" in str(error.value)


def a_rank_that_is_killed_is_named_by_the_others(rank, new_group):
    optimizer, team = build(LocalSGD, 1, 2, group=SURVIVORS[0])
    run(optimizer, team, 2)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LostRankError, match=r"rank 2 has not arrived \(last seen at local step 2\)") as error:
        run(optimizer, team, 3)
    assert time.monotonic() - started < 15
    assert all(f"rank {other} has" not in str(error.value) for other in (0, 1))


SCENARIOS = [
    four_times_one_equals_one_times_four,
    two_times_two_equals_one_times_four_and_measures_drift,
    two_times_one_is_bit_equal_to_one_times_two,
    a_bfloat16_wire_gives_the_mean_of_the_rounded_progress_on_every_rank,
    another_default_device_or_dtype_changes_nothing,
    ranks_that_left_the_warmup_apart_meet_again,
    rank_0_gives_parameters_and_buffers_to_begin_with,
    work_that_a_device_never_ends_is_an_error_after_the_timeout,
    a_line_search_in_the_warmup_takes_the_same_step_on_every_rank,
    an_optimizer_that_begins_after_another_leaves_what_that_one_has_stepped,
    factored_moments_are_averaged_and_kept_buffers_may_differ_in_shape,
    odd_tensors_are_averaged_and_keep_their_storage,
    buffers_are_kept_or_broadcast_as_chosen,
    settings_that_differ_are_named_on_every_rank,
    other_numbers_of_steps_and_rates_are_errors_on_every_rank,
    a_slow_rate_that_one_rank_alone_sets_is_an_error_on_every_rank,
    rank_0_alone_decides_the_interval,
    drift_is_measured_for_a_policy_that_reads_it,
    a_worker_that_is_not_finite_is_left_out_and_healed,
    without_a_finite_worker_every_rank_raises,
    a_step_that_gradscaler_skips_on_one_rank_counts_there_too,
    warmup_averages_gradients_that_only_some_ranks_have,
    warmup_equals_the_one_process_run,
    weights_weigh_the_workers_of_all_ranks,
    weights_weigh_the_gradients_of_the_warmup,
    data_parallel_averages_as_one_process_and_counts_every_byte,
    resume_is_bit_exact_in_the_middle_of_a_round,
    a_state_goes_on_in_another_number_of_processes_at_a_rounds_end,
    a_model_under_ddp_without_its_own_sync_is_averaged,
    copies_talk_to_the_copies_in_the_other_processes,
    pieces_of_a_sharded_model_are_averaged_as_the_whole_would_be,
    a_rank_that_stalls_is_named_by_the_others,
    a_rank_that_dies_between_header_and_transfer_is_named_by_the_others,  # rank 3 is gone after it
    a_rank_that_is_killed_is_named_by_the_others,  # the last one: rank 2 is gone after it
]
SURVIVORS = []
ALONE = None


def main(rank, folder, chosen=()):
    global ALONE
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for number in range(WORLD):
        group = dist.new_group([number])
        ALONE = group if number == rank else ALONE
    for scenario in SCENARIOS:
        if chosen and scenario.__name__ not in chosen:
            continue
        started = time.monotonic()
        try:
            scenario(rank, functools.partial(dist.new_group, timeout=timedelta(seconds=30)))
            outcome = "ok"
        except BaseException:
            outcome = traceback.format_exc()
        Path(folder, f"{scenario.__name__}.{rank}").write_text(outcome)
        if chosen or os.environ.get("FASTLOCAL_TIMES"):
            print(f"{rank} {time.monotonic() - started:6.2f} s {scenario.__name__} {outcome}", flush=True)
    os._exit(0)  # a broken group cannot be destroyed in order


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
