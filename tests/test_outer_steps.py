"""LocalSGD, SlowMo and DiLoCo against closed forms: who equals whom, and when."""

import copy
import math

import pytest
import torch
from torch import nn

from fastlocal import DiLoCo, LocalSGD, SlowMo, Workers
from fastlocal.outer import SlowMomentum

K, INTERVAL = 3, 4
# Relative to weights near 1: a handful of float64 roundings a step.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def batches(steps, workers=K, size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, workers, size, 7, dtype=torch.float64, generator=generator)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[:, :5]), batch[:, 5:])


def flatten(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(optimizer, workers, data, rates=None):
    for step, row in enumerate(data):
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
        optimizer.zero_grad()
        for model, batch in zip(workers, row, strict=True):
            loss_of(model, batch).backward()
        optimizer.step()
    optimizer.sync()


def local_steps(models, data, rates, momentum=0.0):
    """One round of plain SGD with momentum, written out; returns nothing, the models move."""
    for row, rate in zip(data, rates, strict=True):
        for (model, buffers), batch in zip(models, row, strict=True):
            gradients = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient, buffer in zip(model.parameters(), gradients, buffers, strict=True):
                    buffer.mul_(momentum).add_(gradient)
                    parameter.sub_(rate * buffer)


def oracle(model, data, rates, interval, outer, momentum=0.0, workers=K):
    """Rounds of independent replicas and an outer rule `outer(anchor, mean, the round's mean rate) -> parameters`."""
    replicas = [copy.deepcopy(model) for _ in range(workers)]
    state = [(replica, [torch.zeros_like(p) for p in replica.parameters()]) for replica in replicas]
    anchor = flatten(model)
    for start in range(0, len(data), interval):
        part = slice(start, start + interval)
        local_steps(state, data[part], rates[part], momentum)
        mean = torch.stack([flatten(replica) for replica in replicas]).mean(0)
        anchor = outer(anchor, mean, sum(rates[part]) / len(rates[part]))
        for replica in replicas:
            nn.utils.vector_to_parameters(anchor.clone(), replica.parameters())
    return anchor


def wrapped(kind, model, workers=K, lr=0.1, momentum=0.0, interval=INTERVAL, **options):
    team = Workers(model, workers)
    inner = torch.optim.SGD(team.parameters(), lr=lr, momentum=momentum)
    return kind(inner, team, interval, **options), team


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_sgd_equals_independent_replicas_that_are_averaged(momentum):
    data, rates = batches(10), [0.1] * 10
    expected = oracle(make_model(), data, rates, INTERVAL, lambda anchor, mean, rate: mean, momentum)
    optimizer, team = wrapped(LocalSGD, make_model(), momentum=momentum)
    train(optimizer, team, data)
    for model in team:
        torch.testing.assert_close(flatten(model), expected, **EXACT)
    assert optimizer.stats.rounds == 3  # 4 + 4 + 2 steps: the partial round is closed
    assert optimizer.stats.local_steps == 10


def test_interval_one_with_plain_sgd_equals_one_batch_k_times_as_large():
    data = batches(6)
    optimizer, team = wrapped(LocalSGD, make_model(), interval=1)
    train(optimizer, team, data)
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for row in data:
        plain.zero_grad()
        loss_of(model, row.flatten(0, 1)).backward()
        plain.step()
    torch.testing.assert_close(flatten(team[0]), flatten(model), **EXACT)


def test_warmup_steps_equal_one_batch_k_times_as_large_with_momentum_too():
    data = batches(6)
    optimizer, team = wrapped(LocalSGD, make_model(), momentum=0.9, interval=100, warmup_steps=6)
    train(optimizer, team, data)
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for row in data:
        plain.zero_grad()
        loss_of(model, row.flatten(0, 1)).backward()
        plain.step()
    for replica in team:
        torch.testing.assert_close(flatten(replica), flatten(model), **EXACT)
    assert optimizer.stats.bytes_on_wire == optimizer.stats.bytes_synchronous
    assert optimizer.stats.rounds == 6


def test_slowmo_without_momentum_and_slow_lr_one_equals_local_sgd():
    data = batches(9)
    slow, slow_team = wrapped(SlowMo, make_model(), slow_lr=1.0, slow_momentum=0.0)
    local, local_team = wrapped(LocalSGD, make_model())
    train(slow, slow_team, data)
    train(local, local_team, data)
    torch.testing.assert_close(flatten(slow_team[0]), flatten(local_team[0]), **EXACT)


def test_one_worker_with_slow_lr_below_one_equals_lookahead():
    # Zhang et al. 2019: φ ← φ + α(θ − φ), the fast weights restart from φ.
    alpha, data, rates = 0.5, batches(12, workers=1), [0.1] * 12
    expected = oracle(
        make_model(), data, rates, INTERVAL, lambda slow, fast, rate: slow + alpha * (fast - slow), 0.9, workers=1
    )
    optimizer, team = wrapped(SlowMo, make_model(), workers=1, momentum=0.9, slow_lr=alpha, slow_momentum=0.0)
    train(optimizer, team, data)
    torch.testing.assert_close(flatten(team[0]), expected, **EXACT)


@pytest.mark.parametrize(
    "rates",
    [
        [0.1] * 16,
        [0.1 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)],
        [0.02 * (step + 1) for step in range(8)] + [0.001] * 8,
    ],
    ids=["constant", "cosine", "changing"],
)
def test_slowmo_equals_the_papers_u_form(rates):
    # Algorithm 1: u ← βu + (x0 − x̄)/γ; x0 ← x0 − αγu.
    alpha, beta, data = 0.8, 0.6, batches(16)
    u = torch.zeros_like(flatten(make_model()))

    def outer(anchor, mean, rate):
        u.mul_(beta).add_((anchor - mean) / rate)
        return anchor - alpha * rate * u

    expected = oracle(make_model(), data, rates, INTERVAL, outer)
    optimizer, team = wrapped(SlowMo, make_model(), slow_lr=alpha, slow_momentum=beta)
    train(optimizer, team, data, rates)
    torch.testing.assert_close(flatten(team[0]), expected, **EXACT)


