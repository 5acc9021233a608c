"""Buffers at a sync: averaged, broadcast or kept."""

import math

import pytest
import torch
from local_runs import make, parameters_of, run, step_with
from torch import nn
from torch.nn.utils import parametrizations

from fastlocal import LocalSGD, SlowMo, Workers
from fastlocal.buffers import spoilt


def test_averaged_buffers_and_state_are_counted_as_bytes():
    plain, team = make(LocalSGD, interval=1, buffers="keep")
    run(plain, team, 1)
    more, team = make(LocalSGD, interval=1, buffers="average", inner_state="average")
    run(more, team, 1)
    buffers = sum(b.nbytes for b in team[0].buffers())
    momentum = sum(p.nbytes for p in team[0].parameters())
    assert more.stats.bytes_on_wire == 4 * (momentum * 2 + buffers) // 3
    assert plain.stats.bytes_on_wire == 4 * momentum // 3


@pytest.mark.parametrize("normed", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_unit_vectors_of_spectral_norm_are_refused_as_means_and_stay_unit_vectors(normed):
    torch.manual_seed(0)
    workers = Workers(nn.Sequential(normed(nn.Linear(8, 6)), nn.ReLU()), 2)
    name = "parametrizations.weight.0._u" if normed is parametrizations.spectral_norm else "weight_u"

    def trained(choice, steps):
        optimizer = LocalSGD(torch.optim.SGD(workers.parameters(), lr=0.5), workers, interval=2, buffers=choice)
        for _ in range(steps):
            optimizer.zero_grad()
            for worker in workers:
                worker(torch.randn(4, 8)).pow(2).sum().backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=f"buffer '0.{name}' is a unit vector of spectral_norm.*'broadcast'"):
        trained("average", steps=2)
    trained("broadcast", steps=3)  # to the middle of a round
    for model in (workers.mean(), workers[0]):
        vector = dict(model.named_buffers())[f"0.{name}"].double()
        assert vector.norm().item() == pytest.approx(1.0, rel=1e-6)


def test_spectral_norm_of_a_vector_keeps_no_unit_vectors_and_trains():
    workers = Workers(parametrizations.spectral_norm(nn.Linear(2, 3), name="bias"), 2)
    optimizer = LocalSGD(torch.optim.SGD(workers.parameters(), lr=0.5), workers, interval=1)
    step_with(optimizer, workers)
    assert optimizer.stats.rounds == 1


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
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.sync()  # they are merged already
    assert optimizer.stats.bytes_on_wire == sent + 4 * 4 + 8
    del state["fastlocal"]["buffers_apart"]  # which older states lack
    optimizer.load_state_dict(state)
    optimizer.sync()
    assert optimizer.stats.bytes_on_wire == sent + 2 * (4 * 4 + 8)


def with_buffer(buffer, workers=2, **options):
    model = nn.Linear(2, 1)
    model.register_buffer("extra", buffer)
    team = Workers(model, workers)
    return LocalSGD(torch.optim.SGD(team.parameters(), lr=0.1), team, 1, **options), team


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


def test_a_tensor_is_spoilt_where_a_worker_that_is_left_out_has_it_not_finite():
    fine, broken = torch.ones(2), torch.tensor([1.0, math.inf])
    assert spoilt([[broken, fine], [fine, broken], [fine, fine]], [True, False]) == [False, True, False]
