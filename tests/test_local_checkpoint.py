"""What is saved, loaded, copied and pickled goes on as if nothing had been."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from local_runs import inner_of, make, network, parameters_of, run, step_with
from torch import nn
from torch.nn.utils import prune

from fastlocal import LAMB, AdaComm, DiLoCo, FixedInterval, LocalSGD, SlowMo, ValidationLoss, Workers


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
    for younger in ("slow_lr", "slow_momentum", "resting", "buffers_apart", "rows"):
        del old["fastlocal"][younger]
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


def test_workers_written_to_past_autograd_stay_apart_until_the_sync_of_a_round_that_is_resumed():
    first, team = make(LocalSGD, workers=2, interval=4)
    run(first, team, 2)
    second, other = make(LocalSGD, workers=2, interval=4, seed=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for ours, theirs in zip(other.parameters(), team.parameters(), strict=True):
        ours.data.copy_(theirs)
    first.sync()
    second.sync()
    assert torch.equal(parameters_of(other), parameters_of(team))


def test_a_copy_made_in_a_round_knows_the_rates_of_the_steps_before_it():
    optimizer, team = make(SlowMo, interval=4)
    run(optimizer, team, 2)
    for group in optimizer.param_groups:
        group["lr"] /= 16
    twin = copy.deepcopy(optimizer)
    run(optimizer, team, 6, first=2)
    run(twin, twin.rows.modules, 6, first=2)
    assert torch.equal(parameters_of(team[0]), parameters_of(twin.rows.modules[0]))


def test_an_old_state_of_the_last_step_of_the_warmup_leaves_its_buffers_to_be_merged():
    first, team = make(LocalSGD, workers=2, warmup_steps=2)
    run(first, team, 2)
    state = copy.deepcopy(first.state_dict())
    del state["fastlocal"]["buffers_apart"]
    second, other = make(LocalSGD, workers=2, warmup_steps=2)
    other.load_state_dict(team.state_dict())
    second.load_state_dict(state)
    assert not torch.equal(other[0][1].running_mean, other[1][1].running_mean)
    second.sync()
    assert torch.equal(other[0][1].running_mean, other[1][1].running_mean)


@pytest.mark.parametrize("loaded", range(2))
def test_outer_steps_count_from_a_loaded_model_that_differs_in_one_dtype_alone(loaded):
    def build():
        dtypes = torch.float32, torch.float64
        team = Workers(nn.ParameterList([torch.zeros(1, dtype=dtype) for dtype in dtypes]), 2)
        return SlowMo(torch.optim.SGD(team.parameters(), lr=0.5), team, 1), team

    def stand_still(optimizer, team):
        for parameter in team.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    first, team = build()
    stand_still(first, team)
    second, team = build()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for worker in team:
            worker[loaded].fill_(5.0)
    for _ in range(3):
        stand_still(second, team)
    assert [parameter.item() for parameter in team[1].parameters()] == [5.0 * (index == loaded) for index in range(2)]


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


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS, LAMB])
def test_training_goes_on_from_one_state_in_memory_again_and_again(inner):
    options = {"momentum": 0.9} if inner is torch.optim.SGD else {}
    team = Workers(nn.Linear(2, 1), 1)
    optimizer = SlowMo(inner(team.parameters(), lr=0.1, **options), team, 2)

    def step():
        def closure():
            optimizer.zero_grad()
            loss = team[0](torch.tensor([[1.0, 2.0]])).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    for _ in range(3):
        step()
    model, state = copy.deepcopy(team.state_dict()), optimizer.state_dict()
    saved = copy.deepcopy(state)
    ends = []
    for _ in range(3):
        team.load_state_dict(model)
        optimizer.load_state_dict(saved)
        for _ in range(3):
            step()
        ends.append(parameters_of(team))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("workers", [2, 3])
def test_parameters_restored_through_data_before_the_wrapper_is_built_go_on_in_their_round(workers):
    optimizer, team = make(SlowMo, workers, interval=4)
    run(optimizer, team, 2)
    with torch.no_grad():
        for number, parameter in enumerate(team.parameters()):
            parameter.add_(number / 1000)  # every worker has its own
    saved, state = [p.detach().clone() for p in team.parameters()], copy.deepcopy(optimizer.state_dict())
    buffers = [copy.deepcopy(dict(worker.named_buffers())) for worker in team]
    run(optimizer, team, 4, first=2)
    other = Workers(network(), workers)
    for parameter, value in zip(other.parameters(), saved, strict=True):
        parameter.data.copy_(value)
    for worker, own in zip(other, buffers, strict=True):
        for name, value in own.items():
            worker.get_buffer(name).copy_(value)
    resumed = SlowMo(inner_of(other, "sgd"), other, 4)
    resumed.load_state_dict(state)
    run(resumed, other, 4, first=2)
    assert torch.equal(parameters_of(team), parameters_of(other))


class Accumulates(torch.optim.SGD):
    """Keeps a count and a tensor beside the state of the parameters, as some optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)
        self.state["total"] = 0
        self.state["k"] = torch.zeros(1)