def test_a_rate_that_rises_again_from_almost_nothing_leaves_slow_momentum_where_local_sgd_is():
    # Warm restarts within a quadratic: the round's last rate is 1e-5 of the next one's, what it achieved is not.
    distances = {}
    for kind in (LocalSGD, SlowMo):
        optimizer, team = wrapped(kind, nn.Linear(20, 1, bias=False).double(), workers=2, interval=16)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 480)
        generator = torch.Generator().manual_seed(0)
        for step in range(640):
            for model in team:
                noise = torch.randn(1, 20, generator=generator, dtype=torch.float64)
                model.weight.grad = model.weight.detach() - 1 + noise
            optimizer.step()
            scheduler.step()
            if step >= 480 and optimizer.steps_in_round == 0:
                far = (team[0].weight.detach() - 1).square().sum().item()
                distances[kind] = max(distances.get(kind, 0.0), far)
    assert distances[SlowMo] < 3 * distances[LocalSGD]


def test_slow_momentum_outlives_rounds_with_rate_zero_and_is_not_applied_in_them():
    # γ is 0 in the first round (warm-up starts there) and in the third; u is left alone then, x0 does not move.
    alpha, beta, data = 1.0, 0.7, batches(20)
    rates = [0.0] * 4 + [0.1] * 4 + [0.0] * 4 + [0.05] * 4 + [0.02] * 4
    u = torch.zeros_like(flatten(make_model()))

    def outer(anchor, mean, rate):
        if rate == 0:
            return anchor - alpha * (anchor - mean)
        u.mul_(beta).add_((anchor - mean) / rate)
        return anchor - alpha * rate * u

    expected = oracle(make_model(), data, rates, INTERVAL, outer)
    optimizer, team = wrapped(SlowMo, make_model(), slow_lr=alpha, slow_momentum=beta)
    train(optimizer, team, data, rates)
    torch.testing.assert_close(flatten(team[0]), expected, **EXACT)


def test_diloco_equals_torch_sgd_nesterov_on_the_pseudo_gradient():
    data, rates = batches(20), [0.1] * 20
    outer_parameter = nn.Parameter(flatten(make_model()))
    outer_sgd = torch.optim.SGD([outer_parameter], lr=0.7, momentum=0.9, nesterov=True)

    def outer(anchor, mean, rate):
        outer_parameter.grad = anchor - mean
        outer_sgd.step()
        return outer_parameter.detach().clone()

    expected = oracle(make_model(), data, rates, INTERVAL, outer)
    optimizer, team = wrapped(DiLoCo, make_model())
    train(optimizer, team, data)
    torch.testing.assert_close(flatten(team[0]), expected, **EXACT)


