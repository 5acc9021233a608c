"""The wrappers' rules: rounds, counting, non-finite workers, buffers, inner state, checkpoints, copies."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastlocal import LAMB, QSR, DiLoCo, FixedInterval, LocalSGD, SlowMo, ValidationLoss, Workers


def make(kind=SlowMo, workers=3, interval=4, optimizer="sgd", seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)).to(
        memory_format=torch.channels_last
    )
    team = Workers(model, workers)
    if optimizer == "sgd":
        inner = torch.optim.SGD(team.parameters(), lr=0.05, momentum=0.9)
    else:
        inner = torch.optim.AdamW(team.parameters(), lr=0.01)
    return kind(inner, team, interval, **options), team


def run(optimizer, team, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for model in team:
            model(torch.randn(8, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def measured(interval):
    policy = FixedInterval(interval)
    policy.reads_drift = True
    return policy


def parameters_of(team):
    return torch.cat([p.detach().flatten() for p in team.parameters()])


def poison(model, value=torch.nan):
    with torch.no_grad():
        next(model.parameters())[1, 2, 0, 1] = value


def regression(kind, split, workers=2, interval=4):
    """A linear model under one optimizer, or under one for each parameter; and a function that takes a step."""
    torch.manual_seed(0)
    team = Workers(nn.Linear(4, 2, dtype=torch.float64), workers)
    each = [[p for p in team.parameters() if p.dim() == dim] for dim in (2, 1)]
    optimizers = [
        kind(torch.optim.SGD(parameters, lr=0.05, momentum=0.9), team, interval)
        for parameters in (each if split else [each[0] + each[1]])
    ]

    def step(number):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for worker, model in enumerate(team):
            generator = torch.Generator().manual_seed(100 * number + worker)
            x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
            (model(x) - x[:, :2]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    return team, step


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
def test_an_optimizer_for_each_parameter_is_one_for_all(kind):
    (one, step_one), (several, step_several) = (regression(kind, split) for split in (False, True))
    for number in range(12):
        step_one(number)
        step_several(number)
    torch.testing.assert_close(parameters_of(several), parameters_of(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
def test_a_layer_that_is_frozen_on_the_way_stays_where_it_is_until_it_trains_again(kind):
    team, step = regression(kind, split=False)
    for number in range(8):
        step(number)
    for model in team:
        model.bias.requires_grad_(False).grad = None
    linear = team[0]
    assert isinstance(linear, nn.Linear)
    frozen, weight = linear.bias.clone(), linear.weight.clone()
    for number in range(8, 16):
        step(number)
    torch.testing.assert_close(linear.bias, frozen, rtol=1e-15, atol=1e-15)
    assert (linear.weight - weight).abs().max() > 1e-3
    for model in team:
        model.bias.requires_grad_(True)
    for number in range(16, 24):
        step(number)
    assert (linear.bias - frozen).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [SlowMo, DiLoCo])
def test_a_layer_that_is_frozen_when_a_round_ends_keeps_what_it_learned_in_it(kind):
    """It rests where no step of the round moved it; a resumed round knows."""
    states = []
    for freezes in (False, True):
        team = Workers(nn.Linear(2, 1, dtype=torch.float64), 2)
        with torch.no_grad():
            for parameter in team.parameters():
                parameter.zero_()
        optimizer = kind(torch.optim.SGD(team.parameters(), lr=1.0), team, 100)
        for _ in range(3):
            for parameter in team.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        for model in team if freezes else ():
            model.requires_grad_(False)
        optimizer.sync()
        states.append((parameters_of(team), optimizer.state_dict()["fastlocal"]["outer"][0]["momentum_buffer"]))
        for model in team:
            model.requires_grad_(False)
        for parameter in team.parameters():
            parameter.grad = None
        for _ in range(2):
            optimizer.step()
        saved = copy.deepcopy((team.state_dict(), optimizer.state_dict()))
        for model in team:
            model.requires_grad_(True)
        again = kind(torch.optim.SGD(team.parameters(), lr=1.0), team, 100)
        team.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        again.sync()
        assert torch.equal(parameters_of(team), states[-1][0])
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert states[1][1].abs().max() > 0


def test_what_may_be_set_between_rounds_comes_back_with_the_state_and_old_states_leave_it():
    optimizer, team = make(interval=4)
    optimizer.slow_lr, optimizer.slow_momentum, optimizer.policy = 0.3, 0.2, 2
    run(optimizer, team, 3)
    saved = copy.deepcopy({"workers": team.state_dict(), "optimizer": optimizer.state_dict()})
    again, others = make(interval=4)
    others.load_state_dict(saved["workers"])
    again.load_state_dict(saved["optimizer"])
    run(optimizer, team, 6, first=3)
    run(again, others, 6, first=3)
    assert torch.equal(parameters_of(team), parameters_of(others))
    assert again.stats.rounds == optimizer.stats.rounds == 4

    old = copy.deepcopy(saved["optimizer"])
    del old["fastlocal"]["slow_lr"], old["fastlocal"]["slow_momentum"], old["fastlocal"]["resting"]
    old["fastlocal"]["policy"]["state"] = {}
    fresh, _ = make(interval=5, slow_lr=0.9)
    fresh.load_state_dict(old)
    assert (fresh.slow_lr, fresh.slow_momentum, fresh.policy.interval) == (0.9, 0.5, 5)
    old["fastlocal"]["slow_lr"] = -1.0
    with pytest.raises(ValueError, match="slow_lr must be positive and finite, got -1.0"):
        fresh.load_state_dict(old)
    assert fresh.slow_lr == 0.9


def test_a_state_without_our_entry_says_who_drops_it():
    optimizer, _ = make()
    with pytest.raises(ValueError, match="get_optimizer_state_dict of torch.distributed.checkpoint does"):
        optimizer.load_state_dict(optimizer.inner.state_dict())


def test_a_model_that_is_pruned_or_wrapped_again_is_told_so():
    optimizer, team = make(interval=1)
    prune.l1_unstructured(team[1][4], "weight", amount=0.5)
    with pytest.raises(RuntimeError, match=r"'4.weight' of worker 1 is gone: prune or parametrise the model before"):
        run(optimizer, team, 1)
    model = nn.Linear(3, 2)
    first = SlowMo(torch.optim.SGD([model.weight], lr=0.1), model, 1)
    SlowMo(torch.optim.SGD([model.bias], lr=0.1), model, 1)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="several optimizers of one model take the same Workers"):
        first.step()


def test_a_round_ends_after_interval_steps_and_all_workers_are_equal_then():
    optimizer, team = make(interval=3)
    for step in range(1, 8):
        run(optimizer, team, 1, first=step)
        equal = all(torch.equal(a, b) for a, b in zip(team[0].parameters(), team[2].parameters(), strict=True))
        assert equal == (step % 3 == 0)
        assert optimizer.stats.rounds == step // 3
    optimizer.sync()
    assert optimizer.stats.rounds == 3
    optimizer.sync()  # nothing to close
    assert optimizer.stats.rounds == 3


def test_bytes_are_those_of_a_ring_all_reduce():
    optimizer, team = make(LocalSGD, workers=3, interval=4, buffers="keep")
    run(optimizer, team, 8)
    payload = sum(p.numel() * 4 for p in team[0].parameters())
    assert optimizer.stats.bytes_on_wire == 2 * (2 * 2 * payload // 3)
    assert optimizer.stats.bytes_synchronous == 8 * (2 * 2 * payload // 3)


def test_averaged_buffers_and_state_are_counted_as_bytes():
    plain, team = make(LocalSGD, interval=1, buffers="keep")
    run(plain, team, 1)
    more, team = make(LocalSGD, interval=1, buffers="average", inner_state="average")
    run(more, team, 1)
    buffers = sum(b.nbytes for b in team[0].buffers())
    momentum = sum(p.nbytes for p in team[0].parameters())
    assert more.stats.bytes_on_wire == 4 * (momentum * 2 + buffers) // 3
    assert plain.stats.bytes_on_wire == 4 * momentum // 3


def test_one_worker_sends_nothing():
    optimizer, team = make(workers=1, interval=measured(4))
    run(optimizer, team, 5)
    assert optimizer.stats.bytes_on_wire == 0
    assert optimizer.stats.drift == 0.0


def test_drift_is_the_mean_distance_from_the_mean():
    optimizer, team = make(LocalSGD, workers=3, interval=measured(100), inner_state="keep")
    run(optimizer, team, 5)
    rows = torch.stack([torch.cat([p.detach().flatten() for p in model.parameters()]) for model in team]).double()
    expected = (rows - rows.mean(0)).norm(dim=1).mean().item()
    optimizer.sync()
    assert optimizer.stats.drift == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
def test_a_sync_whose_drift_nobody_reads_measures_none_and_gives_the_same_parameters(kind):
    results = []
    for interval in (4, measured(4)):
        optimizer, team = make(kind, workers=3, interval=interval)
        run(optimizer, team, 9)
        results.append((parameters_of(team), optimizer.stats.drift))
    assert math.isnan(results[0][1])
    assert results[1][1] > 0
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_worker_with_one_bad_value_is_left_out_whole_and_healed(kind, bad):
    optimizer, team = make(kind, workers=3, interval=100)
    run(optimizer, team, 4)
    good = [torch.cat([p.detach().flatten() for p in model.parameters()]).double() for model in (team[0], team[2])]
    poison(team[1], bad)
    optimizer.sync()
    assert optimizer.stats.excluded == 1
    assert parameters_of(team).isfinite().all()
    if kind is LocalSGD:
        healed = torch.cat([p.detach().flatten() for p in team[1].parameters()]).double()
        torch.testing.assert_close(healed, (good[0] + good[1]) / 2, rtol=1e-6, atol=1e-7)
    # Its momentum starts anew; the others keep theirs.
    assert next(team[1].parameters()) not in optimizer.state
    assert optimizer.state[next(team[0].parameters())]["momentum_buffer"].any()
    run(optimizer, team, 4, first=9)
    assert parameters_of(team).isfinite().all()


def test_without_a_finite_worker_sync_raises_and_writes_nothing():
    optimizer, team = make(workers=2, interval=100)
    run(optimizer, team, 2)
    for model in team:
        poison(model)
    before = parameters_of(team)
    with pytest.raises(RuntimeError, match="after 2 local steps no worker's parameters are finite"):
        optimizer.sync()
    assert torch.equal(parameters_of(team).nan_to_num(7), before.nan_to_num(7))


def test_parameters_keep_storage_and_memory_format_over_a_sync():
    optimizer, team = make(interval=2)
    before = [(p.data_ptr(), p.stride()) for p in team.parameters()]
    assert team[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    run(optimizer, team, 5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [(p.data_ptr(), p.stride()) for p in team.parameters()] == before


@pytest.mark.parametrize("choice", ["average", "broadcast", "keep"])
def test_buffers_are_merged_as_chosen(choice):
    optimizer, team = make(LocalSGD, workers=2, interval=100, buffers=choice)
    run(optimizer, team, 2)
    team[1][1].num_batches_tracked.fill_(9)
    means = [model[1].running_mean.clone() for model in team]
    optimizer.sync()
    merged = [model[1].running_mean for model in team]
    if choice == "average":
        assert torch.equal(merged[0], (means[0] + means[1]) / 2)
        assert torch.equal(merged[1], merged[0])
        assert [model[1].num_batches_tracked.item() for model in team] == [9, 9]
    elif choice == "broadcast":
        assert torch.equal(merged[0], means[0])
        assert torch.equal(merged[1], means[0])
    else:
        assert torch.equal(merged[0], means[0])
        assert torch.equal(merged[1], means[1])


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_inner_state_is_averaged_or_reset_as_chosen(optimizer_name):
    key = "momentum_buffer" if optimizer_name == "sgd" else "exp_avg"
    for choice in ("keep", "average", "reset"):
        optimizer, team = make(LocalSGD, workers=2, interval=100, optimizer=optimizer_name, inner_state=choice)
        run(optimizer, team, 3)
        first, second = (optimizer.state[next(model.parameters())] for model in team)
        before = first[key].clone(), second[key].clone()
        optimizer.sync()
        if choice == "average":
            assert torch.equal(first[key], (before[0] + before[1]) / 2)
            assert torch.equal(second[key], first[key])
        elif choice == "reset":
            assert not optimizer.state
        else:
            assert torch.equal(first[key], before[0])
            assert torch.equal(second[key], before[1])


def test_a_parameter_without_gradient_is_averaged_all_the_same():
    optimizer, team = make(LocalSGD, workers=2, interval=100)
    run(optimizer, team, 1)
    with torch.no_grad():
        team[0][4].bias.fill_(1.0)
        team[1][4].bias.fill_(3.0)
    optimizer.zero_grad()
    team[0][4].bias.grad = None
    optimizer.sync()
    assert team[0][4].bias.tolist() == [2.0] * 5


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


def test_a_policy_of_ones_own_chooses_the_interval_once_a_round():
    class Growing:
        calls = 0

        def next_interval(self, stats):
            self.calls += 1
            return stats.rounds + 1

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state_dict):
            self.calls = state_dict["calls"]

    policy = Growing()
    optimizer, team = make(interval=policy)
    run(optimizer, team, 6)
    assert optimizer.stats.rounds == 3  # 1 + 2 + 3 steps
    assert policy.calls == 3


def test_a_policy_that_answers_nonsense_is_named():
    class Broken(FixedInterval):
        def next_interval(self, stats):
            return 0

    optimizer, team = make(interval=Broken(1))
    with pytest.raises(ValueError, match="the interval from Broken must be at least 1, got 0"):
        run(optimizer, team, 1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_observing_a_loss_that_is_not_finite_is_an_error(loss):
    optimizer, _ = make(interval=ValidationLoss(16, total_epochs=3))
    with pytest.raises(ValueError, match="val_loss must be finite, got"):
        optimizer.observe(val_loss=loss)
    assert optimizer.stats.val_loss is None


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
@pytest.mark.parametrize("steps", [0, 2, 3, 7, 8])
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_resume_is_bit_exact_at_every_phase_of_a_round(kind, steps, optimizer_name):
    straight, straight_team = make(kind, optimizer=optimizer_name)
    run(straight, straight_team, 12)

    first, first_team = make(kind, optimizer=optimizer_name)
    run(first, first_team, steps)
    file = io.BytesIO()
    torch.save({"workers": first_team.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second, second_team = make(kind, optimizer=optimizer_name, seed=5)
    second_team.load_state_dict(saved["workers"])
    second.load_state_dict(saved["optimizer"])
    run(second, second_team, 12 - steps, first=steps)
    assert torch.equal(parameters_of(second_team), parameters_of(straight_team))
    ours, theirs = vars(second.stats), vars(straight.stats)
    ours["seconds_in_sync"] = theirs["seconds_in_sync"]
    assert ours == theirs


def test_loading_does_not_change_the_callers_dict_and_keeps_schedulers_alive():
    optimizer, team = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, team, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert saved.keys() == kept.keys()
    assert saved["fastlocal"].keys() == kept["fastlocal"].keys()
    assert saved["fastlocal"]["stats"] == kept["fastlocal"]["stats"]
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.025
    assert optimizer.param_groups is optimizer.inner.param_groups


def test_loading_the_inner_optimizer_directly_does_not_split_the_groups():
    optimizer, _ = make()
    optimizer.inner.load_state_dict(optimizer.inner.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    assert optimizer.inner.param_groups[0]["lr"] == 0.125


def test_a_state_of_something_else_is_refused_by_name():
    optimizer, _ = make(SlowMo)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="of the method 'SlowMo', this optimizer has 'DiLoCo'"):
        make(DiLoCo)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="of the number of workers 3, this optimizer has 2"):
        make(SlowMo, workers=2)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="of the policy 'FixedInterval', this optimizer has 'ValidationLoss'"):
        make(SlowMo, interval=ValidationLoss(16, total_epochs=2))[0].load_state_dict(state)
    with pytest.raises(ValueError, match="has no entry 'fastlocal'"):
        optimizer.load_state_dict(optimizer.inner.state_dict())
    other = Workers(nn.Linear(3, 3), 3)
    with pytest.raises(ValueError, match="the state is of another model"):
        SlowMo(torch.optim.SGD(other.parameters(), lr=0.1), other, 4).load_state_dict(state)


def test_a_policy_that_cannot_take_a_state_back_keeps_its_own_and_the_error_says_why():
    class Picky(FixedInterval):
        limit = 5

        def state_dict(self):
            return {"limit": self.limit}

        def load_state_dict(self, state_dict):
            self.limit = state_dict["limit"]
            if self.limit > 10:
                raise ValueError("limit must be at most 10")

    optimizer, team = make(interval=Picky(4))
    run(optimizer, team, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["fastlocal"]["policy"]["state"]["limit"] = 11
    with pytest.raises(ValueError, match=r"does not fit the policy .*limit must be at most 10"):
        optimizer.load_state_dict(state)
    assert optimizer.policy.limit == 5
    assert optimizer.steps_in_round == 2


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_like_the_original_and_apart_from_it(kind, duplicate):
    optimizer, team = make(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    run(optimizer, team, 6)
    scheduler.step()
    twin = duplicate(optimizer)
    run(optimizer, team, 6, first=6)
    run(twin, twin.rows.modules, 6, first=6)
    mine = torch.cat([p.detach().flatten() for model in twin.rows.modules for p in model.parameters()])
    assert torch.equal(mine, parameters_of(team))
    assert twin.rows.modules[0] is not team[0]


def test_hooks_run_around_step_and_state_dict():
    optimizer, team = make()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    run(optimizer, team, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "save", "load"]


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
    with pytest.raises(TypeError, match="warmup_steps must be an int, got 1.5"):
        LocalSGD(sgd(), team, 2, warmup_steps=1.5)
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


def test_training_in_one_process_does_not_touch_the_process_group_and_a_group_that_comes_later_is_an_error():
    code = """