def test_an_inner_state_that_is_not_of_a_parameter_can_be_loaded():
    team = Workers(nn.Linear(2, 1), 1)
    optimizer = LocalSGD(Accumulates(team.parameters(), lr=0.1), team, 2)
    step_with(optimizer, team)
    optimizer.state["k"] += 3
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.state["k"] += 4
    assert state["state"]["k"].item() == 3


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


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("steps_in_round", True),
        ("anchored", 1),
        ("rates", ["0.05"]),
        ("outer", []),
        ("outer", [{"anchor": torch.zeros(3), "momentum_buffer": torch.zeros(3), "last_rates": [0.0]}]),
        ("of another version", 1),
    ],
    ids=["no number", "no flag", "no rates", "no outer state", "another shape", "another entry"],
)
def test_an_entry_that_cannot_stand_where_it_stands_is_named_before_anything_is_taken(entry, value):
    optimizer, team = make(SlowMo)
    run(optimizer, team, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["fastlocal"][entry] = value
    state["fastlocal"]["stats"]["local_steps"] = 7
    with pytest.raises(ValueError, match=entry):
        optimizer.load_state_dict(state)
    assert optimizer.stats.local_steps == 3


@pytest.mark.parametrize("error", [ValueError, AssertionError, ZeroDivisionError])
def test_a_policy_that_cannot_take_a_state_back_keeps_its_own_and_the_error_says_why(error):
    class Picky(FixedInterval):
        limit = 5

        def state_dict(self):
            return {"limit": self.limit}

        def load_state_dict(self, state_dict):
            self.limit = state_dict["limit"]
            if self.limit > 10:
                raise error("limit must be at most 10")

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


@pytest.mark.parametrize("model", [nn.Linear(100, 10), nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)])
def test_a_workers_state_is_saved_without_the_other_workers(model):
    sizes = []
    for saved in (copy.deepcopy(model).state_dict(), Workers(model, 8)[3].state_dict()):
        for write in (torch.save, pickle.dump):
            file = io.BytesIO()
            write(saved, file)
            sizes.append(file.tell())
    assert sizes[2:] == sizes[:2]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_with_a_low_precision_wire_a_run_that_is_resumed_or_copied_in_a_round_ends_the_same(kind, dtype):
    whole, team = make(kind, interval=3, wire_dtype=dtype)
    run(whole, team, 10)
    first, halves = make(kind, interval=3, wire_dtype=dtype)
    run(first, halves, 5)
    saved = copy.deepcopy((halves.state_dict(), first.state_dict()))
    copied, twins = copy.deepcopy((first, halves))
    assert copied.wire_dtype == dtype
    run(copied, twins, 5, first=5)
    assert torch.equal(parameters_of(twins), parameters_of(team))
    second, again = make(kind, interval=3, wire_dtype=dtype)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    run(second, again, 5, first=5)
    assert torch.equal(parameters_of(again), parameters_of(team))


