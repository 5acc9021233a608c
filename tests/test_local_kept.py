"""Wrappers behind a stand-in that derives from their class and passes on what it lacks, as Lightning's do."""

import copy

import pytest
import torch
from torch import nn

from fastlocal import DiLoCo, LocalSGD, SlowMo, Workers
from fastlocal.local.kept import Kept


class StandIn:
    """What lightning.pytorch and lightning.fabric hand out instead of the optimizer."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("StandIn" + type(optimizer).__name__, (StandIn, type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def make(kind, interval=100):
    torch.manual_seed(0)
    team = Workers(nn.Linear(3, 1), 2)
    return kind(torch.optim.SGD(team.parameters(), lr=0.1, momentum=0.9), team, interval), team


def train(optimizer, team, rounds=3, steps=3):
    for step in range(rounds * steps):
        optimizer.zero_grad()
        for number, worker in enumerate(team):
            generator = torch.Generator().manual_seed(10 * step + number)
            worker(torch.randn(4, 3, generator=generator)).pow(2).mean().backward()
        optimizer.step()
        if (step + 1) % steps == 0:
            optimizer.sync()


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
def test_a_sync_through_a_stand_in_is_one_of_the_optimizer(kind):
    (plain, alone), (behind, team) = make(kind), make(kind)
    train(plain, alone)
    train(StandIn(behind), team)
    assert behind.stats.rounds == 3
    assert behind.steps_in_round == 0
    for mine, other in zip(team.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_is_set_on_a_stand_in_is_set_on_the_optimizer():
    optimizer, team = make(SlowMo)
    before = StandIn(optimizer)
    before.policy, before.weights, before.slow_lr = 7, (1.0, 3.0), 0.5
    assert optimizer.policy.next_interval(optimizer.stats) == 7
    assert (optimizer.weights, optimizer.slow_lr) == ((1.0, 3.0), 0.5)
    with pytest.raises(AttributeError, match="inner_state was chosen when the optimizer was built"):
        before.inner_state = "reset"
    assert before.param_groups is optimizer.inner.param_groups
    assert before.state is optimizer.inner.state
    scheduler = torch.optim.lr_scheduler.StepLR(before, 1)
    train(before, team, rounds=1)
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_state_loaded_through_a_stand_in_is_the_optimizers():
    (first, team), (second, others) = make(SlowMo, interval=4), make(SlowMo, interval=4)
    train(first, team, rounds=1, steps=6)
    saved = copy.deepcopy((team.state_dict(), first.state_dict()))
    others.load_state_dict(saved[0])
    StandIn(second).load_state_dict(saved[1])
    assert (vars(second.stats), second.steps_in_round) == (vars(first.stats), first.steps_in_round)
    train(first, team, rounds=1, steps=6)
    train(second, others, rounds=1, steps=6)
    for mine, other in zip(others.parameters(), team.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_was_not_set_yet_is_an_attribute_that_is_lacking():
    class Owner:
        early: Kept[int] = Kept()
        late: Kept[int] = Kept()

    owner = Owner()
    owner.early = 1
    assert owner.early == 1
    assert getattr(owner, "late", None) is None
