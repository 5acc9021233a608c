"""Workers that are not finite: left out of the mean whole, then healed."""

import pytest
import torch
from local_runs import KeepsAverage, make, parameters_of, poison, run
from torch import nn

from fastlocal import DiLoCo, LocalSGD, SlowMo, Workers


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


@pytest.mark.parametrize("bad", range(3))
def test_a_worker_is_left_out_of_all_dtypes_whichever_of_them_has_the_bad_value(bad):
    dtypes = torch.float32, torch.bfloat16, torch.float64
    team = Workers(nn.ParameterList([torch.zeros(2, dtype=dtype) for dtype in dtypes]), 3)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=1.0), team, 1)
    for model, value in zip(team, (-1.0, -3.0, -8.0), strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
    team[2][bad].grad[1] = torch.nan
    optimizer.step()
    assert optimizer.stats.excluded == 1
    assert (parameters_of(team) == 2).all()


def test_a_worker_that_is_left_out_takes_only_those_frozen_parameters_anew_that_are_not_finite():
    model = KeepsAverage()
    model.register_parameter("base", nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False))
    team = Workers(model, 4)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
    with torch.no_grad():
        for number, worker in enumerate(team):
            worker.layer.weight.fill_((0.0, 1.0, 2.0, 5.0)[number])
            worker.average.weight.fill_(number)
        team[2].layer.weight[0, 1] = torch.nan
    optimizer.step()
    assert optimizer.stats.excluded == 1
    assert [worker.average.weight.tolist() for worker in team] == [[[float(number)] * 2] for number in range(4)]
    with torch.no_grad():
        team[0].layer.weight[0, 1] = torch.nan
        team[0].average.weight[0, 0] = torch.inf
    optimizer.step()
    assert optimizer.stats.excluded == 2
    assert [worker.layer.weight.tolist() for worker in team] == [[[2.0, 2.0]]] * 4
    # The first one that counts: no mean, as the averages may be of other ages.
    assert [worker.average.weight.tolist() for worker in team] == [[[float(number)] * 2] for number in (1, 1, 2, 3)]
    # Of 4 workers each sends 1.5 times its message: 8 bytes in the first round, and 8 of the average in the second.
    assert optimizer.stats.bytes_on_wire == 12 + 24
    for _ in range(2):
        for worker in team:
            worker(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert optimizer.stats.excluded == 2


def test_an_expanded_frozen_parameter_is_each_workers_own_as_its_copies_are_not_expanded():
    model = nn.Linear(2, 1)
    model.register_parameter("wide", nn.Parameter(torch.ones(2, 1).expand(2, 3), requires_grad=False))
    team = Workers(model, 2)
    optimizer = LocalSGD(torch.optim.SGD(team.parameters(), lr=0.0), team, 1)
    with torch.no_grad():
        team[1].weight.fill_(torch.nan)
        team[1].wide.fill_(torch.nan)
    optimizer.step()
    assert optimizer.stats.excluded == 1
    assert team[1].weight.isfinite().all()
    assert team.mean().wide.tolist() == [[1.0] * 3] * 2


def test_without_a_finite_worker_sync_raises_and_writes_nothing():
    optimizer, team = make(workers=2, interval=100)
    run(optimizer, team, 2)
    for model in team:
        poison(model)
    before = parameters_of(team)
    with pytest.raises(RuntimeError, match="after 2 local steps no worker's parameters are finite"):
        optimizer.sync()
    assert torch.equal(parameters_of(team).nan_to_num(7), before.nan_to_num(7))


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
