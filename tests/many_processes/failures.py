"""Workers that are not finite, and ranks that stall or die; after the last ones ranks are missing."""

import copy
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastlocal import DiLoCo, LocalSGD, SlowMo
from fastlocal.comm import LostRankError, find_group, turn
from fastlocal.local import DivergedError
from tests.local_runs import network, parameters_of, poison
from tests.many_processes.team import ALONE, ROUNDED, assert_equal_everywhere, build, run, stats_of, tensors_of

SURVIVORS = []


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


def a_worker_with_one_bad_value_is_left_out_by_those_who_hold_its_other_pieces(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replicas = mesh.get_group("replicate")
    net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    optimizer = LocalSGD(torch.optim.SGD(net.parameters(), lr=0.1), net, 9, process_group=replicas, timeout=20.0)
    optimizer.step()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.to_local().fill_(1.0 + dist.get_rank(replicas))
        if rank == 3:  # the last piece of the second worker
            net.bias.to_local()[0] = torch.inf
    optimizer.sync()
    assert optimizer.stats.excluded == 1
    assert (parameters_of_pieces(net) == 1).all()


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


def a_group_of_one_process_is_none(rank, new_group):
    assert find_group(ALONE[0], 20.0, [torch.device("cpu")]) is None


def every_turn_of_one_process_is_waited_for(rank, new_group):
    group = find_group(new_group(), 20.0, [torch.device("cpu")])
    group.arrive("fetch the images", 0)
    for number in range(2):
        began = time.monotonic()
        assert group.by_one(1, lambda number=number: time.sleep(0.2) or number) == (number if rank == 1 else None)
        assert time.monotonic() - began >= 0.15


def a_process_that_is_silent_in_its_turn_is_named_by_its_number_among_all(rank, new_group):
    pair = [new_group([0, 1]), new_group([2, 3])][rank // 2]
    group = find_group(pair, 20.0, [torch.device("cpu")])
    group.arrive("fetch the images", 5)
    before = turn._SILENT_SECONDS, turn._BEAT_SECONDS
    turn._SILENT_SECONDS, turn._BEAT_SECONDS = 3.0, 60.0
    try:
        if rank % 2 == 0:
            group.by_one(0, lambda: dist.barrier(pair))
        else:
            silent = rf"local step 5: rank {rank - 1}, at work alone, has given no sign of life for \d+ s"
            with pytest.raises(LostRankError, match=silent):
                group.by_one(0, lambda: None)
            dist.barrier(pair)
    finally:
        turn._SILENT_SECONDS, turn._BEAT_SECONDS = before


def a_turn_that_fails_ends_for_those_who_wait(rank, new_group):
    group = find_group(new_group(), 20.0, [torch.device("cpu")])
    group.arrive("fetch the images", 0)

    def fail():
        raise KeyError("no images")

    if rank == 1:
        with pytest.raises(KeyError, match="no images"):
            group.by_one(1, fail)
    else:
        assert group.by_one(1, fail) is None


def what_fails_in_the_computation_itself_is_no_lost_rank(rank, new_group):
    group = find_group(new_group(), 20.0, [torch.device("cpu")])
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error, group.watching("average gradients", 3):
        torch.mm(torch.ones(2, 3), torch.ones(2, 3))
    assert not isinstance(error.value, LostRankError)


def nccls_watchdog_would_end_the_process_long_after_whoever_waits_has_said_who_is_missing(rank, new_group):
    group = find_group(new_group(), 5.0, [torch.device("cpu")])
    assert group._options("Allreduce", torch.device("cuda")).timeout.total_seconds() == 5.0  # of gloo
    group._has_nccl = True
    assert group._options("Allreduce", torch.device("cpu")).timeout.total_seconds() == 5.0
    assert group._options("Allreduce", torch.device("cuda")).timeout.total_seconds() >= 5.0 + 20.0


def a_piece_of_a_sharded_worker_that_never_comes_is_named(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, net, 2, process_group=mesh.get_group("replicate"), timeout=2.0)
    net(torch.ones(2, 4)).sum().backward()
    if rank % 2 == 0:
        message = rf"rank {rank} waited 2\.\d s to compare settings at local step 0: rank {rank + 1} has not arrived"
        with pytest.raises(LostRankError, match=message):
            optimizer.step()
    dist.barrier()


def a_piece_whose_overflow_nobody_hears_of_is_named_after_the_timeout(rank, new_group):
    # Other pairs than those of the scenario before, which are broken.
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, net, 9, process_group=ALONE[0], timeout=2.0)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.grad_scale = torch.ones(())  # as GradScaler leaves them
    optimizer.found_inf = torch.tensor(float(rank == 3))
    before = parameters_of_pieces(net)
    optimizer.step()
    assert torch.equal(parameters_of_pieces(net), before) == (rank % 2 == 1)  # rank 1 has its other piece
    assert optimizer.found_inf.item() == (rank == 3)  # each flag stays what its own process has seen
    if rank < 2:
        started = time.monotonic()
        waited = rf"rank {rank} waited 2\.\d s to agree whether gradients overflowed at local step 1"
        message = rf"{waited}: rank {rank + 2} has not arrived"
        with pytest.raises(LostRankError, match=message):
            optimizer.step()
        assert time.monotonic() - started < 15
    dist.barrier()


def parameters_of_pieces(net):
    return torch.cat([p.to_local().detach().flatten() for p in net.parameters()])


def a_rank_that_comes_to_one_of_two_wrappers_alone_is_named(rank, new_group):
    process_group = new_group()
    first, second = (find_group(process_group, 2.0, [torch.device("cpu")]) for _ in range(2))
    for step in range(3):
        first.arrive("close a round", step)
    if rank != 3:
        second.arrive("close a round", 7)
        with pytest.raises(LostRankError, match=r"local step 7: rank 3 has not arrived \(never seen\)"):
            second.gather([1.0])
    dist.barrier()


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