def test_a_state_without_an_anchor_does_not_fit_a_bfloat16_wire():
    plain, _ = make(LocalSGD)
    sending, _ = make(LocalSGD, wire_dtype=torch.bfloat16)
    for optimizer, other in ((plain, sending), (sending, plain)):
        with pytest.raises(
            ValueError, match=r"state_dict was saved with(out)? a wire_dtype, this optimizer has (None|torch.b)"
        ):
            optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_a_run_may_go_on_with_another_low_precision_even_in_a_round(kind):
    first, team = make(kind, interval=3, wire_dtype=torch.bfloat16)
    run(first, team, 5)
    second, again = make(kind, interval=3, wire_dtype=torch.float8_e4m3fn)
    again.load_state_dict(team.state_dict())
    second.load_state_dict(first.state_dict())
    for optimizer, workers in ((first, team), (second, again)):
        run(optimizer, workers, 1, first=5)
    torch.testing.assert_close(parameters_of(again), parameters_of(team), rtol=0, atol=2e-2)
    assert not torch.equal(parameters_of(again), parameters_of(team))


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


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_all_workers_rolled_back_go_on_bit_by_bit_in_a_round_too(kind, steps):
    optimizer, team = make(kind)
    run(optimizer, team, steps)
    saved = copy.deepcopy((team.state_dict(), optimizer.state_dict()))
    run(optimizer, team, 7, first=steps)
    expected = parameters_of(team)
    for model_first in (True, False):
        if model_first:
            team.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        if not model_first:
            team.load_state_dict(saved[0])
        run(optimizer, team, 7, first=steps)
        assert torch.equal(parameters_of(team), expected)


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("loaded", ["worker 0", "all workers"])
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("kind", "momentum"), [(LocalSGD, 0.0), (SlowMo, 0.25 + 0.125), (DiLoCo, 0.7 * 0.9 * (0.45 + 0.405))]
)
def test_outer_steps_count_from_the_model_that_is_loaded_beside_a_state(
    kind, momentum, wire_dtype, loaded, saved_again
):
    def step(optimizer, team, grad):
        for parameter in team.parameters():
            parameter.grad = torch.full_like(parameter, grad)
        optimizer.step()

    def build():
        team = Workers(nn.Linear(1, 1, bias=False, dtype=torch.float64), 2)
        inner = torch.optim.SGD(team.parameters(), lr=0.5)
        return kind(inner, team, 1, wire_dtype=wire_dtype), team

    first, team = build()
    step(first, team, 1.0)  # Δ = 0.5, in every precision; v = 0.5
    optimizer, team = build()
    optimizer.load_state_dict(first.state_dict())
    for worker in [team[0]] if loaded == "worker 0" else team:
        nn.init.constant_(worker.weight, 10.3)
    if saved_again:
        optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(2):  # Δ = 0: momentum alone moves them, v = 0.25 and 0.125, or 0.45 and 0.405
        step(optimizer, team, 0.0)
    for worker in team:
        assert worker.weight.item() == pytest.approx(10.3 - momentum, abs=1e-12)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("written", ["in place", "by .data", "in a round"])
def test_a_state_loaded_again_and_a_second_optimizer_leave_workers_that_were_made_to_differ(written, workers):
    first, team = make(LocalSGD, workers=workers)
    run(first, team, 7 if written == "in a round" else 4)
    with torch.no_grad():
        for number, worker in enumerate(team):
            value = worker[4].bias.data if written == "by .data" else worker[4].bias
            if written != "in a round":
                value.fill_(number)
    before = parameters_of(team)
    first.load_state_dict(first.state_dict())
    assert torch.equal(parameters_of(team), before)
    second = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 4)
    run(second, team, 1)
    assert torch.equal(parameters_of(team), before)


def test_a_state_of_a_rounds_end_leaves_what_another_optimizer_has_stepped_in_its_round():
    team = Workers(nn.Linear(2, 1), 2)
    weights, biases = (
        LocalSGD(torch.optim.SGD([p for p in team.parameters() if p.dim() == dim], lr=0.1), team, interval)
        for dim, interval in ((2, 1), (1, 5))
    )
    for _ in range(3):
        for number, worker in enumerate(team):
            worker(torch.full((1, 2), 1.0 + number)).sum().backward()
        for optimizer in (weights, biases):
            optimizer.step()
    with torch.no_grad():
        team[1].bias.fill_(7.0)
    before = [worker.bias.item() for worker in team]
    weights.load_state_dict(weights.state_dict())
    assert [worker.bias.item() for worker in team] == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda team: pickle.loads(pickle.dumps(team))])
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_model_loaded_into_worker_0_of_a_copy_is_where_all_begin(duplicate, loaded):
    torch.manual_seed(0)
    team, other = Workers(nn.Linear(2, 1), 2), nn.Linear(2, 1)
    if loaded == "before":
        team[0].load_state_dict(other.state_dict())
    team = duplicate(team)
    if loaded == "after":
        team[0].load_state_dict(other.state_dict())
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 4)
    step_with(optimizer, team)
    for worker in team:
        assert torch.equal(worker.weight, other.weight)


