"""What is loaded into the first worker before training begins is for all, unless the others were written to."""

import pytest
import torch
from torch import nn

from fastlocal import Workers

LOADED = torch.tensor([[3.0, -4.0], [0.5, 8.0]])


def team_loaded_into_the_first():
    team = Workers(nn.Linear(2, 2, bias=False), 3)
    with torch.no_grad():
        team[0].weight.copy_(LOADED)
    return team


def test_what_the_first_worker_was_given_is_given_to_all_until_training_begins():
    team = team_loaded_into_the_first()
    team[2].weight.grad = torch.ones(2, 2)
    team.rows.following.catch_up()
    assert all(torch.equal(worker.weight, LOADED) for worker in team)
    assert torch.equal(team[2].weight.grad, torch.zeros(2, 2))  # it was of other parameters
    with torch.no_grad():
        team[0].weight.mul_(2)
    assert team.rows.following.lasts()
    team.rows.following.begin()
    assert all(torch.equal(worker.weight, 2 * LOADED) for worker in team)
    with torch.no_grad():
        team[0].weight.zero_()
    assert not team.rows.following.lasts()
    team.rows.following.begin()
    assert torch.equal(team[1].weight, 2 * LOADED)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(1),
        lambda weight: weight.data.copy_(weight.data.flip(0)),  # the same numbers in another order
        lambda weight: weight.data.neg_(),
    ],
    ids=["in place", "swapped through .data", "negated through .data"],
)
def test_a_worker_that_somebody_wrote_to_is_left_as_it_is(write):
    team = team_loaded_into_the_first()
    with torch.no_grad():
        write(team[1].weight)
    expected = team[1].weight.clone()
    assert not team.rows.following.lasts()
    team.rows.following.begin()
    assert torch.equal(team[1].weight, expected)
    assert not torch.equal(team[2].weight, LOADED)


def test_nothing_is_given_once_training_has_begun():
    team = team_loaded_into_the_first()
    team.rows.following.end()
    team.rows.following.begin()
    assert not torch.equal(team[1].weight, LOADED)
