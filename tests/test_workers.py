"""Copies of a model in one process: their mean, their state, and what is refused."""

import copy
import threading

import pytest
import torch
from torch import nn

from fastlocal import Workers
from fastlocal.flat import Rows


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))


def test_values_and_forward_are_those_of_the_model():
    model = make_model()
    x = torch.randn(2, 3, 3, 3)
    expected, before = model(x), [p.detach().clone() for p in model.parameters()]
    team = Workers(model, 3)
    assert team[0] is model
    for worker in team:
        assert torch.equal(worker(x), expected)
        for parameter, old in zip(worker.parameters(), before, strict=True):
            assert torch.equal(parameter, old)


def test_mean_is_a_model_of_its_own_with_averaged_parameters_and_buffers():
    team = Workers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2)
    with torch.no_grad():
        for worker, value in zip(team, (1.0, 4.0), strict=True):
            for parameter in worker.parameters():
                parameter.fill_(value)
            worker[1].running_var.fill_(value)
            worker[1].num_batches_tracked.fill_(int(value))
    mean = team.mean()
    assert all((p == 2.5).all() for p in mean.parameters())
    assert mean[1].running_var.tolist() == [2.5, 2.5]
    assert mean[1].num_batches_tracked.item() == 4
    with torch.no_grad():
        mean[0].weight.fill_(9.0)
    assert team[0][0].weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_the_mean_of_equal_frozen_parameters_is_what_they_are():
    model = nn.Linear(40, 40)
    model.weight.requires_grad_(False)
    team = Workers(model, 7)  # three of five sums of seven equal numbers, divided by seven, are others
    assert torch.equal(team.mean().weight, model.weight)


def test_frozen_parameters_of_a_dtype_that_cannot_be_averaged_are_worker_0s_in_the_mean():
    model = nn.Linear(2, 1)
    model.register_parameter("eighths", nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False))
    team = Workers(model, 2)
    with torch.no_grad():
        team[1].eighths.copy_(torch.zeros(2))
    assert team.mean().eighths.float().tolist() == [1.0, 1.0]


def test_the_mean_takes_frozen_parameters_that_differ_and_leaves_numbers_and_what_holds_none():
    model = nn.Linear(1, 1)
    model.register_parameter("average", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16), requires_grad=False))
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    model.register_parameter("base", nn.Parameter(torch.full((2,), 0.1, dtype=torch.float32), requires_grad=False))
    model.register_buffer("later", torch.empty(2, device="meta"))
    team = Workers(model, 3)
    for number, worker in enumerate(team):
        worker.average.fill_(2.0 * number + 1)
        worker.codes.fill_(number + 1)
    mean = team.mean()
    assert mean.average.tolist() == [3.0, 3.0]
    assert mean.codes.tolist() == [1, 1]
    assert torch.equal(mean.base, model.base)
    assert not mean.average.requires_grad
    assert mean.later.is_meta


def test_a_copy_has_rows_of_its_own():
    team = Workers(make_model(), 2)
    twin = copy.deepcopy(team)
    with torch.no_grad():
        twin.rows.blocks[0].rows.fill_(5.0)
    assert all((p == 5).all() for p in twin.parameters())
    assert not any((p == 5).any() for p in team.parameters())


def test_state_dict_loads_into_the_same_storage():
    team, other = Workers(make_model(), 2), Workers(make_model(), 2)
    with torch.no_grad():
        team.rows.blocks[0].rows.normal_()
    pointers = [p.data_ptr() for p in other.parameters()]
    other.load_state_dict(team.state_dict())
    assert [p.data_ptr() for p in other.parameters()] == pointers
    for ours, theirs in zip(other.parameters(), team.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="the state has 2 workers, there are 3"):
        Workers(make_model(), 3).load_state_dict(team.state_dict())


def test_a_state_that_does_not_fit_changes_no_worker():
    team = Workers(nn.Linear(2, 3), 2)
    before = [p.clone() for p in team.parameters()]
    state = Workers(nn.Linear(2, 3), 2).state_dict()
    state["workers"][1]["bias"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        team.load_state_dict(state)
    assert all(torch.equal(now, then) for now, then in zip(team.parameters(), before, strict=True))


def test_a_state_loads_into_models_that_could_not_be_copied_any_more():
    class Locked(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.lock = threading.Lock()

    hooked = Workers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), 3)
    for worker in hooked:
        worker[0].register_forward_hook(lambda _module, _inputs, output, other=worker[1]: other.bias + output)
    for team in (Workers(Locked(), 1), hooked):
        saved = copy.deepcopy(team.state_dict())
        expected = [p.clone() for p in team.parameters()]
        team.rows.blocks[0].rows.fill_(9.0)
        team.load_state_dict(saved)
        assert all(map(torch.equal, team.parameters(), expected))


def test_a_failed_load_into_all_leaves_one_into_worker_0_alone_where_all_begin():
    team = Workers(nn.Linear(2, 1), 2)
    state = {"workers": [{**worker.state_dict(), "more": torch.zeros(1)} for worker in Workers(nn.Linear(2, 1), 2)]}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        team.load_state_dict(state)
    team[0].load_state_dict(state["workers"][0], strict=False)
    team.rows.following.begin()
    assert all(map(torch.equal, team[0].parameters(), team[1].parameters()))


def test_training_mode_and_names_reach_every_worker():
    team = Workers(nn.Sequential(nn.Linear(2, 2)), 2)
    assert [name for name, _ in team.eval().named_parameters()] == [
        "0.0.weight",
        "0.0.bias",
        "1.0.weight",
        "1.0.bias",
    ]
    assert not any(worker.training for worker in team)
    assert all(worker.training for worker in team.train())


def test_models_that_cannot_be_averaged_are_refused_by_name():
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        Workers(make_model(), 0)
    with pytest.raises(TypeError, match="num_workers must be an int, got 2.5"):
        Workers(make_model(), 2.5)
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        Workers([make_model()], 2)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Workers(nn.ReLU(), 2)
    with pytest.raises(ValueError, match="parameter 'weight' is complex"):
        Workers(nn.Linear(2, 2, dtype=torch.complex64), 2)
    with pytest.raises(ValueError, match="parameter 'weight' is uninitialised"):
        Workers(nn.LazyLinear(2), 1)
    with pytest.raises(ValueError, match=r"parameter 'weight' is \(2, 3\) .* in worker 1, but \(2, 2\)"):
        Rows([nn.Linear(2, 2), nn.Linear(3, 2)])
    with pytest.raises(ValueError, match="'bias' is in one only"):
        Rows([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])


def test_the_mean_of_a_model_that_was_moved_out_of_its_rows_is_an_error_and_a_state_of_a_module_too():
    team = Workers(nn.Linear(2, 1), 2)
    with pytest.raises(
        ValueError, match=r"not one of Workers, which has the key 'workers': got \['weight', 'bias'\]"
    ):
        team.load_state_dict(team[0].state_dict())
    team[1].double()
    with pytest.raises(RuntimeError, match="'weight' of worker 1 no longer lies in its row"):
        team.mean()


@pytest.mark.parametrize("k", [3, 8])
def test_the_mean_of_equal_workers_is_each_of_them_to_the_bit(k):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    model[1].running_mean.normal_()
    workers = Workers(model, k)
    mean = workers.mean().state_dict()
    assert all(torch.equal(mean[name], value) for name, value in workers[0].state_dict().items())
    rows = workers.rows.blocks[0].rows
    assert not torch.equal(rows.mean(dim=0), rows[0])  # summed and divided they are off