def test_a_round_that_is_resumed_keeps_its_interval():
    optimizer, team = make(LocalSGD, interval=AdaComm(8))
    optimizer.observe(train_loss=4.0)
    run(optimizer, team, 2)
    optimizer.observe(train_loss=1.0)
    resumed, again = make(LocalSGD, interval=AdaComm(8))
    again.load_state_dict(team.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, again, 6, first=2)
    assert (resumed.stats.rounds, resumed.stats.round_steps) == (1, 8)


def test_what_hooks_of_the_state_return_takes_its_place():
    optimizer, _ = make()
    optimizer.register_state_dict_post_hook(lambda _, state: {"outside": state})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["outside"])
    saved = optimizer.state_dict()
    assert list(saved) == ["outside"]
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("saved_again", [False, True])
def test_a_resumed_run_keeps_the_digits_that_anchors_have_beyond_those_of_their_rows(saved_again):
    def build():
        team = Workers(nn.Linear(1, 1, bias=False).bfloat16(), 4)
        with torch.no_grad():
            for parameter in team.parameters():
                parameter.fill_(1.0)
        return SlowMo(torch.optim.SGD(team.parameters(), lr=0.125), team, 1, slow_momentum=0.0), team

    def step(optimizer, team):
        team[0].weight.grad = torch.full((1, 1), -(2.0**-4), dtype=torch.bfloat16)
        optimizer.step()
        return optimizer.state_dict()["fastlocal"]["outer"][0]["anchor"][0].item()

    def resume(optimizer, team):
        again, workers = build()
        workers.load_state_dict(copy.deepcopy(team.state_dict()))
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return again, workers

    # One of four workers gains a unit of the rows' last place, 2^-7, a round: the anchor gains a quarter of it.
    optimizer, team = build()
    assert step(optimizer, team) == 1 + 2**-9
    optimizer, team = resume(optimizer, team)
    for rounds in range(2, 9):
        assert step(optimizer, team) == 1 + rounds * 2**-9
        if saved_again:
            optimizer, team = resume(optimizer, team)


@pytest.mark.parametrize(("kind", "wire_dtype"), [(LocalSGD, torch.bfloat16), (SlowMo, None)])
def test_two_optimizers_of_one_model_that_are_resumed_at_a_rounds_end_end_the_same(kind, wire_dtype):
    def build():
        torch.manual_seed(0)
        team = Workers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), 2)
        wrapped = []
        for layer in (0, 1):
            inner = torch.optim.SGD([p for worker in team for p in worker[layer].parameters()], lr=0.1)
            wrapped.append(kind(inner, team, 2, wire_dtype=wire_dtype))
        return team, wrapped

    def train(team, wrapped, steps, first=0):
        for step in range(first, first + steps):
            for optimizer in wrapped:
                optimizer.zero_grad()
            for number, worker in enumerate(team):
                x = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + number))
                worker(x).square().mean().backward()
            for optimizer in wrapped:
                optimizer.step()

    team, wrapped = build()
    train(team, wrapped, 2)
    saved = copy.deepcopy((team.state_dict(), [optimizer.state_dict() for optimizer in wrapped]))
    train(team, wrapped, 3, first=2)
    again, resumed = build()
    again.load_state_dict(saved[0])
    for optimizer, state in zip(resumed, saved[1], strict=True):
        optimizer.load_state_dict(state)
    train(again, resumed, 3, first=2)
    assert torch.equal(parameters_of(again), parameters_of(team))
