"""Both phases in one launch: the order of the work, and that the result is that of one launch a phase."""

from dataclasses import replace

import pytest
import torch
from interpreted_traffic import count_kernels
from optim_params import BOTH
from test_master_weights import CHANGES as MASTER_CHANGES
from test_master_weights import three_steps
from test_ops_trust_ratio import LAMB as LAMB_OPTIONS
from test_ops_trust_ratio import LARS as LARS_OPTIONS
from test_trust_ratio_kernels import DEVICE, lamb_steps, lars_steps

from fastlocal import LAMB, LARS
from fastlocal.kernels import trust_ratio
from fastlocal.kernels.trust_ratio_common import BLOCK, CHUNK, NUM_WARPS
from fastlocal.kernels.trust_ratio_queue import queue_of

COUNTS = pytest.mark.parametrize("counts", [[1], [5], [1, 1, 1], [3, 1, 4, 1, 5, 9, 2, 6], [2, 40, 2]], ids=str)
LAGS = pytest.mark.parametrize("lag", [0, 1, 3, 7, 100])


def queue_up(monkeypatch, lag):
    """As on a device where a step in one launch was measured to be faster."""
    monkeypatch.setattr(trust_ratio, "queue_constants", lambda *_: (BLOCK, NUM_WARPS, lag))


@COUNTS
@LAGS
def test_every_chunk_is_queued_once_a_phase_and_waits_for_lower_tickets_alone(counts, lag):
    order = queue_of(torch.tensor(counts), lag).tolist()
    chunks = list(range(sum(counts)))
    assert sorted(order) == sorted([*chunks, *(-1 - c for c in chunks)])
    owner = [tensor for tensor, count in enumerate(counts) for _ in range(count)]
    ended = [0] * len(counts)
    for entry in order:
        if entry >= 0:
            ended[owner[entry]] += 1
        else:
            tensor = owner[-1 - entry]
            assert ended[tensor] == counts[tensor]


@COUNTS
@LAGS
def test_as_many_chunks_as_the_lag_lie_between_the_phases_of_a_tensor(counts, lag):
    order = queue_of(torch.tensor(counts), lag).tolist()
    end = 0
    for count in counts:
        end += count
        place = order.index(-end)  # phase 2 begins with the last chunk, -1 - (end - 1)
        first_phases = sum(entry >= 0 for entry in order[:place])
        assert first_phases == min(end + lag, sum(counts))
        assert order[place : place + count] == list(range(-end, count - end))


def test_two_tensors_of_two_chunks_are_worked_on_in_turn():
    assert queue_of(torch.tensor([2, 2]), 0).tolist() == [0, 1, -2, -1, 2, 3, -4, -3]
    assert queue_of(torch.tensor([2, 2]), 1).tolist() == [0, 1, 2, -2, -1, 3, -4, -3]


def require_same_bits(run, monkeypatch, lag=1):
    """Of one launch a phase and of one for both, whatever was measured to be fastest here."""
    with monkeypatch.context() as patch:
        patch.setattr(trust_ratio, "launch_constants", lambda *_: (BLOCK, NUM_WARPS))
        patch.setattr(trust_ratio, "queue_constants", lambda *_: None)
        apart = run()
        queue_up(patch, lag)
        together = run()
    for parts, whole in zip(apart, together, strict=True):
        for a, b in zip(parts, whole, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"decay": "l2", "maximize": True},
        {"decay": "decoupled", "max_grad_norm": 0.1},
        {"trust_clip": (0.5, 2.0)},
        {"adapt": "matrices", "bias_correction": "step"},
        {"adapt": "decayed", "weight_decay": 0.0},
    ],
    ids=str,
)
def test_lamb_in_one_launch_gives_the_bits_of_two_phases(change, monkeypatch):
    options = replace(LAMB_OPTIONS, **change)
    require_same_bits(lambda: lamb_steps("triton", DEVICE, torch.float32, torch.float32, options), monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"momentum": 0.0},
        {"dampening": 0.5, "trust_clip": True, "trust_coefficient": 2.0},
        {"nesterov": True, "adapt": "matrices"},
        {"norm": "joint", "maximize": True},
        {"momentum_form": "lr_in_buffer"},
    ],
    ids=str,
)
def test_lars_in_one_launch_gives_the_bits_of_two_phases(change, monkeypatch):
    options = replace(LARS_OPTIONS, **change)
    require_same_bits(lambda: lars_steps("triton", DEVICE, torch.float32, torch.float32, options), monkeypatch)


@pytest.mark.parametrize(("options", "change"), MASTER_CHANGES, ids=str)
def test_masters_in_one_launch_have_the_bits_of_two_phases(options, change, monkeypatch):
    options = replace(options, **change)

    def run():
        return three_steps(options, "triton", torch.bfloat16, exact=False, device=DEVICE)

    require_same_bits(run, monkeypatch, lag=100)


@BOTH
def test_a_step_after_one_that_found_inf_finds_its_counters_ready(optimizer, monkeypatch):
    def run():
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(2 * CHUNK + 5, device=DEVICE))
        fused = optimizer([param], lr=0.1, weight_decay=0.1, fused=True)
        start, seen = param.detach().clone(), []
        for found in (0.0, 1.0, 1.0, 0.0):
            param.grad = torch.randn_like(param)
            fused.found_inf = torch.tensor(found, device=DEVICE)
            fused.step()
            seen.append(param.detach().clone())
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])
        assert not torch.equal(start, seen[0])
        assert not torch.equal(seen[2], seen[3])
        return [seen, list(fused.state[param].values())]

    require_same_bits(run, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize(
    ("make", "num_bytes", "launches"),
    [
        (lambda p: LAMB(p, weight_decay=0.01, fused=True), 40, 2),
        (lambda p: LAMB(p, weight_decay=0.01, max_grad_norm=1.0, fused=True), 44, 5),
        (lambda p: LARS(p, lr=0.1, weight_decay=1e-4, fused=True), 28, 1),
        (lambda p: LARS(p, lr=0.1, weight_decay=0.0, fused=True), 20, 2),  # no tensor has a trust ratio
    ],
)
def test_one_launch_moves_what_two_phases_do(make, num_bytes, launches, monkeypatch):
    queue_up(monkeypatch, 4)
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (10 * CHUNK, 1000, 2 * CHUNK)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = make(parameters)
    optimizer.step()
    traffic = count_kernels(optimizer.step, monkeypatch)
    moved = traffic.bytes_moved / sum(p.numel() for p in parameters)
    assert num_bytes <= moved < num_bytes + 0.1  # tables, partial sums and the queue
    assert traffic.launches == launches


@pytest.mark.gpu
@pytest.mark.parametrize("lag", [0, 64, 10_000])
@BOTH
def test_many_programs_that_wait_for_each_other_finish_with_the_bits_of_two_phases(optimizer, lag, monkeypatch):
    # Far more programs than a GPU runs at a time; a tensor that alone is larger than that; many of one chunk.
    sizes = [7 * CHUNK + 5, 3000 * CHUNK, *[100] * 500, *[40 * CHUNK + 3] * 50]

    def run():
        generator = torch.Generator("cuda").manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator, device="cuda")) for n in sizes]
        fused = optimizer(params, lr=0.1, weight_decay=0.1, fused=True)
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            fused.step()
        return [[p.detach() for p in params]]

    require_same_bits(run, monkeypatch, lag)
