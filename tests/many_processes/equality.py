"""The same training in four processes, in two and in one gives the same run."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastlocal import ConsensusDistance, DiLoCo, FixedInterval, LocalSGD, SlowMo, Workers
from fastlocal.checksum import checksum
from fastlocal.comm import Sum, find_group
from fastlocal.local import DisagreementError
from fastlocal.ops import progress
from fastlocal.reference.averaging import rounded_to_float8
from fastlocal.train.data_parallel import DataParallel
from tests.local_runs import measured, network, parameters_of, poison
from tests.many_processes.team import (
    ALONE,
    KINDS,
    ROUNDED,
    WEIGHTS,
    WORLD,
    against_one_process,
    assert_equal_everywhere,
    backward,
    build,
    run,
    stats_of,
    tensors_of,
)


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


def a_low_precision_wire_gives_the_mean_of_the_rounded_progress_on_every_rank(rank, new_group):
    group, pairs = new_group(), [new_group([0, 1]), new_group([2, 3])]
    for wire_dtype, digit, least, rounded in (
        (torch.bfloat16, 2**-8, 0.0, lambda values: values.bfloat16().double()),
        (torch.float8_e4m3fn, 2**-4, 2**-16, rounded_to_float8),  # a chunk has a least step
    ):
        # The same roundings in one order where each process has one worker; where it has two, it sends their sum.
        exact, close = {"rtol": 0, "atol": 0}, {"rtol": 0, "atol": digit / 4}
        for kind in KINDS:
            against_one_process(kind, rank, pairs[rank // 2], 1, exact, wire_dtype=wire_dtype)
            against_one_process(kind, rank, pairs[rank // 2], 2, close, wire_dtype=wire_dtype)
        outcomes = []
        for k, own_group, weights in ((1, group, [WEIGHTS[rank]]), (WORLD, None, WEIGHTS)):
            optimizer, team = build(SlowMo, k, 3, own_group, wire_dtype=wire_dtype, weights=weights)
            run(optimizer, team, 7, worker=rank if k == 1 else 0)
            optimizer.sync()
            outcomes.append(parameters_of(team[0]))
        assert torch.equal(*outcomes)
        optimizer, team = build(LocalSGD, 1, 100, group=group, wire_dtype=wire_dtype)
        start = parameters_of(team[0]).double()
        run(optimizer, team, 4, worker=rank)
        if rank == 2:
            poison(team[0])
        own = parameters_of(team[0]).double() - start
        everybody = [torch.empty_like(own) for _ in range(WORLD)]
        dist.all_gather(everybody, own, group=group)
        optimizer.sync()
        mean = start + sum(rounded(everybody[k]) for k in (0, 1, 3)) / 3
        distance = torch.stack([everybody[k].abs() for k in (0, 1, 3)]).sum(0)
        # The sum is rounded once, whatever the number of processes.
        most = digit * distance / 3 + least * distance.max() + 1e-7
        assert ((parameters_of(team[0]).double() - mean).abs() <= most).all()
        assert_equal_everywhere(parameters_of(team[0]), group)
        assert optimizer.stats.excluded == 1
        optimizer, team = build(LocalSGD, 1, 100, group=group, wire_dtype=wire_dtype if rank == 1 else None)
        with pytest.raises(DisagreementError, match=f"rank 1 has wire_dtype '{wire_dtype}', rank 0 has 'None'"):
            run(optimizer, team, 1)
    for kind in KINDS:
        against_one_process(kind, rank, group, 1, ROUNDED, wire_dtype=torch.bfloat16)  # the buffers differ
    processes = find_group(group, 20.0, [torch.device("cpu")])
    assert processes is not None
    for columns in (10, 5000, WORLD * 2 * 1024):  # fewer chunks than processes, a padded last part, whole parts
        anchor = torch.zeros(columns)
        rows = torch.randn(WORLD, columns, generator=torch.Generator().manual_seed(columns))
        for wire_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            message, alone = (progress.empty_message(columns, wire_dtype, anchor.device) for _ in range(2))
            progress.progress_(message, rows[rank : rank + 1], anchor, [1.0])
            assert Sum(processes, message, progress.add_up).wait() is message
            progress.progress_(alone, rows, anchor, [1.0] * WORLD)
            assert torch.equal(message, alone)


def another_default_device_or_dtype_changes_nothing(rank, new_group):
    group = new_group()
    wires = ({"wire_dtype": torch.bfloat16}, {"wire_dtype": torch.float8_e4m3fn})
    for options in ({}, *wires, {"warmup_steps": 2, "inner_state": "average"}):
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
    optimizer, team = build(LocalSGD, 1, 100, group=new_group(), model=network(rank))
    backward(team[0], 0, 0)  # the gradient is of where this rank began, and not of where all begin
    gradient = torch.cat([p.grad.flatten() for p in team.parameters()]) * (rank == 0)
    optimizer.step()
    moved = parameters_of(network(0)) - 0.05 * gradient
    torch.testing.assert_close(parameters_of(team[0]), moved, **ROUNDED)
    for layer in (0, 1):  # so it is where a rank began elsewhere in one layer alone
        model = nn.ParameterList([torch.full((1,), float(rank * (layer == number))) for number in (0, 1)])
        optimizer, team = build(LocalSGD, 1, 100, group=new_group(), model=model)
        for parameter in team.parameters():
            parameter.grad = torch.ones(1)
        optimizer.step()
        assert parameters_of(team[0]).tolist() == pytest.approx([-0.05 * (rank == 0)] * 2)


def parameters_of_the_same_numbers_in_another_order_become_rank_0s(rank, new_group):
    group = new_group()
    for kind in KINDS:
        torch.manual_seed(0)
        model = nn.Linear(6, 4, bias=False)
        start = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.copy_(start.roll(rank, 0))
        optimizer, team = build(kind, 1, 100, group=group, model=model)
        team[0].weight.grad = torch.zeros_like(start)
        optimizer.step()
        assert torch.equal(team[0].weight, start)


def parameters_whose_checksums_differ_in_one_half_alone_become_rank_0s(rank, new_group):
    group = new_group()
    factor = checksum(torch.tensor([1])).item()
    for difference in (1, 2**32):
        number = difference * pow(factor, -1, 2**64) % 2**64
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        own = torch.tensor([(number - 2**64 if number >= 2**63 else number) if rank else 0])
        assert checksum(own).item() == (difference if rank else 0)
        model.frozen = nn.Parameter(own, requires_grad=False)
        inner = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
        optimizer = LocalSGD(inner, model, 9, process_group=group, timeout=20.0)
        optimizer.step()
        assert model.frozen.tolist() == [0]


def frozen_parameters_of_every_dtype_become_rank_0s_bit_by_bit(rank, new_group):
    group = new_group()
    dtypes = (
        torch.bool,
        torch.uint16,
        torch.int64,
        torch.float8_e4m3fn,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
    )
    for apart in (True, False):
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(apart * rank)
            model.bias.zero_()
        first = torch.tensor([[1, 0, 0], [0, 1, 1]])
        numbers = 1 - first if apart and rank else first
        model.frozen = nn.ParameterList([nn.Parameter(numbers.to(dtype), requires_grad=False) for dtype in dtypes])
        model.frozen.append(
            nn.Parameter(numbers.float().log().t(), requires_grad=False)
        )  # -inf, and of other strides
        model.frozen.append(nn.Parameter(numbers[0, 0] > 0, requires_grad=False))
        optimizer, team = build(LocalSGD, 2, 100, group=group, model=model)
        for parameter in team.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        for worker in team:
            assert worker.weight.tolist() == [[0.0] * 2] * 2
            *others, logarithms, one = worker.get_submodule("frozen").parameters()
            assert all(torch.equal(own, first.to(own.dtype)) for own in others)
            assert torch.equal(logarithms, first.float().log().t())
            assert one.item() is True


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
    # Parameters 64 + 30 + 24 + 20 + 4 bytes, buffers 16 + 8 + 1 + 16 + 2. Between processes 16 low-precision values
    # travel as float32, 2 more bytes each, and 3 small integers in 64 bits, 15 more. 3 rounds, 2 · 3/4 times.
    assert expected["bytes_on_wire"] == 3 * (185 * 6 // 4)
    assert counted == expected | {"bytes_on_wire": 3 * ((185 + 32 + 15) * 6 // 4)}


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


def workers_that_stand_still_in_three_processes_stay_where_they_are(rank, new_group):
    group = new_group([0, 1, 2])
    if rank == 3:
        return
    for k, reads_drift, weights in ((1, False, None), (1, True, None), (2, False, None), (1, False, [1.0 + rank])):
        policy = FixedInterval(1)
        policy.reads_drift = reads_drift
        torch.manual_seed(0)
        optimizer, team = build(DiLoCo, k, policy, group, model=nn.Linear(20, 20), weights=weights)
        start = parameters_of(team[0])
        for _ in range(40):
            optimizer.step()
        # Times a float32 of 1/3 they would grow by 6e-6.
        torch.testing.assert_close(parameters_of(team[0]), start, rtol=8 * 2**-24, atol=0)


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
    assert stats_of(parallel) == stats_of(single) | {"interval": parallel.stats.interval, "lr": parallel.stats.lr}


def leave_gradients_alone(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


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
    team = [new_group([0, 1]), new_group([2, 3])][rank // 2]  # whose gradients DDP averages, and nobody else's
    wrapped = nn.parallel.DistributedDataParallel(network(), process_group=team)
    others = [new_group([0, 2]), new_group([1, 3])][rank % 2]
    whole = nn.parallel.DistributedDataParallel(network(), process_group=group)
    for model, process_group, fails in ((wrapped, others, False), (wrapped, group, False), (whole, group, True)):
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=process_group)
        backward(model, 0, rank)
        if fails:
            with pytest.raises(RuntimeError, match="under DistributedDataParallel, which averages the gradients of"):
                optimizer.step()
            model.eval()  # evaluated since then: only the gradients tell
            with pytest.warns(UserWarning, match="same gradients in their first step"):
                optimizer.step()
        else:
            with warnings.catch_warnings(action="error"):  # not all have the same gradients
                optimizer.step()
    whole = nn.parallel.DistributedDataParallel(network(), process_group=group)
    hooked = nn.parallel.DistributedDataParallel(network(), process_group=group)
    hooked.register_comm_hook(None, leave_gradients_alone)
    inside = nn.Sequential(nn.parallel.DistributedDataParallel(network(), process_group=group))
    for model, called, fails in ((whole, whole.module, False), (hooked, hooked, False), (inside, inside, True)):
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=group)
        backward(called, 0, rank)
        if fails:
            with pytest.raises(RuntimeError, match="under DistributedDataParallel, which averages the gradients of"):
                optimizer.step()
        else:
            optimizer.step()


def a_ddp_put_around_the_model_later_is_noticed_by_its_gradients(rank, new_group):
    group = new_group()
    for averages in (True, False):
        model = network()
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=group)
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)  # as Lightning and accelerate do it
        if averages:
            backward(wrapped, 0, rank)
            with pytest.warns(UserWarning, match="a DistributedDataParallel that was put around the model") as said:
                optimizer.step()
            assert [warning.filename for warning in said] == [__file__]
            optimizer.load_state_dict(optimizer.state_dict())
            with warnings.catch_warnings(action="error"):  # once is enough
                optimizer.step()
        else:
            with wrapped.no_sync():
                backward(wrapped, 0, rank)
            with warnings.catch_warnings(action="error"):
                optimizer.step()
    for options in ({}, {"warmup_steps": 1}):  # a closure brings its gradients after the step has begun
        model = network()
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=group, **options)
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)

        def closure(optimizer=optimizer, wrapped=wrapped):
            optimizer.zero_grad()
            backward(wrapped, 0, rank)
            return 0.0

        with pytest.warns(UserWarning, match="same gradients in their first step"):
            optimizer.step(closure)
    model = nn.Linear(2, 1, bias=False)
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=group)
    model.weight.grad = torch.view_as_complex(torch.ones(1, 2, 2)).conj().imag  # a minus sign that is pending
    assert model.weight.grad.is_neg()
    with pytest.warns(UserWarning, match="same gradients in their first step"):
        optimizer.step()
    for grads in (None, 0.0, torch.inf):  # nothing, no slope, and an overflow of a scaled loss tell nothing
        model = nn.Linear(2, 1)
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=group)
        for parameter in model.parameters():
            parameter.grad = None if grads is None else torch.full_like(parameter, grads)
        with warnings.catch_warnings(action="error"):
            optimizer.step()
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.05), model, 3, process_group=group)
    for number, parameter in enumerate(model.parameters()):  # the same numbers in other places
        parameter.grad = torch.full((1,), 1.0 + (rank + number) % 2)
    with warnings.catch_warnings(action="error"):
        optimizer.step()


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
        net(torch.zeros(1, 5)).sum().backward()  # PyTorch 2.9 moves uneven pieces before the first forward pass
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return net, kind(inner, net, interval, process_group=replicas, timeout=20.0, **options)

    for kind in (LocalSGD, SlowMo):
        for poisoned, options in (
            (False, {"warmup_steps": 2}),
            (True, {}),
            (True, {"inner_state": "average"}),
            (True, {"wire_dtype": torch.bfloat16}),
            (True, {"wire_dtype": torch.float8_e4m3fn}),
            (False, {"overlap_steps": 2, "wire_dtype": torch.bfloat16}),
        ):
            # Gradients whose last digit differs may be rounded to the other side, and pieces are cut in other chunks:
            # by 1/128 or 1/8 of a round's progress.
            digits = {torch.bfloat16: 2e-3, torch.float8_e4m3fn: 3e-2}
            tolerance = {"rtol": 0, "atol": digits[options["wire_dtype"]]} if "wire_dtype" in options else ROUNDED
            policies = [ConsensusDistance(1.0, initial=3) for _ in range(2)]
            if "overlap_steps" in options:  # the drift comes too late for it
                policies = [measured(3), measured(3)]
            net, optimizer = sharded(kind, policies[0], **options)
            places = [p.to_local().data_ptr() for p in net.parameters()]
            train(optimizer, [net], own, poisoned)
            team = Workers(model(), 2)
            inner = torch.optim.SGD(team.parameters(), lr=0.1, momentum=0.9)
            single = kind(inner, team, policies[1], process_group=ALONE[0], **options)
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
