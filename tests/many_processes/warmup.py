"""The gradients of the first steps are averaged among processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlocal import LocalSGD, SlowMo, Workers
from tests.local_runs import parameters_of
from tests.many_processes.team import ALONE, ROUNDED, WORLD, against_one_process, assert_equal_everywhere, build, run


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


def a_state_of_the_warmup_goes_on_from_rank_0s_model_where_another_was_not_loaded(rank, new_group):
    group = new_group()
    for kind in (LocalSGD, SlowMo):
        for apart, loads in ((0.0, True), (1e-5 * rank, True), (0.0, rank == 0)):
            first, team = build(kind, 1, 4, group, warmup_steps=6)
            run(first, team, 3, worker=rank)
            with torch.no_grad():
                for parameter in team.parameters():  # as CPUs that round otherwise leave them
                    parameter.mul_(1 + apart)
            model, state = copy.deepcopy((team.state_dict(), first.state_dict()))
            run(first, team, 2, first=3, worker=rank)
            second, again = build(kind, 1, 4, group, warmup_steps=6, seed=5 + rank)
            if loads:
                again.load_state_dict(model)
            second.load_state_dict(state)
            start = parameters_of(again[0])
            second.zero_grad()
            for parameter in again.parameters():
                parameter.grad = torch.zeros_like(parameter)
            second.param_groups[0]["lr"] = 0.0
            second.step()
            if loads:
                assert torch.equal(parameters_of(again[0]), start)  # bit by bit, apart or not
            else:
                expected = torch.cat(
                    [value.flatten() for name, value in model["workers"][0].items() if name in NAMES]
                )
                assert torch.equal(parameters_of(again[0]), expected)


def last_digits_of_bfloat16_that_differ_after_the_warmup_stay(rank, new_group):
    group = new_group()
    for loaded, begun in (
        (1 + 2**-7, (1.0, 1.0, 1 + 2**-7, 1.0)),
        (1 + 3 * 2**-7, (1.0,) * WORLD),
        (torch.nan, (1.0,) * WORLD),
    ):
        for which in (0, 1):
            state: dict = {}
            for number in (1.0, loaded if rank == 2 else 1.0):
                team = Workers(nn.ParameterList([torch.ones(1, dtype=torch.bfloat16)]), 2)
                with torch.no_grad():
                    team[which][0].fill_(number)
                inner = torch.optim.SGD(team.parameters(), lr=0.0)
                optimizer = LocalSGD(inner, team, 4, process_group=group, timeout=20.0, warmup_steps=6)
                if state:
                    optimizer.load_state_dict(state)
                for parameter in team.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
            assert team[which][0].item() == begun[rank]


NAMES = {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


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


def three_equal_gradients_have_the_mean_that_one_process_gives(rank, new_group):
    trio = new_group([0, 1, 2])  # times 1/3 in float32 a third of the means would lie above, and none below
    if rank == 3:
        return
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for k, group in ((1, trio), (3, ALONE[0])):
        team = Workers(nn.ParameterList([torch.zeros(1000)]), k)
        optimizer = LocalSGD(
            torch.optim.SGD(team.parameters(), lr=1.0), team, 5, process_group=group, timeout=20.0, warmup_steps=1
        )
        for model in team:
            model[0].grad = gradient.clone()
        optimizer.step()
        outcomes.append(parameters_of(team[0]))
    assert torch.equal(*outcomes)


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


def the_loss_that_a_line_search_looks_at_is_the_weighted_mean_of_all_ranks(rank, new_group):
    model = nn.ParameterList([torch.zeros(1)])
    inner = torch.optim.LBFGS(model.parameters())
    group, weights = new_group(), [1.0 + rank]
    optimizer = LocalSGD(inner, model, 5, process_group=group, timeout=20.0, warmup_steps=1, weights=weights)

    def closure():
        model[0].grad = torch.zeros(1)
        return torch.tensor(10.0 * rank)

    assert optimizer.step(closure).item() == (0 * 1 + 10 * 2 + 20 * 3 + 30 * 4) / 10
