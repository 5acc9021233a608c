"""Syncs among processes that go on while messages are under way."""

import copy

import pytest
import torch

from fastlocal import LocalSGD, SlowMo, ValidationLoss
from fastlocal.comm import Group, LostRankError
from fastlocal.local import DisagreementError
from fastlocal.train.processes import Processes
from fastlocal.train.state import collect, optimizer_state
from tests.local_runs import measured, parameters_of, poison
from tests.many_processes.team import (
    KINDS,
    ROUNDED,
    WEIGHTS,
    WORLD,
    against_one_process,
    assert_equal_everywhere,
    build,
    run,
    stats_of,
)


def late_syncs_give_what_they_give_in_one_process(rank, new_group):
    group, pair = new_group(), [new_group([0, 1]), new_group([2, 3])][rank // 2]
    for kind in KINDS:
        against_one_process(kind, rank, group, 1, ROUNDED, interval=3, overlap_steps=2)
        against_one_process(kind, rank, pair, 1, {"rtol": 0, "atol": 0}, interval=2, overlap_steps=5)
        spread, single = against_one_process(kind, rank, pair, 2, ROUNDED, interval=measured(3), overlap_steps=2)
        assert spread.stats.drift == pytest.approx(single.stats.drift, rel=1e-4)
    against_one_process(SlowMo, rank, group, 1, ROUNDED, overlap_steps=2, inner_state="average")
    for wire_dtype, digit in ((torch.bfloat16, 2e-3), (torch.float8_e4m3fn, 3e-2)):
        tolerance = {"rtol": 0, "atol": digit}  # a step whose last digit differs may be rounded to the other side
        for processes, k in ((group, 1), (pair, 2)):
            against_one_process(SlowMo, rank, processes, k, tolerance, overlap_steps=2, wire_dtype=wire_dtype)


def late_syncs_weigh_the_workers(rank, new_group):
    group, weight = new_group(), WEIGHTS[rank]
    spread, own = build(LocalSGD, 1, group=group, overlap_steps=2, weights=[weight])
    run(spread, own, 4, worker=rank)
    at_sync = torch.cat([p.detach().double().flatten() for p in own[0].parameters()])
    plain, others = build(LocalSGD, 1, group=group, weights=[weight])
    run(plain, others, 3, worker=rank)
    mean = parameters_of(others)
    run(spread, own, 1, first=4, worker=rank)
    late, team = build(LocalSGD, 1, 100, group=group)
    run(late, team, 3, worker=rank)
    sent = parameters_of(team)
    run(late, team, 2, first=3, worker=rank)
    assert at_sync.isfinite().all()
    torch.testing.assert_close(parameters_of(own), mean + (parameters_of(team) - sent), **ROUNDED)


def runs_saved_while_a_sync_is_under_way_end_the_same(rank, new_group):
    group = new_group()
    for wire_dtype in (None, torch.bfloat16, torch.float8_e4m3fn):
        options = {"group": group, "overlap_steps": 4, "wire_dtype": wire_dtype, "interval": 6}
        whole, team = build(SlowMo, 1, **options)
        run(whole, team, 13, worker=rank)
        for stop in (6, 7, 8, 9):
            first, halves = build(SlowMo, 1, **options)
            run(first, halves, stop, worker=rank)
            saved = copy.deepcopy((halves.state_dict(), first.state_dict()))
            second, again = build(SlowMo, 1, **options)
            again.load_state_dict(saved[0])
            second.load_state_dict(saved[1])
            for optimizer, workers in ((first, halves), (second, again)):
                run(optimizer, workers, 13 - stop, first=stop, worker=rank)
                assert torch.equal(parameters_of(workers), parameters_of(team))
                assert stats_of(optimizer) == stats_of(whole)


def a_process_that_saves_alone_while_a_sync_is_under_way_sends_nothing(rank, new_group):
    group, results = new_group(), []
    for saves in (False, True):
        for wire_dtype in (None, torch.float8_e4m3fn):
            policy = ValidationLoss(5, total_epochs=9)  # rank 0 decides, with a message when a round begins
            optimizer, team = build(SlowMo, 1, policy, group, overlap_steps=3, wire_dtype=wire_dtype)
            for step in range(14):
                run(optimizer, team, 1, first=step, worker=rank)
                if saves and rank == step % 4:
                    optimizer.state_dict()
                    copy.deepcopy(optimizer)
            optimizer.sync()
            assert_equal_everywhere(parameters_of(team[0]), group)
            results.append(parameters_of(team[0]))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def a_worker_that_is_left_out_ends_a_late_sync_at_once_in_all_processes(rank, new_group):
    group = new_group()
    optimizer, team = build(LocalSGD, 1, 3, group, overlap_steps=2)
    run(optimizer, team, 2, worker=rank)
    if rank == 1:
        poison(team[0])
    run(optimizer, team, 1, first=2, worker=rank)
    assert optimizer.stats.excluded == 1
    assert_equal_everywhere(parameters_of(team[0]), group)
    run(optimizer, team, 4, first=3, worker=rank)
    if rank == 2:
        poison(team[0])
    run(optimizer, team, 1, first=7, worker=rank)
    assert parameters_of(team[0]).isfinite().all() == (rank != 2)
    optimizer.sync()
    assert optimizer.stats.excluded == 2
    assert_equal_everywhere(parameters_of(team[0]), group)


def processes_that_overlap_otherwise_are_told_so(rank, new_group):
    optimizer, team = build(LocalSGD, 1, 3, new_group(), overlap_steps=1 + (rank == 2))
    with pytest.raises(DisagreementError, match="rank 2 has overlap_steps 2, rank 0 has 1"):
        run(optimizer, team, 1, worker=rank)
    group = new_group()
    optimizer, team = build(LocalSGD, 1, 3, group, overlap_steps=2)
    run(optimizer, team, 4, worker=rank)
    other, workers = build(LocalSGD, 1, 3, group, overlap_steps=2)
    state = optimizer.state_dict()
    if rank == 3:
        state["fastlocal"]["sending"] = None
    other.load_state_dict(state)
    with pytest.raises(DisagreementError, match="rank 3 has a sync is under way False, rank 0 has True"):
        run(other, workers, 1, first=4, worker=rank)


def a_message_that_does_not_come_is_an_error_where_the_sync_ends(rank, new_group):
    group = new_group()
    optimizer, team = build(LocalSGD, 1, 3, group, overlap_steps=2, buffers="keep")
    optimizer._group.timeout = 1.0
    run(optimizer, team, 2, worker=rank)
    if rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Group, "send_sum", lambda own, tensor: lambda: None)
            run(optimizer, team, 1, first=2, worker=rank)
        return
    run(optimizer, team, 2, first=2, worker=rank)
    with pytest.raises(LostRankError, match="waited"):
        run(optimizer, team, 1, first=4, worker=rank)


def a_sync_under_way_ends_alike_in_another_number_of_processes(rank, new_group):
    group = new_group()
    for wire_dtype, tolerance in ((None, ROUNDED), (torch.bfloat16, {"rtol": 0, "atol": 2e-3})):
        options = {"interval": 5, "overlap_steps": 3, "wire_dtype": wire_dtype}
        single, team = build(SlowMo, WORLD, **options)
        run(single, team, 6)
        saved = collect(team.state_dict()["workers"], torch.zeros(WORLD, 2), single, Processes())
        spread, own = build(SlowMo, 1, group=group, **options)
        own.load_state_dict({"workers": saved["workers"][rank : rank + 1]})
        spread.load_state_dict(optimizer_state(saved, spread, range(rank, rank + 1)))
        run(single, team, 6, first=6)
        run(spread, own, 6, first=6, worker=rank)
        torch.testing.assert_close(parameters_of(own), parameters_of(team[rank]), **tolerance)
        assert stats_of(spread) == stats_of(single)