import torch, torch.distributed as dist, fastlocal
team = fastlocal.Workers(torch.nn.Linear(2, 2), 2)
optimizer = fastlocal.LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
optimizer.step()
assert not dist.is_initialized()
late = fastlocal.LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
late.step()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert "initialised after this optimizer was built" in done.stderr


def test_a_step_that_gradscaler_skips_counts_for_no_worker():
    optimizer, team = make(LocalSGD, interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        for model in team:
            scaler.scale(model(torch.ones(4, 3, 6, 6)).square().mean()).backward()
        if step == 1:
            team[2][4].bias.grad.fill_(torch.inf)
        before = parameters_of(team)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, parameters_of(team)) == (step == 1)
    assert optimizer.stats.local_steps == 3
    assert optimizer.stats.rounds == 1


FRESH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", FRESH)
def test_after_a_reset_an_optimizer_steps_like_a_new_one(name):
    torch.manual_seed(0)
    team = Workers(nn.Linear(4, 3), 2)
    optimizer = LocalSGD(FRESH[name](team.parameters()), team, 3, inner_state="reset")

    def backward(modules, seed):
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            module.zero_grad()
            module(torch.randn(5, 4, generator=generator)).square().sum().backward()

    for step in range(3):
        backward(team, step)
        optimizer.step()
    assert optimizer.stats.rounds == 1
    twins = [copy.deepcopy(worker) for worker in team]
    fresh = FRESH[name]([p for twin in twins for p in twin.parameters()])
    for step in range(3, 5):
        backward(team, step)
        backward(twins, step)
        optimizer.step()
        fresh.step()
        for ours, theirs in zip(team.parameters(), (p for twin in twins for p in twin.parameters()), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inner_state", ["keep", "reset", "average"])
@pytest.mark.parametrize("name", FRESH)
def test_a_worker_with_a_nan_gradient_is_excluded_once_and_then_healed(name, inner_state):
    torch.manual_seed(0)
    team = Workers(nn.Linear(4, 3), 3)
    optimizer = LocalSGD(FRESH[name](team.parameters()), team, 2, inner_state=inner_state)
    for step in range(8):
        for worker in team:
            worker.zero_grad()
            worker(torch.randn(5, 4)).square().sum().backward()
        if step == 1:
            team[1].weight.grad.view(-1)[0] = torch.nan
        optimizer.step()
    # Rprop takes NaN for a zero and steps on, but keeps it in its state, which an average would give to all.
    assert optimizer.stats.excluded == (0 if name == "rprop" and inner_state != "average" else 1)
    assert parameters_of(team).isfinite().all()


def test_state_that_is_not_finite_is_not_averaged_into_the_others():
    # Adam's second moment of such a gradient is infinite, its parameters are not: they stand still for ever.
    team = Workers(nn.Linear(3, 1, bias=False), 4)
    optimizer = LocalSGD(torch.optim.Adam(team.parameters(), lr=0.1), team, 2, inner_state="average")
    before: list[torch.Tensor] = []
    for step in range(8):
        for worker, parameter in enumerate(team.parameters()):
            parameter.grad = torch.full_like(parameter, 1e25 if (step, worker) == (1, 2) else 1.0)
        before = [parameter.detach().clone() for parameter in team.parameters()]
        optimizer.step()
    assert optimizer.stats.excluded == 1
    assert not any(torch.equal(old, new) for old, new in zip(before, team.parameters(), strict=True))


@pytest.mark.parametrize(
    "make_inner",
    [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD, lambda params, lr: LAMB(params, lr=lr, weight_decay=0.1)],
    ids=["adam", "nadam", "asgd", "lamb"],
)
def test_what_is_counted_for_a_parameter_of_one_number_is_not_averaged(make_inner):
    team = Workers(nn.ParameterDict({"scale": torch.tensor(2.0), "weight": torch.ones(3)}), 2)
    inner = make_inner(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 3, inner_state="average")
    for step in range(3):
        for worker, model in enumerate(team):
            for parameter in model.parameters():
                late = (step, worker) == (0, 1)
                parameter.grad = None if late else torch.full_like(parameter, 1.0 + worker)
        optimizer.step()
    for worker, model in enumerate(team):
        counts = [float(inner.state[p]["step"]) for p in model.parameters()]
        assert counts == [3 - worker] * 2
    for key, value in inner.state[team[0]["scale"]].items():
        if key not in ("step", "mu_product", "mu", "eta", "ax"):
            assert value == inner.state[team[1]["scale"]][key], key


def test_what_is_loaded_into_the_model_after_it_became_workers_is_where_all_begin():
    team = Workers(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 4)
    team[0].load_state_dict({name: torch.full_like(value, 10) for name, value in team[0].state_dict().items()})
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
    for parameter in team.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for model in team:
        assert all((value == 10).all() for value in model.state_dict().values())


def test_what_other_workers_were_given_is_never_replaced_by_the_first_ones():
    def stepped(team):
        optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
        for parameter in team.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return [parameters_of(model) for model in team]

    team = Workers(nn.Linear(1, 1), 2)
    states = [
        {name: torch.full_like(value, number) for name, value in team[0].state_dict().items()} for number in (1, 3)
    ]
    team.load_state_dict({"workers": states})
    assert [values.tolist() for values in stepped(team)] == [[2.0] * 2] * 2
    # A copy in the middle of a round, and a second optimizer's first step there.
    first, other = make(LocalSGD, workers=2, interval=4)
    run(first, other, 2)
    team, apart = copy.deepcopy(other), parameters_of(other[0]) - parameters_of(other[1])
    assert apart.abs().max() > 0
    exact = (parameters_of(team[0]) + parameters_of(team[1])) / 2
    for values in stepped(team):
        torch.testing.assert_close(values, exact)


@pytest.mark.parametrize("several", [False, True])
def test_a_sync_in_inference_mode_leaves_nothing_that_a_later_one_cannot_write(several):
    optimizer, team = make(LocalSGD, interval=3, optimizer="adamw", inner_state="average", wire_dtype=torch.bfloat16)
    run(optimizer, team, 2)
    if several:
        poison(team[1])  # it is given another worker's state
    with torch.inference_mode():
        optimizer.sync()
    run(optimizer, team, 5, first=2)
    assert optimizer.stats.rounds == 2
    assert parameters_of(team).isfinite().all()


def test_averaged_inner_state_has_the_factored_moments_too():
    torch.manual_seed(0)
    team = Workers(nn.Linear(4, 3, dtype=torch.float64), 2)
    inner = torch.optim.Adafactor(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 2, inner_state="average")
    alone = [copy.deepcopy(team[0]) for _ in range(2)]
    each = [torch.optim.Adafactor(model.parameters(), lr=0.1) for model in alone]
    for step in range(5):
        for number, model in enumerate([*team, *alone]):
            generator = torch.Generator().manual_seed(10 * step + number % 2)
            model.zero_grad()
            model(torch.randn(5, 4, generator=generator, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        for own in each:
            own.step()
        if step % 2:
            with torch.no_grad():
                for first, second in zip(*(model.parameters() for model in alone), strict=True):
                    mine, theirs = each[0].state[first], each[1].state[second]
                    pairs = [(first, second), *((mine[key], theirs[key]) for key in mine if key != "step")]
                    for one, other in pairs:
                        one.copy_((one + other) / 2)
                        other.copy_(one)
    for model, twin in zip(team, alone, strict=True):
        torch.testing.assert_close(parameters_of([model][0]), parameters_of(twin), rtol=1e-12, atol=1e-12)
    # One worker's: of the weight 4 columns and 3 rows, of the bias 3 numbers, in float64 and twice a ring of two.
    assert optimizer.stats.bytes_on_wire == 2 * 8 * (4 * 3 + 3 + 4 + 3 + 3)


def test_averaged_inner_state_leaves_alone_what_is_neither_like_its_parameter_nor_a_factor():
    team = Workers(nn.Linear(5, 3, bias=False), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 1, inner_state="average")
    shapes = {"like": (3, 5), "row": (3, 1), "column": (5,), "basis": (3, 3), "scales": (2,)}
    for number, parameter in enumerate(team.parameters()):
        parameter.grad = torch.zeros_like(parameter)
        inner.state[parameter] = {name: torch.full(shape, 2.0 * number) for name, shape in shapes.items()}
    optimizer.step()
    held = inner.state[team[1].weight]
    assert {name: value.unique().item() for name, value in held.items()} == {
        "like": 1.0, "row": 1.0, "column": 1.0, "basis": 2.0, "scales": 2.0
    }  # fmt: skip
    assert optimizer.stats.bytes_on_wire == 4 * (15 + 15 + 3 + 5)


def test_kept_buffers_may_have_a_shape_of_their_own_in_each_worker():
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(1))
    model.register_buffer("count", torch.zeros(1))
    team = Workers(model, 2)
    team[1].cache = torch.ones(3)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1, buffers="keep")
    for parameter in team.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    poison_one = team[1].weight.data
    poison_one[0, 0], team[1].count[0] = torch.nan, torch.nan
    optimizer.step()
    assert optimizer.stats.excluded == 1
    assert team[1].cache.tolist() == [1.0] * 3
    assert team[1].count.tolist() == [0.0]  # healed with the worker
    assert team.mean().cache.tolist() == [0.0]


@pytest.mark.parametrize("fused", [False, True])
def test_momentum_with_dampening_begins_anew_after_a_reset(fused):
    team = Workers(nn.Linear(2, 1, dtype=torch.float64), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=fused)
    optimizer = LocalSGD(inner, team, 2, inner_state="reset")
    start = team[0].weight.detach().clone()
    for _ in range(4):
        for parameter in team.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    # A round: buffers 1 and 0.9 · 1 + 0.5 · 1.
    torch.testing.assert_close(team[0].weight, start - 2 * 0.1 * (1 + 1.4), rtol=1e-12, atol=1e-12)


def test_an_interval_counts_steps_and_not_the_batches_that_one_accumulates():
    optimizer, team = make(LocalSGD, interval=2)
    for step in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            for model in team:
                model(torch.randn(8, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        assert optimizer.stats.rounds == (step + 1) // 2
    assert optimizer.stats.local_steps == 4


def test_a_policy_is_told_the_highest_rate_of_the_groups():
    team = Workers(nn.Linear(2, 1), 2)
    each = [[p for p in team.parameters() if p.dim() == dim] for dim in (1, 2)]
    inner = torch.optim.SGD([{"params": each[0], "lr": 0.1}, {"params": each[1], "lr": 0.5}], lr=0.3)
    optimizer = LocalSGD(inner, team, QSR(1, alpha=1.0))
    for rate, interval in ((0.5, 4), (0.05, 100)):  # (1 / 0.5)², (1 / 0.1)²
        inner.param_groups[1]["lr"] = rate
        for parameter in team.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.sync()
        assert optimizer.stats.interval == interval


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_compiled_step_is_the_step():
    results = []
    for compiled in (False, True):
        optimizer, team = make(SlowMo, interval=2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(5):
            generator = torch.Generator().manual_seed(number)
            optimizer.zero_grad()
            for model in team:
                model(torch.randn(8, 3, 6, 6, generator=generator)).square().mean().backward()
            step()
        results.append((parameters_of(team), optimizer.stats.rounds))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == 2


def test_a_workers_own_tensor_is_saved_with_all_rows_and_its_mean_alone():
    team = Workers(nn.Linear(100, 10), 8)
    sizes = []
    for saved in (team[0].weight, team.mean().weight):
        file = io.BytesIO()
        torch.save(saved, file)
        sizes.append(file.tell())
    assert sizes[0] > 8 * 4 * 1010 > 2 * sizes[1]


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_master_weights_which_no_sync_averages_are_refused(kind):
    team = Workers(nn.Linear(4, 2, dtype=torch.bfloat16), 2)
    inner = LAMB(team.parameters(), lr=0.1, master_weights=True)
    with pytest.raises(
        ValueError, match=r"master_weights=True keeps float32 weights of parameters in torch\.bfloat16"
    ):
        kind(inner, team, 4)
    team = Workers(nn.Linear(4, 2), 2)  # float32 parameters are their own masters
    optimizer = kind(LAMB(team.parameters(), lr=0.1, master_weights=True), team, 1)
    for parameter in team.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.stats.rounds == 1


@pytest.mark.parametrize("k", [1, 2])
def test_a_buffer_that_is_finite_in_no_worker_stays_as_it_is(k):
    model = nn.Linear(6, 2)
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    mask = model.mask.clone()
    team = Workers(model, k)
    assert torch.equal(team.mean().mask, mask)
    run(LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1), team, 2)
    assert all(torch.equal(worker.mask, mask) for worker in team)


@pytest.mark.parametrize(("dtype", "k", "value"), [(torch.float16, 8, 10000.0), (torch.bfloat16, 7, 1.1)])
def test_buffers_of_low_precision_that_are_equal_stay_equal(dtype, k, value):
    model = nn.Linear(6, 2)
    model.register_buffer("table", torch.full((5,), value, dtype=dtype))
    team = Workers(model, k)
    run(LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1), team, 1)
    assert torch.equal(team[0].table, torch.full((5,), value, dtype=dtype))


def test_a_state_of_before_the_first_observed_loss_can_be_loaded_after_it():
    team = Workers(nn.Linear(2, 1), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, ValidationLoss(4, total_epochs=10))
    early = copy.deepcopy(optimizer.state_dict())
    optimizer.observe(val_loss=1.0, train_loss=2.0)
    optimizer.load_state_dict(early)
    assert (optimizer.stats.val_loss, optimizer.stats.train_loss, optimizer.stats.observations) == (None, None, 0)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_a_copy_made_after_a_layer_was_frozen_has_the_same_rows_and_takes_the_state(kind):
    team = Workers(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), 2)
    optimizer = kind(torch.optim.SGD(team.parameters(), lr=0.1), team, 2)

    def step():
        for worker in team:
            worker(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step()
    for worker in team:
        worker[0].requires_grad_(False)
    step()
    twin = copy.deepcopy(optimizer)
    assert twin.rows.blocks[0].rows.shape == optimizer.rows.blocks[0].rows.shape
    twin.load_state_dict(optimizer.state_dict())


def test_one_workers_infinite_batch_does_not_stay_in_the_averaged_batchnorm():
    optimizer, team = make(LocalSGD, workers=3, interval=100)
    run(optimizer, team, 2)
    team[1][1].running_mean.fill_(torch.nan)
    expected = (team[0][1].running_mean + team[2][1].running_mean) / 2
    optimizer.sync()
    for model in team:
        assert torch.equal(model[1].running_mean, expected)


def test_complex_buffers_are_averaged_and_buffers_that_differ_are_found_before_anything_is_written():
    class Rotary(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("frequencies", torch.tensor([1 + 1j, 2.0]))

    team = Workers(Rotary(), 2)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=0.1), team, 1)
    team[1].frequencies.copy_(torch.tensor([3 + 5j, 2.0]))
    for worker in team:
        worker(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert team[0].frequencies.tolist() == [2 + 3j, 2.0]
    team[1].register_buffer("extra", torch.zeros(1))
    team[0].register_buffer("extra", torch.zeros(2))
    before = parameters_of(team)
    optimizer.steps_in_round = 1
    with pytest.raises(RuntimeError, match="buffer 'extra' of worker 1 is missing or shaped unlike"):
        optimizer.sync()
    assert torch.equal(before, parameters_of(team))


def test_averaging_is_exact_under_autocast():
    outcomes = []
    for enabled in (False, True):
        optimizer, team = make(SlowMo, workers=4, interval=100)
        run(optimizer, team, 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.sync()
        outcomes.append(parameters_of(team))
    assert torch.equal(*outcomes)


def test_bfloat16_workers_do_not_lose_progress_smaller_than_their_precision():
    # One of four workers gains one unit in the last place a round: a quarter of it a round must add up.
    team = Workers(nn.Linear(1, 1, bias=False).bfloat16(), 4)
    with torch.no_grad():
        team.rows.blocks[0].rows.fill_(1.0)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=0.1), team, 1, slow_momentum=0.0)
    for _ in range(40):
        ulp = 2.0**-7
        team[0].weight.grad = torch.full((1, 1), -ulp / 0.1, dtype=torch.bfloat16)
        optimizer.step()
    # The gradient is rounded to 8 bits too: half a percent.
    assert optimizer.state_dict()["fastlocal"]["outer"][0]["anchor"][0].item() == pytest.approx(
        1 + 40 * 2**-7 / 4, abs=0.005
    )


def test_a_parameter_that_was_replaced_is_found_at_the_next_sync():
    optimizer, team = make(interval=1)
    team[1].load_state_dict(copy.deepcopy(team[1].state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"'0.weight' of worker 1 was replaced by another one"):
        run(optimizer, team, 1)


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


@pytest.mark.parametrize(
    ("dtype", "weights", "values", "mean"),
    [
        (torch.float32, [1e39, 2e39, 5e39], [8.0, 16.0, -8.0], 0.0),  # (8 + 2 · 16 - 5 · 8) / 8
        (torch.float64, [1.0, 3.0], [0.0, 1.0], 0.75),
    ],
    ids=["beyond float32", "whole numbers of float64"],
)
def test_weights_weigh_the_workers(dtype, weights, values, mean):
    team = Workers(nn.Linear(1, 1, bias=False, dtype=dtype), len(weights))
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 1, weights=weights)
    for _ in range(2):
        for model, value in zip(team, values, strict=True):
            if optimizer.stats.rounds:  # before the first step worker 0's count for all
                model.weight.data.fill_(value)
            model.weight.grad = torch.zeros(1, 1, dtype=dtype)
        optimizer.step()
    assert [model.weight.item() for model in team] == [mean] * len(weights)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0, 1e50], [1e-50, 1.0]])
