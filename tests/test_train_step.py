"""Tests of train/step.py: one batch's gradients for every worker."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal import Workers
from fastlocal.train import step
from fastlocal.train.augment import Augmenter, Normalizer
from fastlocal.train.data import synthetic
from fastlocal.train.step import Gradients

K, BATCH = 3, 8


def setup(device="cpu"):
    images = synthetic(120, seed=0)
    normalize = Normalizer(images.images)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 100))
    workers = Workers(model.to(device), K)
    for part in (images.images, images.labels):
        part.data = part.to(device)
    normalize.scale, normalize.shift = normalize.scale.to(device), normalize.shift.to(device)
    data = [Augmenter(images.take(torch.arange(40 * k, 40 * k + 40)), normalize) for k in range(K)]
    plans = torch.stack([d.plan(torch.Generator().manual_seed(k)) for k, d in enumerate(data)])
    return workers, data, plans


def test_each_worker_gets_the_gradient_of_its_own_batch():
    workers, data, plans = setup()
    gradients = Gradients(list(workers), data, BATCH, "fp32")
    gradients(plans[:, :, 8:16])
    gradients(plans[:, :, 16:24])
    losses = []
    for worker, augmenter, plan in zip(workers, data, plans, strict=True):
        expected = Workers(worker, 1).mean().double()
        for start in (8, 16):
            expected.zero_grad()
            images, labels = augmenter.batch(plan[:, start : start + BATCH])
            loss = nn.functional.cross_entropy(expected(images.double()), labels)
            loss.backward()
            losses.append(loss.item())
        for p, q in zip(worker.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6)
    assert gradients.losses[:, 1].tolist() == [2.0] * K
    torch.testing.assert_close(
        gradients.losses[:, 0], torch.tensor(losses).double().view(K, 2).sum(1), rtol=1e-5, atol=0
    )


def test_a_loss_that_is_not_finite_is_counted_for_no_worker():
    workers, data, plans = setup()
    with torch.no_grad():
        workers[1][0].weight.fill_(torch.inf)
    gradients = Gradients(list(workers), data, BATCH, "fp32")
    gradients(plans[:, :, :BATCH])
    assert gradients.losses[:, 1].tolist() == [1.0, 0.0, 1.0]
    assert gradients.losses[1, 0] == 0


class ReadBack(TorchDispatchMode):
    """Names the operations whose result the host waits for, or whose shape depends on the values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"):
            self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_read_back_so_it_can_be_recorded_as_a_graph(precision):
    workers, data, plans = setup()
    gradients = Gradients(list(workers), data, BATCH, precision)
    with ReadBack() as mode:
        gradients(plans[:, :, :BATCH])
    assert mode.seen == []
    with ReadBack() as mode:
        gradients.losses.sum().item()
    assert mode.seen == ["_local_scalar_dense"]


@pytest.mark.gpu
def test_the_replayed_graph_gives_the_gradients_of_the_plain_loop():
    results = []
    for calls_before_capture in (step._CALLS_BEFORE_CAPTURE, 100):
        workers, data, plans = setup("cuda")
        gradients = Gradients(list(workers), data, BATCH, "fp32")
        gradients.calls = step._CALLS_BEFORE_CAPTURE - calls_before_capture
        optimizer = torch.optim.SGD(workers.parameters(), lr=0.1, momentum=0.9, fused=True)
        for start in range(0, 40, BATCH):
            gradients(plans[:, :, start : start + BATCH])
            optimizer.step()
        assert (gradients.graph is None) == (calls_before_capture == 100)
        results.append((torch.cat([p.detach().flatten() for p in workers.parameters()]), gradients.losses))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=0)
