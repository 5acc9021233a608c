"""What every rank must be told of the others: settings, steps, rates, the interval."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastlocal import AdaComm, ConsensusDistance, DiLoCo, FixedInterval, LocalSGD, SlowMo, Workers
from fastlocal.comm import held_here
from fastlocal.local import DisagreementError
from fastlocal.policy import OriginalValidationLoss
from tests.local_runs import parameters_of
from tests.many_processes.team import ALONE, ROUNDED, WORLD, assert_equal_everywhere, build, run


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


def what_one_rank_alone_has_is_named_on_every_rank(rank, new_group):
    group = new_group()
    policy = FixedInterval(4)
    if rank == 1:
        policy.patience = 3
    optimizer, team = build(LocalSGD, 1, policy, group)
    with pytest.raises(DisagreementError, match=r"rank 1 has FixedInterval.patience 3, rank 0 has None$"):
        run(optimizer, team, 1)
    for longer in (True, False):
        layers = 2 if (rank == 2) == longer else 1
        model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(layers)])
        optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, 2, process_group=group)
        second = r"1.weight \(2, 2\) .*"
        theirs, first = (second, "none") if longer else ("none", second)
        with pytest.raises(DisagreementError, match=f"rank 2 has the tensor {theirs}, rank 0 {first}$"):
            optimizer.step()


def more_workers_in_a_process_than_the_first_message_has_room_for_are_all_counted(rank, new_group):
    pair = [new_group([0, 1]), new_group([2, 3])][rank // 2]
    weights = [[1.0 + 10 * process + row for row in range(10)] for process in range(2)]
    team = Workers(nn.ParameterList([torch.zeros(1)]), 10)
    inner = torch.optim.SGD(team.parameters(), lr=1.0)
    optimizer = LocalSGD(inner, team, 1, process_group=pair, timeout=20.0, weights=weights[rank % 2])
    for row, model in enumerate(team):
        last = rank % 2 == 1 and row == 9
        model[0].grad = torch.full((1,), torch.nan if last else -weights[rank % 2][row])
    optimizer.step()
    assert optimizer.stats.excluded == 1
    squares, total = sum(w * w for w in range(1, 20)), sum(range(1, 20))
    assert [model[0].item() for model in team] == pytest.approx([squares / total] * 10, rel=1e-6)


def of_many_settings_that_differ_some_are_counted(rank, new_group):
    optimizer, team = build(SlowMo, 1, 4 + rank, new_group(), slow_lr=1.0 + rank, slow_momentum=0.1 * rank)
    with pytest.raises(DisagreementError, match="rank 2 has slow_momentum 0.2, rank 0 has 0.0; and 3 more$"):
        run(optimizer, team, 1)


def buffers_that_have_grown_on_one_rank_alone_are_an_error_on_every_rank(rank, new_group):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    model.register_buffer("seen", torch.zeros(1))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, model, 9, process_group=new_group(), timeout=20.0)
    optimizer.step()
    if rank == 2:
        model.seen = torch.zeros(3)
    with pytest.raises(DisagreementError, match="rank 2 is at elements of buffers 3, rank 0 at 1"):
        optimizer.sync()


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


def processes_of_diloco_with_unlike_rates_go_on_from_what_they_saved(rank, new_group):
    group = new_group()
    optimizer, team = build(DiLoCo, 1, 2, group)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + rank)
    run(optimizer, team, 5, worker=rank)
    again, same = build(DiLoCo, 1, 2, group)
    same.load_state_dict(team.state_dict())
    again.load_state_dict(optimizer.state_dict())
    for each, workers in ((optimizer, team), (again, same)):
        run(each, workers, 3, first=5, worker=rank)
    assert torch.equal(parameters_of(team[0]), parameters_of(same[0]))


def wrappers_called_in_another_order_are_an_error_on_every_rank(rank, new_group):
    for steps in (2, 0):  # before their first steps, too, where they compare settings
        group = new_group()
        pair = [build(kind, 1, 1, group) for kind in (LocalSGD, LocalSGD)]
        for optimizer, team in pair:
            run(optimizer, team, steps, worker=rank)
        optimizer, team = pair[rank == 3]
        with pytest.raises(DisagreementError, match="rank 3 is at wrapper 2, rank 0 at 1"):
            run(optimizer, team, 1, first=steps, worker=rank)


def a_process_that_begins_while_others_go_on_is_an_error_on_every_rank(rank, new_group):
    optimizer, team = build(LocalSGD, 1, 1, new_group())
    run(optimizer, team, 2, worker=rank)
    if rank == 1:
        optimizer = copy.deepcopy(optimizer)
    with pytest.raises(DisagreementError, match="rank 1 is at purpose 'compare settings', rank 0 at 'close a round'"):
        optimizer.step()


def rates_that_differ_by_parameter_and_not_in_sum_are_an_error_on_every_rank(rank, new_group):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    rates = (0.2, 0.1) if rank == 1 else (0.1, 0.2)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)]
    optimizer = SlowMo(torch.optim.SGD(groups), model, 1, process_group=new_group(), timeout=20.0)
    with pytest.raises(DisagreementError, match="rank 1 is at learning rates by parameter with checksum "):
        optimizer.step()


def states_of_different_runs_are_an_error_on_every_rank_and_of_one_but_for_roundings_are_not(rank, new_group):
    group = new_group()
    for kind, steps in ((SlowMo, 4), (DiLoCo, 5), (LocalSGD, 5)):
        saved = []
        for seed in (0, 1):
            optimizer, team = build(kind, 1, 2, group, seed=seed, wire_dtype=torch.bfloat16)
            run(optimizer, team, steps, worker=rank)
            saved.append((copy.deepcopy(team.state_dict()), copy.deepcopy(optimizer.state_dict())))
        for rounding in (True, False):
            workers, state = saved[0 if rounding else int(rank == 2)]
            if rounding and rank == 1:  # as unlike processors leave it after hundreds of rounds
                state = copy.deepcopy(state)
                state["fastlocal"]["outer"][0]["anchor"] *= 1 + 1e-3
            optimizer, team = build(kind, 1, 2, group, wire_dtype=torch.bfloat16)
            team.load_state_dict(workers)
            optimizer.load_state_dict(state)
            if rounding:
                run(optimizer, team, 4 - steps % 2, first=steps, worker=rank)
                assert_equal_everywhere(parameters_of(team[0]), group)
            else:
                with pytest.raises(
                    DisagreementError, match="go on from different anchors or slow momenta: each must"
                ):
                    run(optimizer, team, 2, first=steps, worker=rank)


def a_state_that_one_rank_alone_loads_is_an_error_on_every_rank(rank, new_group):
    for policy in (2, AdaComm(2)):
        optimizer, team = build(LocalSGD, 1, policy, group=new_group())
        run(optimizer, team, 4, worker=rank)
        if rank == 2:
            optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(DisagreementError, match="rank 2 is at purpose 'go on from a loaded state', rank 0 at"):
            run(optimizer, team, 2, first=4, worker=rank)


def a_policys_number_that_is_nan_everywhere_is_no_difference(rank, new_group):
    policy = FixedInterval(2)
    policy.best = float("nan")
    optimizer, team = build(LocalSGD, 1, policy, group=new_group())
    run(optimizer, team, 2, worker=rank)
    assert optimizer.stats.rounds == 1


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


def what_rank_0_has_observed_is_told_again_after_a_state_was_loaded(rank, new_group):
    optimizer, team = build(LocalSGD, 1, OriginalValidationLoss(4, total_epochs=100), group=new_group())
    run(optimizer, team, 4, worker=rank)
    optimizer.observe(val_loss=1.0 + rank)
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        run(optimizer, team, 1, first=4, worker=rank)
        assert optimizer.stats.val_loss == 1.0
        optimizer.load_state_dict(copy.deepcopy(state))
        assert optimizer.stats.val_loss == 1.0 + rank


def pieces_of_a_sharded_worker_share_one_decision(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def shard(policy, group):
        torch.manual_seed(0)
        net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
        inner = torch.optim.SGD(net.parameters(), lr=0.01)
        return net, LocalSGD(inner, net, policy, process_group=group, timeout=20.0)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()

    for group, decider in ((mesh.get_group("replicate"), 0), (ALONE[0], rank - rank % 2)):
        net, optimizer = shard(AdaComm(8), group)
        intervals = []
        for loss in (16.0, 4.0, 1.0 + 3 * rank):
            optimizer.observe(train_loss=loss)
            for _ in range(8):
                step(net, optimizer)
            optimizer.sync()
            intervals.append(optimizer.stats.interval)
        # ⌈8·√(F/16)⌉ with the last loss F of who decides: 1, or 7 on rank 2.
        assert intervals == [8, 4, 6 if decider else 2]
        assert optimizer.stats.train_loss == 1.0 + 3 * decider
    net, optimizer = shard(2 + rank % 2, mesh.get_group("replicate"))
    with pytest.raises(DisagreementError, match=r"rank [13] has FixedInterval.interval 3, rank [02] has 2"):
        step(net, optimizer)


def the_first_process_on_a_mesh_of_any_order_decides_for_all_others(rank, new_group):
    mesh = DeviceMesh("cpu", [[3, 0], [1, 2]], mesh_dim_names=("replicate", "shard"))
    net = fully_shard(nn.Linear(4, 4), mesh=mesh)
    inner = torch.optim.SGD(net.parameters(), lr=0.01)
    optimizer = LocalSGD(inner, net, AdaComm(8), process_group=ALONE[0], timeout=20.0)
    for loss in (16.0, 1.0 + rank):
        optimizer.observe(train_loss=loss)
        for _ in range(8):
            optimizer.step()
        optimizer.sync()
    assert optimizer.stats.train_loss == 1.0 + 3
    assert optimizer.stats.interval == 4  # ⌈8·√(4/16)⌉


def a_model_under_fsdp_cannot_be_several_workers(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = fully_shard(nn.Linear(4, 4), mesh=mesh["shard"])
    assert len(Workers(net, 1)) == 1
    with pytest.raises(TypeError, match="FSDP does not support deepcopy"):
        Workers(net, 2)


def a_gradient_that_is_a_sum_still_to_be_taken_is_refused(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "pieces"))
    model = nn.ParameterList([nn.Parameter(distribute_tensor(torch.zeros(2), mesh["pieces"], [Replicate()]))])
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    group = mesh.get_group("replicate")
    optimizer = LocalSGD(inner, model, 2, process_group=group, timeout=20.0, warmup_steps=1)
    model[0].grad = DTensor.from_local(torch.ones(2), mesh["pieces"], [Partial()])
    with pytest.raises(TypeError, match="must be sharded or replicated, got placements"):
        optimizer.step()
    for placements in ([Shard(0), Partial()], [Partial(), Replicate()]):  # along one dimension of two
        with pytest.raises(TypeError, match="must be sharded or replicated, got placements"):
            held_here(DTensor.from_local(torch.ones(2), mesh, placements))


def pieces_of_which_there_are_copies_count_once_in_the_drift(rank, new_group):
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("workers", "copies", "shard"))
    group = mesh.get_group("workers")
    net = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh["copies", "shard"])
    policy = FixedInterval(1)
    policy.reads_drift = True
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer = LocalSGD(inner, net, policy, process_group=group, timeout=20.0)
    net(torch.ones(1, 4)).sum().backward()  # a gradient of ones
    net.weight.grad.mul_(dist.get_rank(group))
    optimizer.step()
    # Two workers that are √16 apart, each half of it from the mean.
    assert optimizer.stats.drift == pytest.approx(2.0, rel=1e-6)


def a_worker_that_is_left_out_has_no_part_in_the_drift(rank, new_group):
    policy = FixedInterval(9)
    policy.reads_drift = True
    model = nn.ParameterList([torch.zeros(1)])
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = LocalSGD(inner, model, policy, process_group=new_group(), timeout=20.0)
    optimizer.step()
    model[0].data.fill_((0.0, torch.nan, 3.0, 6.0)[rank])
    optimizer.sync()
    assert optimizer.stats.excluded == 1
    assert optimizer.stats.drift == pytest.approx((3 + 0 + 3) / 3, rel=1e-6)


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