def test_a_worker_counts_whatever_the_weight_of_one_that_is_left_out(weights, wire_dtype):
    optimizer, team = make(LocalSGD, workers=2, interval=100, weights=weights, wire_dtype=wire_dtype)
    run(optimizer, team, 2)
    kept = parameters_of(team[0])
    poison(team[1])
    optimizer.sync()
    torch.testing.assert_close(parameters_of(team[1]), kept, rtol=0, atol=5e-3 if wire_dtype else 0)
    assert optimizer.stats.excluded == 1


def test_a_backward_pass_whose_parameters_a_sync_has_changed_meanwhile_is_an_error():
    team = Workers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 5)
    for model in team:
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    loss = team[1](torch.ones(1, 2)).sum()
    optimizer.sync()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
def test_with_a_bfloat16_wire_the_outer_step_is_taken_from_the_rounded_progress(kind):
    optimizer, team = make(kind, workers=3, interval=100, wire_dtype=torch.bfloat16, weights=[1.0, 2.0, 1.0])
    start = parameters_of(team[0]).double()
    run(optimizer, team, 4)
    sent = [(parameters_of(team[k]).double() - start).bfloat16().double() for k in range(3)]
    progress = ((sent[0] + 2 * sent[1] + sent[2]) / 2).bfloat16().double() / 2
    optimizer.sync()
    step = {LocalSGD: 1.0, SlowMo: 1.0, DiLoCo: 0.7 * 1.9}[kind]  # the first round's momentum is its progress
    for k in range(3):
        torch.testing.assert_close(parameters_of(team[k]).double(), start + step * progress, rtol=0, atol=3e-7)


