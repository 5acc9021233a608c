"""Buffers, inner state and checkpoints among processes."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

from fastlocal import LocalSGD, SlowMo, Workers
from tests.local_runs import KeepsAverage, parameters_of, poison
from tests.many_processes.team import ALONE, KINDS, WORLD, assert_equal_everywhere, build, run, stats_of, tensors_of


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


def the_largest_of_whole_numbers_below_zero_is_kept(rank, new_group):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    model.register_buffer("numbers", torch.zeros(2, dtype=torch.int32))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, model, 9, process_group=new_group(), timeout=20.0)
    optimizer.step()
    model.numbers.copy_(torch.tensor([(-5, -8), (-1, -1), (-7, -6), (-8, -5)][rank]))
    if rank == 1:  # left out with its numbers
        model.weight.data.fill_(torch.nan)
    optimizer.sync()
    assert model.numbers.tolist() == [-5, -5]


def an_optimizer_that_begins_after_another_leaves_what_that_one_has_stepped(rank, new_group):
    results = []
    for group, k in ((new_group(), 1), (ALONE[0], WORLD)):
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


def an_optimizer_that_begins_leaves_what_the_loaded_state_of_another_says_it_has_stepped(rank, new_group):
    group = new_group()

    def build_pair():
        torch.manual_seed(0)
        team = Workers(nn.Linear(3, 2), 1)
        inners = [torch.optim.SGD([p for p in team.parameters() if p.dim() == dim], lr=0.1) for dim in (2, 1)]
        return team, *(LocalSGD(inner, team, 3, process_group=group, timeout=20.0) for inner in inners)

    team, weights, _ = build_pair()
    team[0].weight.grad = torch.full((2, 3), float(rank))
    weights.step()
    again, resumed, biases = build_pair()
    again.load_state_dict(team.state_dict())
    resumed.load_state_dict(weights.state_dict())
    biases.step()
    assert torch.equal(again[0].weight, team[0].weight)


def two_optimizers_of_one_model_leave_all_ranks_equal_with_every_wire(rank, new_group):
    for kind in (LocalSGD, SlowMo):
        for wire_dtype in (None, torch.bfloat16, torch.float8_e4m3fn):
            torch.manual_seed(0)
            team = Workers(nn.Linear(3, 2), 1)
            group = new_group()
            wrapped = []
            for dim, make_inner in ((2, torch.optim.SGD), (1, torch.optim.AdamW)):
                inner = make_inner([p for p in team.parameters() if p.dim() == dim], lr=0.1)
                wrapped.append(kind(inner, team, 3, process_group=group, timeout=20.0, wire_dtype=wire_dtype))
            torch.manual_seed(rank)
            for _ in range(8):
                for parameter in team.parameters():
                    parameter.grad = torch.randn_like(parameter)
                for optimizer in wrapped:
                    optimizer.step()
            for optimizer in wrapped:
                optimizer.sync()
            assert_equal_everywhere(parameters_of(team[0]), group)


def a_healed_worker_has_the_step_counts_of_the_first_of_all_that_count(rank, new_group):
    pair = [new_group([0, 1]), new_group([2, 3])][rank // 2]
    finished = []
    for group, k, first in ((pair, 2, 2 * (rank % 2)), (ALONE[0], 4, 0)):
        torch.manual_seed(0)
        team = Workers(nn.Linear(2, 1, dtype=torch.float64), k)
        inner = torch.optim.Adam(team.parameters(), lr=0.1)
        options = {"inner_state": "average", "process_group": group, "timeout": 20.0}
        optimizer = LocalSGD(inner, team, 4, **options)
        for step in range(8):
            optimizer.zero_grad()
            for number, worker in enumerate(team, start=first):
                if number == 2 and step < 2:  # it has no batch then
                    continue
                for parameter in worker.parameters():
                    parameter.grad = torch.full_like(parameter, 1.0 + number * step)
                if number in (0, 3) and step == 2:
                    worker.weight.data.fill_(torch.nan)
            optimizer.step()
        own = 2 * (rank % 2) if k == 4 else 0
        mine = [team[own], team[own + 1]]
        counts = [int(optimizer.state[worker.weight]["step"]) for worker in mine]
        finished.append((counts, torch.stack([parameters_of(worker) for worker in mine])))
    # Worker 0 and 3 went on from worker 1's four steps; worker 2 took two less.
    assert finished[0][0] == finished[1][0] == ([6, 8] if rank % 2 else [8, 8])
    torch.testing.assert_close(finished[0][1], finished[1][1], rtol=1e-12, atol=1e-12)


def factored_moments_are_averaged_and_kept_buffers_may_differ_in_shape(rank, new_group):
    finished = []
    for group, k in ((new_group(), 1), (ALONE[0], WORLD)):
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
                if (step, number) == (3, 1):
                    worker.weight.data[0, 0] = torch.nan
            optimizer.step()
        mine = team[0 if k == 1 else rank]
        assert mine.cache.tolist() == [float(rank)] * (rank + 1)
        assert (mine.a, mine.b) == (ord("a"), ord("b"))  # rank 1's are healed, in another order than rank 0's
        assert optimizer.stats.excluded == 1
        finished.append((parameters_of(mine), optimizer.stats.bytes_on_wire))
    torch.testing.assert_close(finished[0][0], finished[1][0], rtol=1e-10, atol=1e-10)
    assert finished[0][1] == finished[1][1]


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


def resuming_with_the_model_on_rank_0_alone_is_resuming_with_it_on_all(rank, new_group):
    group = new_group()
    for kind in KINDS:
        first, first_team = build(kind, 1, 4, group, buffers="keep")
        run(first, first_team, 8, worker=rank)
        shared = [first_team.state_dict()]
        dist.broadcast_object_list(shared, src=0, group=group)
        finished = []
        for loads, expected in ((True, rank), (rank == 0, 0)):
            second, team = build(kind, 1, 4, group, buffers="keep", seed=5 + rank)
            if loads:
                team.load_state_dict(shared[0])
            team[0][1].running_mean.fill_(rank)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            for _ in range(6):
                for parameter in team.parameters():
                    parameter.grad = torch.zeros_like(parameter)  # momentum moves them
                second.step()
            finished.append(parameters_of(team[0]))
            assert team[0][1].running_mean.tolist() == [expected] * 4  # kept by all, or rank 0's
        assert torch.equal(*finished)
        assert not torch.equal(finished[0], parameters_of(first_team[0]))


def pieces_that_are_written_to_after_the_optimizer_was_built_become_the_first_workers(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replicas = mesh.get_group("replicate")
    net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    optimizer = LocalSGD(torch.optim.SGD(net.parameters(), lr=0.1), net, 9, process_group=replicas, timeout=20.0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.to_local().fill_(1.0 + dist.get_rank(replicas))
    optimizer.step()
    assert all((parameter.to_local() == 1).all() for parameter in net.parameters())


def a_state_of_other_pieces_is_refused_and_one_of_older_versions_is_not(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = SlowMo(inner, net, 1, process_group=mesh.get_group("replicate"), timeout=20.0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert state["fastlocal"]["places"] == [rank % 2]
    state["fastlocal"]["places"] = [1 - rank % 2]
    here = rf"pieces at \[{1 - rank % 2}\] on the mesh, this process holds those at \[{rank % 2}\]"
    with pytest.raises(ValueError, match=here):
        optimizer.load_state_dict(state)
    del state["fastlocal"]["places"]
    optimizer.load_state_dict(state)
    optimizer.step()
    copied = fully_shard(nn.Linear(4, 4), mesh=mesh)  # copies of pieces may take each other's state
    inner = torch.optim.SGD(copied.parameters(), lr=0.1)
    optimizer = SlowMo(inner, copied, 1, process_group=ALONE[0], timeout=20.0)
    assert optimizer.state_dict()["fastlocal"]["places"] == [rank % 2]


def two_workers_of_one_process_that_are_healed_count_their_steps_apart(rank, new_group):
    pair = [new_group([0, 1]), new_group([2, 3])][rank // 2]
    team = Workers(nn.Linear(2, 1), 2)
    inner = torch.optim.Adam(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 2, inner_state="average", process_group=pair, timeout=20.0)
    for step in range(4):
        for worker in team:
            for parameter in worker.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if step == 1 and rank % 2 else 1.0)
        optimizer.step()
    assert optimizer.stats.excluded == 2
    assert [int(inner.state[parameter]["step"]) for parameter in team.parameters()] == [4] * 4


def frozen_parameters_that_are_not_finite_are_healed_with_a_worker_that_is_left_out(rank, new_group):
    team = Workers(KeepsAverage(), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.0)
    optimizer = LocalSGD(inner, team, 2, process_group=new_group(), timeout=20.0)
    optimizer.step()
    with torch.no_grad():
        for number, worker in enumerate(team, start=2 * rank):
            worker.layer.weight.fill_(torch.nan if number in (0, 5) else 1.0)
            worker.average.weight.fill_(torch.nan if number == 5 else number)
    sent = optimizer.stats.bytes_on_wire
    optimizer.step()
    assert optimizer.stats.excluded == 2
    assert all(worker.layer.weight.tolist() == [[1.0, 1.0]] for worker in team)
    expected = [1 if number in (0, 5) else number for number in (2 * rank, 2 * rank + 1)]
    assert [worker.average.weight.tolist() for worker in team] == [[[number, number]] for number in expected]
    # A trained parameter and a frozen one of two elements each, in float32, among 8 workers.
    assert optimizer.stats.bytes_on_wire - sent == 2 * 7 * (8 + 8) // 8


def frozen_parameters_of_all_kinds_are_rank_0s_but_for_sparse_ones(rank, new_group):
    model = nn.Linear(2, 1)
    own = {
        "sparse": torch.eye(2).mul(rank).to_sparse(),
        "expanded": torch.full((1,), float(rank)).expand(3),
        "later": torch.empty(2, device="meta"),
        "pair": TwoTensor(torch.ones(2), torch.full((2,), float(rank))),
    }
    for name, value in own.items():
        model.register_parameter(name, nn.Parameter(value, requires_grad=False))
    model.weight.data.fill_(rank)
    inner = torch.optim.SGD([model.weight, model.bias], lr=0.1)
    optimizer = LocalSGD(inner, model, 1, process_group=new_group(), timeout=20.0)
    optimizer.step()
    assert model.weight.tolist() == [[0.0, 0.0]]
    if rank == 1:
        model.weight.data.fill_(torch.nan)
    optimizer.step()
    assert model.weight.tolist() == [[0.0, 0.0]]
    assert model.sparse.to_dense().diagonal().tolist() == [rank, rank]
    assert model.expanded.tolist() == [0.0] * 3
    assert model.pair.b.tolist() == [0.0] * 2


def moments_of_low_precision_are_averaged_in_float32_and_those_that_a_rank_lacks_are_left_alone(rank, new_group):
    model = nn.ParameterList([torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1)])
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = LocalSGD(inner, model, 1, inner_state="average", process_group=new_group(), timeout=20.0)
    model[0].grad = torch.tensor([1024.0, 1.5, 1.5, 1.5], dtype=torch.bfloat16).roll(rank)
    model[1].grad = None if rank == 1 else torch.tensor([1.0 + rank])
    optimizer.step()
    buffers = [inner.state.get(parameter, {}).get("momentum_buffer") for parameter in model]
    assert buffers[0].tolist() == [258.0] * 4  # what 257.125 is rounded to; in bfloat16 1024 + 3 is 1024
    assert buffers[1] is None if rank == 1 else buffers[1].item() == 1.0 + rank
    # Five parameters and the first buffer's four elements, all in float32 as they are sent, 2 · 3/4 times.
    assert optimizer.stats.bytes_on_wire == 4 * (5 + 4) * 6 // 4


def a_model_that_rank_0_alone_rolls_back_is_where_all_go_on(rank, new_group):
    group = new_group()
    for kind in KINDS:
        for steps in (4, 6):  # to a round's end, or into one
            optimizer, team = build(kind, 2, 4, group)
            run(optimizer, team, 8, worker=2 * rank)
            model, state = copy.deepcopy((team[0].state_dict(), optimizer.state_dict()))
            run(optimizer, team, steps, first=8, worker=2 * rank)
            if rank == 0:
                team[0].load_state_dict(model)
            optimizer.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = 0.0
            for parameter in team.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            for worker in team:
                for name, value in worker.state_dict().items():
                    assert torch.equal(value, model[name])


def outer_steps_count_from_a_model_that_rank_0_alone_loads(rank, new_group):
    group = new_group()
    for kind in KINDS:
        for wire_dtype in (None, torch.float8_e4m3fn):
            first, team = build(kind, 1, 1, group, wire_dtype=wire_dtype)
            for parameter in team.parameters():
                parameter.grad = torch.zeros_like(parameter)
            first.step()
            second, team = build(kind, 1, 1, group, wire_dtype=wire_dtype, seed=5 if rank == 0 else 0)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            loaded = [copy.deepcopy([*team[0].parameters()])]
            dist.broadcast_object_list(loaded, src=0, group=group)
            for _ in range(3):
                for parameter in team.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                second.step()
            assert all(map(torch.equal, team[0].parameters(), loaded[0]))


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
    with pytest.raises(
        ValueError,
        match="of the number of workers 4 in the middle of a round, or with a sync under way; this optimizer has 2",
    ):
        second.load_state_dict(first.state_dict())


def copies_talk_to_the_copies_in_the_other_processes(rank, new_group):
    group = new_group()
    optimizer, team = build(SlowMo, 1, 3, group)
    run(optimizer, team, 4, worker=rank)
    twin = copy.deepcopy(optimizer)
    run(optimizer, team, 4, first=4, worker=rank)
    run(twin, twin.rows.modules, 4, first=4, worker=rank)
    assert torch.equal(parameters_of(team[0]), parameters_of(twin.rows.modules[0]))
    with pytest.raises(TypeError, match=r"in a process group cannot be pickled: save its state_dict\(\)"):
        pickle.dumps(optimizer)
