"""The wrappers' rounds: what a sync leaves in the workers, and what is counted."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from local_runs import KeepsAverage, make, measured, parameters_of, poison, run
from torch import nn

from fastlocal import LAMB, LARS, DiLoCo, LocalSGD, SlowMo, Workers


def quadratic(team, step):
    """Every worker's gradient at a step."""
    for worker, model in enumerate(team):
        generator = torch.Generator().manual_seed(100 * step + worker)
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        (model(x) - x[:, :2]).square().mean().backward()


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
        quadratic(team, number)
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


@pytest.mark.parametrize("kind", [SlowMo, DiLoCo])
def test_a_layer_that_is_frozen_after_its_gradient_moves_in_the_step_as_torch_moves_it(kind):
    # As two networks, one behind the other, take turns: the second's losses come before the first's step.
    outcomes = []
    for freezes in (False, True):
        torch.manual_seed(0)
        team = Workers(nn.Linear(4, 2, dtype=torch.float64), 2)
        optimizer = kind(torch.optim.SGD(team.parameters(), lr=0.1), team, 2)
        for step in range(8):
            optimizer.zero_grad()
            quadratic(team, step)
            for model in team:
                model.requires_grad_(not freezes)
            optimizer.step()
            for model in team:
                model.requires_grad_(True)
        outcomes.append(parameters_of(team))
    assert torch.equal(*outcomes)


def test_a_layer_that_is_frozen_on_the_way_through_a_round_takes_its_outer_step_with_what_it_had_learned():
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=1.0), team, 3, slow_lr=0.5)
    for step in range(3):
        for model in team:
            model[0].requires_grad_(step == 0).grad = torch.ones(1) if step == 0 else None
            model[1].grad = torch.ones(1)
        optimizer.step()
    # Half of the way: of one step, and of three.
    assert [parameter.item() for parameter in team[1].parameters()] == [-0.5, -1.5]


def test_a_layer_that_may_train_and_has_no_gradient_in_a_round_goes_on_with_its_slow_momentum():
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=1.0), team, 1, slow_momentum=0.5)
    for round_number in range(2):
        for model in team:
            model[0].grad = torch.ones(1) if round_number == 0 else None
            model[1].grad = torch.ones(1)
        optimizer.step()
    assert [parameter.item() for parameter in team[1].parameters()] == [-(1 + 0.5), -(1 + 0.5 + 1)]


def test_a_layer_that_trains_within_the_closure_alone_takes_its_outer_step():
    # As a network that its loss thaws, and freezes again for the loss of another one.
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=1.0), team, 1, slow_lr=0.5)

    def closure():
        loss = 0.0
        for model in team:
            model[0].requires_grad_(True)
            own = model[0].sum() + model[1].sum()
            own.backward()
            model[0].requires_grad_(False)
            loss += own.item()
        return loss

    for model in team:
        model[0].requires_grad_(False)
    assert optimizer.step(closure) == 0.0
    assert [parameter.item() for parameter in team[1].parameters()] == [-0.5, -0.5]


def test_a_step_that_failed_and_is_taken_again_counts_its_rate_once():
    outcomes = []
    for failures in (0, 3):
        torch.manual_seed(0)
        team = Workers(nn.Linear(4, 2, dtype=torch.float64), 2)
        optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=0.1), team, 4)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

        def fail():
            raise MemoryError

        for step in range(12):
            for _ in range(failures):
                with pytest.raises(MemoryError):
                    optimizer.step(fail)
            optimizer.zero_grad()
            quadratic(team, step)
            optimizer.step()
            schedule.step()
        outcomes.append(parameters_of(team))
    assert torch.equal(*outcomes)


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


def test_drift_is_that_of_the_workers_that_count():
    team = Workers(nn.ParameterList([torch.zeros(1)]), 3)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, measured(1))
    for model, value in zip(team, (1.0, 5.0, torch.nan), strict=True):
        model[0].grad = torch.tensor([value])
    optimizer.step()
    assert optimizer.stats.drift == 2.0


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