def test_a_bfloat16_wire_halves_the_bytes_of_the_parameters_alone():
    optimizer, team = make(LocalSGD, interval=4, buffers="keep", wire_dtype=torch.bfloat16, warmup_steps=1)
    run(optimizer, team, 9)
    payload = sum(p.numel() * 4 for p in team[0].parameters())
    assert optimizer.stats.bytes_on_wire == 4 * payload // 3 + 2 * (4 * (payload // 2) // 3)
    assert optimizer.stats.bytes_synchronous == 9 * (4 * payload // 3)


def test_a_lone_worker_sends_nothing_so_nothing_of_it_is_rounded():
    results = []
    for wire_dtype in (None, torch.bfloat16):
        optimizer, team = make(DiLoCo, workers=1, interval=2, wire_dtype=wire_dtype)
        run(optimizer, team, 5)
        results.append(parameters_of(team))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_with_a_bfloat16_wire_a_bad_worker_is_healed_and_if_all_are_nothing_is_written(kind):
    optimizer, team = make(kind, workers=3, interval=100, wire_dtype=torch.bfloat16)
    run(optimizer, team, 3)
    poison(team[1])
    optimizer.sync()
    assert optimizer.stats.excluded == 1
    assert parameters_of(team).isfinite().all()
    run(optimizer, team, 3, first=3)
    for model in team:
        poison(model)
    before, state = parameters_of(team), copy.deepcopy(optimizer.state_dict()["fastlocal"]["outer"])
    with pytest.raises(RuntimeError, match="no worker's parameters are finite"):
        optimizer.sync()
    assert torch.equal(parameters_of(team).nan_to_num(7), before.nan_to_num(7))
    torch.testing.assert_close(optimizer.state_dict()["fastlocal"]["outer"], state, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_with_a_bfloat16_wire_a_run_that_is_resumed_or_copied_in_a_round_ends_the_same(kind):
    whole, team = make(kind, interval=3, wire_dtype=torch.bfloat16)
    run(whole, team, 10)
    first, halves = make(kind, interval=3, wire_dtype=torch.bfloat16)
    run(first, halves, 5)
    saved = copy.deepcopy((halves.state_dict(), first.state_dict()))
    copied, twins = copy.deepcopy((first, halves))
    assert copied.wire_dtype == torch.bfloat16
    run(copied, twins, 5, first=5)
    assert torch.equal(parameters_of(twins), parameters_of(team))
    second, again = make(kind, interval=3, wire_dtype=torch.bfloat16)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    run(second, again, 5, first=5)
    assert torch.equal(parameters_of(again), parameters_of(team))


def test_a_wire_dtype_that_loses_small_steps_is_refused():
    with pytest.raises(ValueError, match=r"wire_dtype must be None or torch.bfloat16, got torch.float16"):
        make(LocalSGD, wire_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"wire_dtype must be None or torch.bfloat16, got 'bfloat16'"):
        make(LocalSGD, wire_dtype="bfloat16")


def test_a_state_without_an_anchor_does_not_fit_a_bfloat16_wire():
    plain, _ = make(LocalSGD)
    sending, _ = make(LocalSGD, wire_dtype=torch.bfloat16)
    for optimizer, other in ((plain, sending), (sending, plain)):
        with pytest.raises(ValueError, match="state_dict was saved with another wire_dtype"):
            optimizer.load_state_dict(other.state_dict())


def test_a_sync_after_warmup_steps_merges_the_buffers():
    team = Workers(nn.BatchNorm1d(2), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 5, warmup_steps=9)
    for worker, value in zip(team, (1.0, 3.0), strict=True):
        worker(torch.tensor([[value, value], [value, value]])).sum().backward()
    optimizer.step()
    assert team[0].running_mean.tolist() == pytest.approx([0.1, 0.1])
    sent = optimizer.stats.bytes_on_wire
    for _ in range(2):
        optimizer.sync()
        for worker in team:
            assert worker.running_mean.tolist() == pytest.approx([0.2, 0.2])
        assert optimizer.stats.bytes_on_wire == sent + 4 * 4 + 8  # two float32 vectors and a count, 2 · 1/2 times


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


def test_a_policy_is_asked_once_a_round_even_if_the_first_step_fails():
    class Counting(FixedInterval):
        asked = 0

        def next_interval(self, stats):
            self.asked += 1
            return 2

    policy = Counting(2)
    optimizer, team = make(interval=policy)

    def fail():
        raise KeyError("data")

    for _ in range(3):
        with pytest.raises(KeyError):
            optimizer.step(fail)
    run(optimizer, team, 2)
    assert policy.asked == 1


def test_a_tensor_rate_is_the_one_of_the_steps_even_if_it_changes_before_the_sync():
    outcomes = []
    for rate in (0.1, torch.tensor(0.1)):
        torch.manual_seed(0)
        team = Workers(nn.Linear(2, 2), 2)
        optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=rate), team, 2, slow_momentum=0.5)
        for step in range(3):
            for worker in team:
                worker(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            if step == 2:
                if isinstance(rate, torch.Tensor):
                    rate.fill_(0.01)
                else:
                    optimizer.param_groups[0]["lr"] = 0.01
                optimizer.sync()
        outcomes.append(parameters_of(team))
    torch.testing.assert_close(*outcomes)


def with_buffer(buffer, workers=2, **options):
    model = nn.Linear(2, 1)
    model.register_buffer("extra", buffer)
    team = Workers(model, workers)
    return LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1, **options), team


