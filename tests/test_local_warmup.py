"""warmup_steps: gradients are averaged before workers step alone."""

import copy

import pytest
import torch
from local_runs import make, parameters_of, run
from torch import nn

from fastlocal import QSR, LocalSGD, SlowMo, Workers


def test_warmup_averages_gradients_that_only_some_workers_have():
    team = Workers(nn.Linear(2, 1, bias=False), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, 5, warmup_steps=1)
    before = team[0].weight.detach().clone()
    team[0].weight.grad = torch.tensor([[2.0, 4.0]])
    optimizer.step()
    for model in team:
        torch.testing.assert_close(model.weight.detach(), before - torch.tensor([[1.0, 2.0]]))


def test_warmup_refuses_sparse_gradients_and_takes_no_step():
    team = Workers(nn.Embedding(4, 2, sparse=True), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, 5, warmup_steps=1)
    before = parameters_of(team)
    for model in team:
        model(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients cannot be averaged: use dense ones, or warmup_steps=0"):
        optimizer.step()
    assert torch.equal(parameters_of(team), before)
    assert optimizer.stats.local_steps == 0


def test_weights_weigh_the_gradients_of_the_warmup():
    team = Workers(nn.ParameterList([torch.zeros(5), torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)]), 3)
    inner = torch.optim.SGD(team.parameters(), lr=1.0)
    optimizer = LocalSGD(inner, team, 5, warmup_steps=3, weights=[1.0, 2e38, 1e38])
    gradients = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    for model, gradient, low in zip(team, gradients, (256.0, 1.0, 1.0), strict=True):
        model[0].grad = gradient.clone()
        model[2].grad = torch.full((3,), low, dtype=torch.bfloat16)
    team[1][1].grad = torch.tensor([3.0, 6.0])  # the others count as zero, with their weights
    optimizer.step()
    exact = (torch.tensor([1.0, 2e38, 1e38], dtype=torch.float64) @ gradients.double()) / (1.0 + 3e38)
    for model in team:
        torch.testing.assert_close(-model[0].detach().double(), exact, rtol=3e-7, atol=3e-7)
        assert model[1].tolist() == [-2.0, -4.0]
        model[2].data.zero_()
    optimizer.zero_grad()
    for model, low in zip(team, (256.0, 1.0, 1.0), strict=True):
        model[2].grad = torch.full((3,), low, dtype=torch.bfloat16)
    optimizer.weights = None
    optimizer.step()
    assert team[0][2].tolist() == [-86.0] * 3  # 258 / 3; in bfloat16 256 + 1 is 256


class Twice(torch.optim.SGD):
    """Evaluates its closure twice a step, as line searches do."""

    def step(self, closure=None):
        assert closure is not None
        closure()
        return super().step(closure)


def test_warmup_takes_a_closure_that_is_evaluated_more_than_once():
    torch.manual_seed(0)
    team = Workers(nn.Linear(2, 1), 2)
    single = copy.deepcopy(team[0])
    x = torch.randn(8, 2)
    wrapped = LocalSGD(Twice(team.parameters(), lr=0.1), team, 1, warmup_steps=5)
    plain = Twice(single.parameters(), lr=0.1)

    def closure_of(modules, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = sum((module(x) - x.sum(1, keepdim=True)).square().mean() for module in modules) / len(modules)
            (loss * len(modules)).backward()
            return loss

        return closure

    wrapped.step(closure_of(team, wrapped))
    plain.step(closure_of([single], plain))
    assert wrapped.stats.bytes_on_wire > wrapped.stats.bytes_synchronous  # several evaluations, each averaged
    assert torch.equal(team[0].weight, team[1].weight)
    torch.testing.assert_close(team[0].weight, single.weight, rtol=1e-6, atol=1e-6)


def test_one_lbfgs_for_several_workers_is_refused():
    team = Workers(nn.Linear(2, 1), 2)
    with pytest.raises(ValueError, match="LBFGS takes one step for all workers' parameters together"):
        LocalSGD(torch.optim.LBFGS(list(team.parameters())), team, 1)


def test_a_worker_without_a_gradient_gets_one_of_its_own_and_it_may_be_zeroed_in_place():
    team = Workers(nn.Linear(2, 1, bias=False), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, 5, warmup_steps=1)
    team[0].weight.grad = torch.tensor([[2.0, 4.0]])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    team[0].weight.grad += 1
    assert team[1].weight.grad.tolist() == [[0.0, 0.0]]


def test_buffers_that_a_sync_merged_after_the_warmup_are_not_sent_again():
    optimizer, team = make(LocalSGD, interval=2, warmup_steps=2)
    run(optimizer, team, 4)
    sent = optimizer.stats.bytes_on_wire
    optimizer.sync()
    assert optimizer.stats.bytes_on_wire == sent


def test_each_step_of_the_warmup_is_a_round_and_adds_its_seconds():
    optimizer, team = make(LocalSGD, interval=2, warmup_steps=3)
    optimizer.stats.seconds_in_sync = 1000.0
    run(optimizer, team, 2)
    assert optimizer.stats.seconds_in_sync > 1000
    assert (optimizer.stats.local_steps, optimizer.stats.rounds) == (2, 2)
    run(optimizer, team, 3)  # the last of the warm-up, and a round of two
    assert (optimizer.stats.local_steps, optimizer.stats.rounds) == (5, 4)


def test_qsr_has_seen_a_rate_that_fell_in_the_warmup():
    team = Workers(nn.Linear(1, 1), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, QSR(2, 0.2, maximum=500), warmup_steps=4)
    for step in range(5):
        inner.param_groups[0]["lr"] = 0.1 if step < 3 else 0.01
        step_with_zeros(optimizer, team)
    assert optimizer.stats.lr == 0.01
    assert optimizer.stats.interval == 400  # (0.2 / 0.01)²


@pytest.mark.parametrize("steps", [4, 6], ids=["at a round's end", "in a round"])
def test_workers_that_have_stepped_alone_are_past_a_longer_warmup_too(steps):
    first, team = make(SlowMo, interval=4)
    run(first, team, steps)
    second, others = make(SlowMo, interval=4, warmup_steps=10)
    others.load_state_dict(copy.deepcopy(team.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, team, 8, first=steps)
    run(second, others, 8, first=steps)
    assert torch.equal(parameters_of(others), parameters_of(team))
    assert second.stats.rounds == first.stats.rounds == 3


def step_with_zeros(optimizer, team):
    for parameter in team.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