def test_parameters_keep_storage_and_memory_format_over_a_sync():
    optimizer, team = make(interval=2)
    before = [(p.data_ptr(), p.stride()) for p in team.parameters()]
    assert team[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    run(optimizer, team, 5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [(p.data_ptr(), p.stride()) for p in team.parameters()] == before


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


def test_what_is_loaded_into_the_model_after_it_became_workers_is_where_all_begin():
    team = Workers(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 4)
    team[0].load_state_dict({name: torch.full_like(value, 10) for name, value in team[0].state_dict().items()})
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
    for parameter in team.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for model in team:
        assert all((value == 10).all() for value in model.state_dict().values())


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize(("kind", "warmup_steps"), [(LocalSGD, 0), (SlowMo, 0), (DiLoCo, 0), (SlowMo, 100)])
def test_resuming_with_the_model_in_worker_0_alone_is_resuming_with_it_in_all(kind, warmup_steps, model_first):
    def build(seed):
        return make(kind, workers=3, interval=4, seed=seed, buffers="broadcast", warmup_steps=warmup_steps)

    optimizer, team = build(0)
    run(optimizer, team, 8)
    optimizer.sync()
    (whole, all_loaded), (partly, one_loaded) = build(5), build(5)
    all_loaded.load_state_dict(team.state_dict())
    whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if not model_first:
        partly.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    one_loaded[0].load_state_dict(team[0].state_dict())
    if model_first:
        partly.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(6):
        for resumed in (all_loaded, one_loaded):
            for parameter in resumed.parameters():
                parameter.grad = torch.zeros_like(parameter)  # momentum moves them
        whole.step()
        partly.step()
        assert torch.equal(parameters_of(one_loaded), parameters_of(all_loaded))
    assert not torch.equal(parameters_of(all_loaded), parameters_of(team))
    for ours, theirs in zip(one_loaded, all_loaded, strict=True):
        assert all(map(torch.equal, ours.buffers(), theirs.buffers()))


def test_gradients_of_workers_that_begin_elsewhere_are_none_of_where_they_begin():
    torch.manual_seed(0)
    team = Workers(nn.Linear(4, 2, dtype=torch.float64), 3)
    team[0].load_state_dict({name: torch.zeros_like(value) for name, value in team[0].state_dict().items()})
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.3), team, 1)
    for model in team:
        model(torch.ones(1, 4, dtype=torch.float64)).square().sum().backward()  # 0 is the minimum
    optimizer.step()
    assert all((parameters_of(model) == 0).all() for model in team)


def test_workers_that_are_equal_but_for_nan_in_a_frozen_parameter_keep_their_gradients():
    model = nn.ParameterList([torch.zeros(1), torch.tensor([torch.nan])])
    model[1].requires_grad_(False)
    team = Workers(model, 2)
    optimizer = LocalSGD(torch.optim.SGD([worker[0] for worker in team], lr=1.0), team, 1)
    team[0][0].grad, team[1][0].grad = torch.tensor([1.0]), torch.tensor([3.0])
    optimizer.step()
    assert [worker[0].item() for worker in team] == [-2.0, -2.0]


@pytest.mark.parametrize("forward", ["a moving average", "a bounded norm"])
def test_weights_loaded_into_worker_0_before_the_wrapper_reach_all_though_a_forward_pass_writes_to_parameters(
    forward,
):
    bounded = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 1))
    model, batch = (KeepsAverage(), torch.ones(1, 2)) if forward == "a moving average" else (bounded, torch.arange(3))
    team = Workers(model, 3)
    model.load_state_dict({name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()})
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 9)
    for worker in team:
        worker(batch).sum().backward()
    optimizer.step()
    assert (torch.cat([p.flatten() for worker in team for p in worker.parameters()]) == 0.25).all()