def step_with(optimizer, team):
    for model in team:
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("choice", ["average", "broadcast", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_buffer_that_is_one_number_is_merged_as_any_other(dtype, choice):
    optimizer, team = with_buffer(torch.tensor(1.0, dtype=dtype), buffers=choice)
    team[1].extra.fill_(2.0)
    assert team.mean().extra == 1.5
    step_with(optimizer, team)
    assert [worker.extra.item().real for worker in team] == {
        "average": [1.5, 1.5], "broadcast": [1.0, 1.0], "keep": [1.0, 2.0]
    }[choice]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int8, torch.bool])
def test_the_largest_of_whole_numbers_is_kept(dtype):
    optimizer, team = with_buffer(torch.tensor([1, 0]).to(dtype))
    team[1].extra.copy_(torch.tensor([0, 1]))
    step_with(optimizer, team)
    assert [worker.extra.tolist() for worker in team] == [[1, 1]] * 2


ODD_BUFFERS = pytest.mark.parametrize(
    ("buffer", "reason"),
    [
        (torch.eye(3).to_sparse(), "has the layout torch.sparse_coo"),
        (torch.zeros(3, dtype=torch.uint64), "has the dtype torch.uint64"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "has the dtype torch.float8_e4m3fn"),
        (torch.ones(1, 4).expand(3, 4), "is expanded: several of its elements share one place in memory"),
    ],
    ids=["sparse", "uint64", "float8", "expanded"],
)