def test_each_group_has_its_own_learning_rate_in_the_slow_momentum():
    # Layer 0 decays its rate, layer 2 does not: two spans with different factors in one buffer.
    data, alpha, beta = batches(12), 1.0, 0.5
    model = make_model()
    team = Workers(make_model(), K)
    split = len(list(model[0].parameters()))
    groups = [
        {"params": [p for worker in team for p in list(worker.parameters())[:split]], "lr": 0.1},
        {"params": [p for worker in team for p in list(worker.parameters())[split:]], "lr": 0.05},
    ]
    optimizer = SlowMo(torch.optim.SGD(groups, lr=0.1), team, INTERVAL, slow_lr=alpha, slow_momentum=beta)
    size = sum(p.numel() for p in list(model.parameters())[:split])

    replicas = [copy.deepcopy(model) for _ in range(K)]
    anchor = flatten(model)
    u = torch.zeros_like(anchor)
    gamma = torch.empty_like(anchor)
    for start in range(0, 12, INTERVAL):
        first = 0.1 / (1 + start)
        optimizer.param_groups[0]["lr"] = first
        gamma[:size], gamma[size:] = first, 0.05
        for row in data[start : start + INTERVAL]:
            optimizer.zero_grad()
            for worker, batch in zip(team, row, strict=True):
                loss_of(worker, batch).backward()
            optimizer.step()
            for replica, batch in zip(replicas, row, strict=True):
                gradients = torch.autograd.grad(loss_of(replica, batch), list(replica.parameters()))
                step = gamma * torch.cat([g.flatten() for g in gradients])
                nn.utils.vector_to_parameters(flatten(replica) - step, replica.parameters())
        mean = torch.stack([flatten(replica) for replica in replicas]).mean(0)
        u = beta * u + (anchor - mean) / gamma
        anchor = anchor - alpha * gamma * u
        for replica in replicas:
            nn.utils.vector_to_parameters(anchor.clone(), replica.parameters())
    torch.testing.assert_close(flatten(team[0]), anchor, **EXACT)


def test_bfloat16_rows_keep_a_float32_anchor_near_the_float64_result():
    data, rates = batches(16), [0.1] * 16
    expected = oracle(make_model(), data, rates, INTERVAL, lambda anchor, mean, rate: mean)
    team = Workers(make_model().bfloat16(), K)
    optimizer = SlowMo(torch.optim.SGD(team.parameters(), lr=0.1), team, INTERVAL, slow_momentum=0.0)
    train(optimizer, team, data.bfloat16())
    anchor = optimizer.state_dict()["fastlocal"]["outer"][0]["anchor"]
    assert anchor.dtype == torch.float32
    # 16 steps, each rounded to 8 bits: 16 · 2⁻⁹ of weights near 0.5.
    torch.testing.assert_close(flatten(team[0]).double(), expected, rtol=0, atol=16 * 2**-9)
    for model in team:
        assert torch.equal(flatten(model), flatten(team[0]))


def test_steps_can_be_taken_with_a_closure_and_its_loss_is_returned():
    data = batches(5)
    optimizer, team = wrapped(LocalSGD, make_model(), interval=2)
    other, other_team = wrapped(LocalSGD, make_model(), interval=2)
    for row in data:

        def closure(row=row):
            optimizer.zero_grad()
            losses = [loss_of(model, batch) for model, batch in zip(team, row, strict=True)]
            for loss in losses:
                loss.backward()
            return sum(loss.item() for loss in losses)

        before = sum(loss_of(m, b).item() for m, b in zip(team, row, strict=True))
        assert optimizer.step(closure) == before
    optimizer.sync()
    train(other, other_team, data)
    assert torch.equal(flatten(team[0]), flatten(other_team[0]))


def test_parameters_with_coefficients_of_their_own_share_one_drift_and_one_left_out_keeps_its_momentum():
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])
    outer = SlowMomentum(
        rows, [(0, 1), (1, 2), (2, 3)], slow_lr=1.0, slow_momentum=0.5, form="nesterov", impl="portable"
    )
    outer.momentum_buffer.copy_(torch.tensor([8.0, 8.0, 8.0]))
    drift = outer.step_(torch.ones(2), [0.1, None, 0.1], measures=True)
    assert drift.tolist() == [1.0 + 4.0, 1.0 + 4.0]
    # Δ = −(2, 2, 5); v ← 0.5·8 + Δ and x ← −(Δ + 0.5v); the one in the middle takes the mean alone.
    assert outer.momentum_buffer.tolist() == [2.0, 8.0, -1.0]
    assert rows.tolist() == [[1.0, 2.0, 5.5]] * 2
