"""Syncs among processes that go on while messages are under way."""

import copy
import time

import pytest
import torch
from torch import nn

from fastlocal import LocalSGD, SlowMo, ValidationLoss
from fastlocal.comm import Group, LostRankError, Sum
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
    backward,
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
        # A step whose last digit differs may be rounded to the other side.
        options = {"overlap_steps": 2, "wire_dtype": torch.bfloat16}
        against_one_process(kind, rank, group, 1, {"rtol": 0, "atol": 2e-3}, **options)
    options = {"overlap_steps": 2, "wire_dtype": torch.float8_e4m3fn}
    against_one_process(LocalSGD, rank, pair, 2, {"rtol": 0, "atol": 3e-2}, **options)
    against_one_process(SlowMo, rank, group, 1, ROUNDED, overlap_steps=2, inner_state="average")


def steps_that_add_up_to_the_same_lead_to_the_same_place_whatever_is_rounded(rank, new_group):
    group = new_group()
    for wire_dtype in (None, torch.bfloat16, torch.float8_e4m3fn):
        for overlap in (0, 2):
            model = nn.Linear(1, 1, bias=False)
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            optimizer = LocalSGD(
                inner, model, 4, process_group=group, wire_dtype=wire_dtype, overlap_steps=overlap, timeout=20.0
            )
            with torch.no_grad():
                model.weight.zero_()
            for step in range(40):
                model.weight.grad = torch.full((1, 1), -1.0 - (rank + step) % WORLD)
                optimizer.step()
            optimizer.sync()
            assert model.weight.item() == 100


def nothing_is_sent_after_the_sums_of_a_late_sync_before_it_ends(rank, new_group):
    group, sent = new_group(), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run", "_begin"):
            original = getattr(Group, name)

            def noted(own, *arguments, original=original, name=name, **options):
                sent.append(name)
                return original(own, *arguments, **options)

            patch.setattr(Group, name, noted)
        for wire_dtype, messages in ((None, [1, 0, 0, 0]), (torch.float8_e4m3fn, [1, 0, 1, 0])):
            options = {"overlap_steps": 4, "wire_dtype": wire_dtype, "inner_state": "average"}
            optimizer, team = build(SlowMo, 1, 5, group, **options)  # with buffers
            run(optimizer, team, 5, worker=rank)
            assert sent.count("_begin") == messages[0]
            assert sent[-1] == "_begin"
            for step in range(4):
                sent.clear()
                run(optimizer, team, 1, first=5 + step, worker=rank)
                assert sent == ["_begin"] * (messages[step + 1] if step < 3 else 0)
            sent.clear()


def a_sum_under_way_is_not_written_to_by_a_run_that_begins_anew(rank, new_group):
    group = new_group()
    optimizer, team = build(SlowMo, 1, 3, group, overlap_steps=2)
    run(optimizer, team, 3, worker=rank)
    begun = next(iter(optimizer._sending.sums or ()))
    under_way = begun._tensor
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    begun.wait()
    summed = under_way.clone()
    run(optimizer, team, 5, first=3, worker=rank)
    assert torch.equal(under_way, summed)


def waiting_for_a_late_sync_counts_as_seconds_in_it(rank, new_group):
    optimizer, team = build(SlowMo, 1, 5, new_group(), overlap_steps=4, wire_dtype=torch.float8_e4m3fn)
    run(optimizer, team, 6, worker=rank)
    with pytest.MonkeyPatch.context() as patch:
        for name, step in (("go_on", 6), ("wait", 8)):
            original = getattr(Sum, name)
            patch.setattr(Sum, name, lambda own, original=original: [time.sleep(0.2), original(own)][1])
            before = optimizer.stats.seconds_in_sync
            run(optimizer, team, 2 if step == 8 else 1, first=step - (step == 8), worker=rank)
            assert optimizer.stats.seconds_in_sync >= before + 0.2
            patch.undo()


def a_late_sync_that_one_process_alone_ends_is_an_error_in_all(rank, new_group):
    optimizer, team = build(SlowMo, 1, ValidationLoss(4, total_epochs=9), new_group(), overlap_steps=2)
    run(optimizer, team, 4, worker=rank)
    rows = parameters_of(team)
    go_on = optimizer.sync if rank == 0 else lambda: run(optimizer, team, 1, first=4, worker=rank)
    with pytest.raises(DisagreementError, match="is at purpose 'begin a round', rank 0 at 'end a sync'"):
        go_on()
    assert torch.equal(parameters_of(team), rows)


def parameters_are_summed_in_inference_mode_and_trained_on(rank, new_group):
    group = new_group()
    for overlap in (0, 2):
        optimizer, team = build(SlowMo, 1, 4, group, overlap_steps=overlap, wire_dtype=torch.float8_e4m3fn)
        run(optimizer, team, 4, worker=rank)
        with torch.inference_mode():
            optimizer.sync()
        run(optimizer, team, 6, first=4, worker=rank)
        optimizer.sync()
        assert_equal_everywhere(parameters_of(team[0]), group)


def late_syncs_weigh_the_workers(rank, new_group):
    group, weight = new_group(), WEIGHTS[rank]
    spread, own = build(LocalSGD, 1, group=group, overlap_steps=2, weights=[weight])
    run(spread, own, 4, worker=rank)
    plain, others = build(LocalSGD, 1, group=group, weights=[weight])
    run(plain, others, 3, worker=rank)
    mean = parameters_of(others)
    run(spread, own, 1, first=4, worker=rank)
    late, team = build(LocalSGD, 1, 100, group=group)
    run(late, team, 3, worker=rank)
    sent = parameters_of(team)
    run(late, team, 2, first=3, worker=rank)
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
    for go_on in (lambda: run(other, workers, 1, first=4, worker=rank), other.sync):
        other.load_state_dict(state)
        with pytest.raises(DisagreementError, match="rank 3 has a sync is under way False, rank 0 has True"):
            go_on()


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
    backward(team[0], 4, rank)
    with pytest.raises(LostRankError, match="to end a sync at local step 5"):
        optimizer.step()
    whole, own = build(LocalSGD, 1, 100)
    run(whole, own, 4, worker=rank)
    backward(own[0], 4, rank)
    whole.step()
    assert torch.equal(parameters_of(team), parameters_of(own))  # nothing of the sync is in them


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