def test_weights_loaded_into_worker_0_again_after_the_wrapper_was_built_reach_all():
    model = nn.Linear(2, 1, bias=False)
    team = Workers(model, 2)
    model.load_state_dict({"weight": torch.full((1, 2), 1.0)})
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 9)
    assert team[1].weight.tolist() == [[1.0, 1.0]]
    model.load_state_dict({"weight": torch.full((1, 2), 2.0)})
    for worker in team:
        worker(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert team[1].weight.tolist() == [[2.0, 2.0]]


def test_a_frozen_parameter_of_four_bits_is_given_to_all_workers():
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4")
    model = nn.Linear(2, 1)
    packed = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model.register_parameter("base", nn.Parameter(packed, requires_grad=False))
    team = Workers(model, 2)
    model.base.view(torch.uint8).fill_(0x35)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
    for worker in team:
        worker(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert team[1].base.view(torch.uint8).tolist() == [[0x35] * 2] * 2


def test_workers_written_to_past_autograd_keep_what_they_were_given():
    team = Workers(nn.Linear(1, 1), 3)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
    for worker, model in enumerate(team):
        for parameter in model.parameters():
            parameter.data.fill_(worker)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (parameters_of(team) == 1).all()


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
    torch.testing.assert_close(
        results[0][0], results[1][0], rtol=1e-6, atol=1e-6
    )  # not every release gives the same bits
    assert results[0][1] == results[1][1] == 2


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


def test_a_parameter_that_was_replaced_before_the_first_step_is_found_before_anything_is_stepped():
    optimizer, team = make(interval=5)
    team[1].load_state_dict(copy.deepcopy(team[1].state_dict()), assign=True)
    before = parameters_of(team)
    with pytest.raises(RuntimeError, match=r"'0.weight' of worker 1 was replaced by another one"):
        run(optimizer, team, 1)
    assert torch.equal(parameters_of(team), before)


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


def test_a_subclass_may_set_options_before_it_is_put_together():
    class Mine(SlowMo):
        def __init__(self, *arguments, **options):
            self.slow_lr = 0.5
            super().__init__(*arguments, **options)

    optimizer, _ = make(Mine, slow_lr=0.25)
    assert optimizer.slow_lr == 0.25


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_weights_that_float32_does_not_hold_weigh_float64_rows_with_all_their_digits(kind):
    weights, values = (0.1, 0.3, 0.7), (1.0, -2.0, 5.0)
    model = nn.ParameterList([torch.zeros(3, dtype=torch.float64), torch.zeros(2)])
    team = Workers(model, 3)
    options = {"slow_momentum": 0.0} if kind is SlowMo else {}
    inner = torch.optim.SGD(team.parameters(), lr=1.0)
    optimizer = kind(inner, team, measured(1), weights=weights, **options)
    for worker, value in zip(team, values, strict=True):
        for parameter in worker.parameters():
            parameter.grad = torch.full_like(parameter, -value)
    optimizer.step()
    exact = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    for worker in team:
        assert worker[0].tolist() == pytest.approx([exact] * 3, rel=1e-15)
        assert worker[1].tolist() == pytest.approx([exact] * 2, rel=3e-7)
    drifts = [math.sqrt(5) * abs(value - exact) for value in values]
    assert optimizer.stats.drift == pytest.approx(sum(drifts) / 3, rel=1e-6)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_parameters_of_other_rates_take_their_own_part_of_the_mean_and_all_make_the_drift(wire_dtype):
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    groups = [{"params": [model[index] for model in team]} for index in (0, 1)]
    optimizer = SlowMo(torch.optim.SGD(groups, lr=1.0), team, measured(1), wire_dtype=wire_dtype)
    for rates in ((1.0, 1.0), (1.0, 0.5)):
        for index, (rate, moves) in enumerate(zip(rates, ((1.0, 3.0), (2.0, 6.0)), strict=True)):
            optimizer.param_groups[index]["lr"] = rate
            for model, move in zip(team, moves, strict=True):
                model[index].grad = torch.tensor([-move / rate])
        optimizer.step()
    # Means of 2 and 4 a round; what is kept of the first round's is 0.5 of it, and 0.5 * 0.5 where the rate fell.
    assert [parameter.item() for parameter in team[1].parameters()] == [2 + 2 + 1, 4 + 4 + 1]
    assert optimizer.stats.drift == pytest.approx(math.sqrt(1 + 4))


def test_a_round_cut_short_counts_its_own_steps_and_adds_its_seconds():
    optimizer, team = make(LocalSGD, interval=4)
    optimizer.stats.seconds_in_sync = 1000.0
    run(optimizer, team, 3)
    optimizer.sync()
    assert optimizer.stats.seconds_in_sync > 1000
    assert optimizer.stats.round_steps == 3


def test_a_group_added_in_a_round_steps_at_its_own_rate():
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    optimizer = SlowMo(torch.optim.SGD([model[0] for model in team], lr=1.0), team, 2)
    for step in range(2):
        for parameter in team.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if step == 0:
            optimizer.add_param_group({"params": [model[1] for model in team], "lr": 0.5})
    assert [parameter.item() for parameter in team[1].parameters()] == [-2.0, -0.5]


def test_a_group_added_in_a_round_has_the_mean_rate_of_its_own_steps():
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    optimizer = SlowMo(torch.optim.SGD([model[0] for model in team], lr=1.0), team, 100, slow_momentum=0.5)

    def step():
        for parameter in team.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    optimizer.add_param_group({"params": [model[1] for model in team], "lr": 0.5})
    step()
    step()
    optimizer.param_groups[1]["lr"] = 0.25  # of the next round
    optimizer.sync()
    step()
    step()
    optimizer.sync()
    # Three steps of 1 and two of 0.5, then two of 1 and two of 0.25; half of the first round's momentum, and half of
    # that where the rate is half as large.
    assert [parameter.item() for parameter in team[1].parameters()] == [-(3 + 2 + 1.5), -(1 + 0.5 + 0.25)]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_group_added_in_a_round_has_the_mean_of_rates_that_change_in_its_own_steps(resumed):
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    optimizer = SlowMo(torch.optim.SGD([model[0] for model in team], lr=1.0), team, 100, slow_momentum=0.5)

    def step(rate):
        optimizer.param_groups[-1]["lr"] = rate
        for parameter in team.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    for _ in range(8):
        step(1.0)
    optimizer.add_param_group({"params": [model[1] for model in team], "lr": 1.0})
    step(1.0)
    if resumed:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        team, optimizer = copy.deepcopy((team, optimizer))
    step(0.5)
    optimizer.sync()
    before = team[0][1].item()
    step(0.75)  # as the mean of 1 and 0.5 was
    optimizer.sync()
    assert before - team[0][1].item() == pytest.approx(0.5 * 1.5 + 0.75)


@pytest.mark.parametrize("moves", [0, 1])
def test_a_parameter_that_moves_in_any_worker_takes_the_outer_step(moves):
    team = Workers(nn.ParameterList([torch.zeros(1), torch.zeros(1)]), 2)
    team[1 - moves][0].requires_grad_(False)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=1.0), team, 1, slow_lr=0.5)
    for model in team:
        model[1].grad = torch.ones(1)
    team[moves][0].grad = torch.ones(1)
    optimizer.step()
    # Half of the way to the mean: of -1 and 0, and of -1 and -1.
    assert [[parameter.item() for parameter in model.parameters()] for model in team] == [[-0.25, -0.5]] * 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LARS, {"dampening": 0.5}),
        (LARS, {"norm": "joint", "momentum_form": "lr_in_buffer"}),
        (LAMB, {}),
        (LAMB, {"decay": "l2"}),
    ],
    ids=str,
)
def test_each_worker_has_the_trust_ratios_of_a_model_alone(kind, options):
    torch.manual_seed(0)
    team = Workers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), 3)
    alone = [copy.deepcopy(worker) for worker in team]
    settings = {"lr": 0.1, "weight_decay": 0.1, **options}
    optimizer = LocalSGD(kind(team.parameters(), **settings), team, 100)
    each = [kind(model.parameters(), **settings) for model in alone]
    for _ in range(4):
        for size, models in enumerate(zip(team, alone, strict=True), start=1):
            x = size * torch.randn(5, 3)
            for model in models:
                model.zero_grad()
                model(x).square().sum().backward()
        optimizer.step()
        for own in each:
            own.step()
    for worker, model in zip(team, alone, strict=True):
        torch.testing.assert_close(parameters_of(worker), parameters_of(model), rtol=0, atol=0)
    assert not torch.equal(parameters_of(team[0]), parameters_of(team[1]))


def test_a_wrapper_shows_its_workers_its_interval_and_the_inner_optimizer():
    optimizer, team = make(SlowMo, interval=3)
    run(optimizer, team, 1)
    assert repr(optimizer).startswith(f"SlowMo({len(team)} workers, interval 3, SGD (\n")
