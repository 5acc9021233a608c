"""The peers' sequences against our operations in float64: other operations, the same mathematics."""

import pytest
import torch

from fastlocal.bench import peers
from fastlocal.ops import averaging as ops

SHAPES = [(3, 5), (7,), (2, 2, 2)]
BETA, LR = 0.6, 0.05


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def flat(parts):
    return torch.cat([p.reshape(-1) for p in parts])


def our_step(x, anchor, slow, **coefficients):
    weights, parts = torch.ones(1), torch.empty(1, 1)
    ops.outer_step_(x[None], anchor, slow, weights, parts, **coefficients)


@pytest.mark.parametrize("peer", [peers.torchdistx_slowmo_, peers.fairscale_slowmo_])
def test_slowmo_of_peers_is_our_outer_step(peer):
    anchor = tensors(0)
    x = [p.clone() for p in anchor]
    slow = [torch.zeros_like(p) for p in x]
    ours, our_anchor, v = flat(x), flat(anchor), torch.zeros(30, dtype=torch.float64)
    for step in range(3):
        for p, drift in zip(x, tensors(step + 1), strict=True):
            p.add_(drift, alpha=0.1)
        ours += 0.1 * flat(tensors(step + 1))
        peer(x, anchor, slow, lr=LR, momentum=BETA, num_processes=1)
        our_step(ours, our_anchor, v, direct=0.0, momentum=1.0, decay=BETA, gain=1.0)
        torch.testing.assert_close(flat(x), ours, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flat(slow) * LR, v, rtol=1e-12, atol=1e-12)


def test_diloco_of_torchft_is_our_outer_step():
    anchor = tensors(0)
    x = [p.clone() for p in anchor]
    outer = torch.optim.SGD(x, lr=0.7, momentum=0.9, nesterov=True)
    ours, our_anchor, v = flat(x), flat(anchor), torch.zeros(30, dtype=torch.float64)
    for step in range(3):
        for p, drift in zip(x, tensors(step + 1), strict=True):
            p.add_(drift, alpha=0.1)
        ours += 0.1 * flat(tensors(step + 1))
        peers.torchft_diloco_(x, anchor, outer, num_processes=1)
        our_step(ours, our_anchor, v, direct=0.7, momentum=0.63, decay=0.9, gain=1.0)
        torch.testing.assert_close(flat(x), ours, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flat(anchor), our_anchor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("peer", [peers.pytorch_average_, peers.accelerate_average_, peers.torchft_average_])
def test_averages_of_peers_divide_the_sum_by_the_processes(peer):
    x = tensors(0)
    expected = flat(x) / 4
    peer(x, 4)
    assert torch.equal(flat(x), expected)
    assert [tuple(p.shape) for p in x] == SHAPES


def test_plain_baselines_are_our_operations():
    rows = torch.randn(5, 1000, dtype=torch.float64)
    anchor, slow = torch.randn(2, 1000, dtype=torch.float64)
    mean = rows.mean(0)
    for baseline in (peers.plain_average_, peers.plain_average_with_drift_, peers.looped_average_):
        averaged = rows.clone()
        drift = baseline(averaged)
        torch.testing.assert_close(averaged, mean.expand(5, -1), rtol=1e-12, atol=1e-12)
        if drift is not None:
            torch.testing.assert_close(drift, (rows - mean).pow(2).sum(1), rtol=1e-12, atol=1e-12)
    ours = [t.clone() for t in (rows, anchor, slow)]
    peers.plain_outer_step_(rows, anchor, slow, decay=0.4)
    ops.outer_step_(
        *ours, torch.ones(5), torch.empty(5, 1), direct=0.0, momentum=1.0, decay=0.4, gain=1.0, impl="portable"
    )
    for tensor, our in zip((rows, anchor, slow), ours, strict=True):
        torch.testing.assert_close(tensor, our, rtol=1e-12, atol=1e-12)
