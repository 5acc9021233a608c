"""The inner optimizer's state at a sync: kept, reset or averaged."""

import copy
import math

import pytest
import torch
from local_runs import make, parameters_of, run
from torch import nn

from fastlocal import LAMB, LocalSGD, Workers


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


def test_inner_state_is_each_workers_own_unless_something_else_is_chosen():
    team = Workers(nn.ParameterList([torch.zeros(1)]), 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0, momentum=0.5), team, 1)
    for _ in range(2):
        for model, value in zip(team, (1.0, 3.0), strict=True):
            model[0].grad = torch.tensor([value])
        optimizer.step()
    assert [optimizer.state[model[0]]["momentum_buffer"].item() for model in team] == [1.5, 4.5]


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


def test_averaged_inner_state_leaves_alone_what_a_vector_has_as_a_whole():
    team = Workers(nn.ParameterList([torch.zeros(3)]), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 1, inner_state="average")
    shapes = {"like": (3,), "number": (), "one": (1,)}
    for number, parameter in enumerate(team.parameters()):
        parameter.grad = torch.zeros_like(parameter)
        inner.state[parameter] = {name: torch.full(shape, 2.0 * number) for name, shape in shapes.items()}
    optimizer.step()
    held = inner.state[team[1][0]]
    assert {name: value.unique().item() for name, value in held.items()} == {"like": 1.0, "number": 2.0, "one": 2.0}
    assert optimizer.stats.bytes_on_wire == 4 * (3 + 3)


def test_bytes_of_averaged_inner_state_are_those_that_every_worker_has():
    team = Workers(nn.ParameterList([torch.ones(10), torch.ones(1000)]), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.1, momentum=0.9)
    optimizer = LocalSGD(inner, team, 1, inner_state="average")
    for parameter in (team[0][0], team[0][1], team[1][0]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.stats.bytes_on_wire == 4 * (10 + 1000 + 10)


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


def test_sparse_state_that_cannot_be_averaged_is_named_before_anything_is_written():
    team = Workers(nn.Embedding(5, 3, sparse=True), 2)
    inner = torch.optim.SGD(team.parameters(), lr=0.1, momentum=0.9)
    optimizer = LocalSGD(inner, team, 1, inner_state="average")
    for worker, model in enumerate(team):
        model(torch.tensor([1, 2 + worker])).sum().backward()
    with pytest.raises(ValueError, match="momentum_buffer of parameter 'weight' is sparse"):
        optimizer.step()
    assert not torch.equal(parameters_of(team[0]), parameters_of(team[1]))


def test_a_reset_adagrad_counts_its_steps_anew():
    team = Workers(nn.Linear(1, 1, bias=False, dtype=torch.float64), 2)
    inner = torch.optim.Adagrad(team.parameters(), lr=0.1, lr_decay=0.5)
    optimizer = LocalSGD(inner, team, 2, inner_state="reset")
    start = team[0].weight.item()
    for _ in range(4):
        for parameter in team.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert team[0].weight.item() == pytest.approx(start - 2 * (0.1 + 0.1 / 1.5 / math.sqrt(2)), rel=1e-8)


def test_a_healed_worker_of_lamb_steps_the_state_that_it_took_over():
    team = Workers(nn.Linear(3, 1, bias=False), 2)
    inner = LAMB(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 2, inner_state="average")
    for step in range(4):
        for worker, parameter in enumerate(team.parameters()):
            parameter.grad = torch.full_like(parameter, torch.nan if (step, worker) == (1, 1) else 1.0)
        optimizer.step()
    assert optimizer.stats.excluded == 1
    assert [inner.state[p]["step"].item() for p in team.parameters()] == [4.0, 4.0]


def test_a_healed_worker_that_has_never_stepped_begins_its_state_itself():
    team = Workers(nn.Linear(3, 1, bias=False), 2)
    inner = torch.optim.Adam(team.parameters(), lr=0.1)
    optimizer = LocalSGD(inner, team, 2, inner_state="average")
    with torch.no_grad():
        team[1].weight.fill_(torch.nan)
    for step in range(3):
        team[0].weight.grad = torch.ones(1, 3)
        team[1].weight.grad = None if step < 2 else torch.ones(1, 3)
        optimizer.step()
    assert optimizer.stats.excluded == 1
    assert [inner.state[p]["step"].item() for p in team.parameters()] == [3.0, 1.0]