@ODD_BUFFERS
@pytest.mark.parametrize("choice", ["average", "broadcast"])
def test_a_buffer_that_cannot_be_merged_is_named_before_anything_is_written(buffer, reason, choice):
    optimizer, team = with_buffer(buffer, buffers=choice)
    start = [p.detach().clone() for p in team.parameters()]
    with pytest.raises(RuntimeError, match=f"buffer 'extra' {reason}: pass buffers='keep'"):
        step_with(optimizer, team)
    assert optimizer.stats.rounds == 0
    assert optimizer.steps_in_round == 1
    for parameter, before in zip(team.parameters(), start, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter, before - 0.1 * parameter.grad)  # the local step alone


@ODD_BUFFERS
def test_a_buffer_that_cannot_be_merged_may_be_kept_or_belong_to_a_lone_worker(buffer, reason):
    for workers, choice in ((2, "keep"), (1, "average")):
        optimizer, team = with_buffer(buffer, workers, buffers=choice)
        with torch.no_grad():
            team[workers - 1].weight[0, 0] = torch.nan if workers > 1 else 1.0
        step_with(optimizer, team)
        assert optimizer.stats.rounds == 1
        assert team.mean().extra.dtype == buffer.dtype


def test_slow_rate_and_momentum_may_be_set_and_a_copy_goes_on_alike():
    optimizer, team = make(SlowMo, interval=2)
    expected, other = make(SlowMo, interval=2, slow_lr=0.5, slow_momentum=0.25)
    optimizer.slow_lr, optimizer.slow_momentum = 0.5, np.float32(0.25)
    run(optimizer, team, 4)
    run(expected, other, 4)
    assert torch.equal(parameters_of(team), parameters_of(other))
    copied = copy.deepcopy(optimizer)
    assert (copied.slow_lr, copied.slow_momentum) == (0.5, 0.25)
    for name, value, error in (
        ("slow_lr", 0.0, ValueError), ("slow_lr", math.inf, ValueError), ("slow_lr", True, TypeError),
        ("slow_momentum", 1.0, ValueError), ("slow_momentum", "0.5", TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=f"{name} must be"):
            setattr(optimizer, name, value)
        with pytest.raises(error, match=f"{name} must be"):
            make(SlowMo, **{name: value})
    assert (optimizer.slow_lr, optimizer.slow_momentum) == (0.5, 0.25)


def test_a_subclass_may_set_options_before_it_is_put_together():
    class Mine(SlowMo):
        def __init__(self, *arguments, **options):
            self.slow_lr = 0.5
            super().__init__(*arguments, **options)

    optimizer, _ = make(Mine, slow_lr=0.25)
    assert optimizer.slow_lr == 0.25


def test_the_policy_may_be_set_to_an_interval_and_other_choices_not_at_all():
    optimizer, team = make(LocalSGD, interval=2)
    run(optimizer, team, 2)
    optimizer.policy = 3
    run(optimizer, team, 2)
    assert optimizer.stats.interval == 3
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        optimizer.policy = 0
    choices = {"inner_state": "reset", "buffers": "keep", "impl": "reference", "wire_dtype": None, "timeout": 3.0}
    for name, value in choices.items():
        with pytest.raises(AttributeError, match=f"{name} was chosen when the optimizer was built"):
            setattr(optimizer, name, value)
    with pytest.raises(AttributeError, match="interval was chosen .* cannot be set: set policy"):
        optimizer.interval = 7


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


def test_a_state_that_the_inner_optimizer_cannot_take_leaves_everything_as_it_was():
    def build(inner_class, **options):
        torch.manual_seed(0)
        team = Workers(nn.Linear(2, 1), 2)
        return LocalSGD(inner_class(team.parameters(), lr=0.1, **options), team, 1), team

    saved, other = build(torch.optim.SGD)
    step_with(saved, other)
    optimizer, team = build(torch.optim.AdamW)
    expected, beside = build(torch.optim.AdamW)
    for _ in range(2):
        step_with(optimizer, team)
        step_with(expected, beside)

        def refuse(_inner, _state):
            raise RuntimeError("not this one")

        hook = optimizer.inner.register_load_state_dict_pre_hook(refuse)
        with pytest.raises(ValueError, match="does not fit the policy or the inner optimizer: RuntimeError"):
            optimizer.load_state_dict(expected.state_dict())
        hook.remove()
    with pytest.raises(ValueError, match="its param_groups have dampening, momentum, nesterov, but not .*betas"):
        optimizer.load_state_dict(saved.state_dict())
    step_with(optimizer, team)
    step_with(expected, beside)
    assert torch.equal(parameters_of(team), parameters_of(beside))


def test_a_group_saved_before_there_was_an_option_takes_the_present_one():
    class Younger(torch.optim.SGD):
        def __init__(self, params, lr, extra=1.0):
            super().__init__(params, lr)
            self.defaults["extra"] = extra
            for group in self.param_groups:
                group["extra"] = extra

    team = Workers(nn.Linear(2, 1), 2)
    older = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.3), team, 1)
    torch.optim.lr_scheduler.ConstantLR(older, 0.5)
    younger = LocalSGD(Younger(team.parameters(), 0.1, extra=2.0), team, 1)
    younger.load_state_dict(older.state_dict())
    assert younger.param_groups[0]["extra"] == 2.0
    assert younger.param_groups[0]["lr"] == pytest.approx(0.15)
