"""Arguments, and options of the inner optimizer, that a wrapper refuses, and groups that come later."""

import math
import re

import pytest
import torch
from local_runs import make, parameters_of, run, step_with
from torch import nn

from fastlocal import LAMB, DiLoCo, LocalSGD, SlowMo, Workers


def test_a_group_added_later_is_trained_and_one_of_foreign_parameters_is_refused():
    team = Workers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2)
    optimizer = LocalSGD(torch.optim.SGD([p for m in team for p in m[0].parameters()], lr=0.1), team, 2)
    optimizer.add_param_group({"params": [p for m in team for p in m[1].parameters()], "lr": 0.5})
    before = team[1][1].weight.detach().clone()
    for _ in range(2):
        for model in team:
            model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not torch.equal(before, team[1][1].weight)
    with pytest.raises(ValueError, match=r"a parameter of shape \(4,\) that is no trainable parameter of model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))]})
    assert len(optimizer.param_groups) == 2


def test_wrong_arguments_are_named_with_value_and_rule():
    team = Workers(nn.Linear(2, 2), 2)

    def sgd():
        return torch.optim.SGD(team.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        LocalSGD(sgd(), team, 0)
    with pytest.raises(TypeError, match="interval must be an int, got 2.5"):
        LocalSGD(sgd(), team, 2.5)
    with pytest.raises(ValueError, match="inner_state must be one of keep, reset, average, got 'drop'"):
        LocalSGD(sgd(), team, 2, inner_state="drop")
    with pytest.raises(ValueError, match="buffers must be one of average, keep, broadcast, got 'sum'"):
        LocalSGD(sgd(), team, 2, buffers="sum")
    with pytest.raises(ValueError, match="impl must be one of auto, triton, portable, reference, got 'cuda'"):
        LocalSGD(sgd(), team, 2, impl="cuda")
    double = nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="impl='triton' has kernels for float32, bfloat16 and float16, got"):
        LocalSGD(torch.optim.SGD(double.parameters(), lr=0.1), double, 2, impl="triton")
    with pytest.raises(TypeError, match="model must be an nn.Module or Workers, got list"):
        LocalSGD(sgd(), list(team), 2)
    for seconds in (0.0, float("nan"), float("inf"), 1e10):
        with pytest.raises(
            ValueError, match=f"timeout must be .* seconds, at most 1e9, got {re.escape(str(seconds))}"
        ):
            LocalSGD(sgd(), team, 2, timeout=seconds)
    LocalSGD(sgd(), team, 2, timeout=1e9)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        LocalSGD(sgd(), team, 2, warmup_steps=-1)
    with pytest.raises(ValueError, match="slow_lr must be positive and finite, got 0"):
        SlowMo(sgd(), team, 2, slow_lr=0)
    with pytest.raises(ValueError, match=r"slow_momentum must be in \[0, 1\), got 1.0"):
        DiLoCo(sgd(), team, 2, slow_momentum=1.0)
    with pytest.raises(TypeError, match="inner must be a torch.optim optimizer that is not wrapped yet"):
        LocalSGD(LocalSGD(sgd(), team, 2), team, 2)
    with pytest.raises(ValueError, match="that is no trainable parameter of model"):
        LocalSGD(torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1), team, 2)
    with pytest.raises(ValueError, match=r"'weight' is not in inner for worker 1, .* over workers.parameters\(\)"):
        LocalSGD(torch.optim.SGD(team[0].parameters(), lr=0.1), team, 2)
    apart = [{"params": team[0].parameters()}, {"params": team[1].parameters()}]
    with pytest.raises(ValueError, match=r"in the groups \[0, 1\] for the workers 0 to 1"):
        LocalSGD(torch.optim.SGD(apart, lr=0.1), team, 2)
    for steps in (1.5, True):
        with pytest.raises(TypeError, match=f"warmup_steps must be an int, got {steps}"):
            LocalSGD(sgd(), team, 2, warmup_steps=steps)
    with pytest.raises(TypeError, match="timeout must be a number, got '5'"):
        LocalSGD(sgd(), team, 2, timeout="5")
    with pytest.raises(TypeError, match=r"weights must be a sequence of numbers, one a worker, got 3\.0"):
        LocalSGD(sgd(), team, 2, weights=3.0)
    with pytest.raises(TypeError, match="each of weights must be a number, got 'a'"):
        LocalSGD(sgd(), team, 2, weights=["a"] * len(team))
    with pytest.raises(TypeError, match="val_loss must be a number, got 'a'"):
        LocalSGD(sgd(), team, 2).observe(val_loss="a")
    half = type("Half", (), {"next_interval": lambda self, stats: 2})()
    with pytest.raises(TypeError, match="interval is a Half that lacks state_dict and load_state_dict"):
        LocalSGD(sgd(), team, half)


def test_an_optimizer_that_clips_by_the_norm_of_all_its_gradients_is_refused_for_several_workers():
    one, two = Workers(nn.Linear(2, 2), 1), Workers(nn.Linear(2, 2), 2)
    LocalSGD(LAMB(one.parameters(), max_grad_norm=1.0), one, 2)
    with pytest.raises(
        ValueError, match=r"max_grad_norm=1.0 would bound the norm of all workers' gradients together"
    ):
        LocalSGD(LAMB(two.parameters(), max_grad_norm=1.0), two, 2)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_master_weights_which_no_sync_averages_are_refused(kind):
    for dtype in (torch.bfloat16, torch.float16):
        team = Workers(nn.Linear(4, 2, dtype=dtype), 2)
        inner = LAMB(team.parameters(), lr=0.1, master_weights=True)
        with pytest.raises(ValueError, match=f"master_weights=True keeps float32 weights of parameters in {dtype}"):
            kind(inner, team, 4)
    team = Workers(nn.Linear(4, 2), 2)  # float32 parameters are their own masters
    optimizer = kind(LAMB(team.parameters(), lr=0.1, master_weights=True), team, 1)
    for parameter in team.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.stats.rounds == 1


def test_a_group_added_to_the_inner_optimizer_is_checked_and_has_its_rate():
    def split(through_wrapper):
        torch.manual_seed(0)
        team = Workers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), 2)
        inner = torch.optim.SGD([p for worker in team for p in worker[0].parameters()], lr=0.1)
        optimizer = SlowMo(inner, team, 2)
        added = {"params": [p for worker in team for p in worker[1].parameters()], "lr": 0.02}
        (optimizer if through_wrapper else inner).add_param_group(added)
        for step in range(6):
            for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
                group["lr"] *= factor
            optimizer.zero_grad()
            for worker in team:
                worker(torch.ones(2, 3) * (step + 1)).square().mean().backward()
            optimizer.step()
        return parameters_of(team)

    assert torch.equal(split(True), split(False))
    optimizer, team = make(LocalSGD, interval=2)
    optimizer.inner.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="is no trainable parameter of model"):
        run(optimizer, team, 1)


def test_options_that_would_be_wrong_are_found_in_groups_that_were_edited():
    team = Workers(nn.Linear(2, 1), 2)
    optimizer = LocalSGD(LAMB(team.parameters(), lr=0.1), team, 1)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm=1.0 would bound the norm of all workers' gradients"):
        step_with(optimizer, team)

    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="inner's param group 0 has no 'lr'"):
        LocalSGD(WithoutRate(team.parameters()), team, 1)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_must_be_positive_and_finite(weight):
    with pytest.raises(ValueError, match=r"weights must be positive and finite, got \[1.0, "):
        make(LocalSGD, workers=2, weights=[1.0, weight])
