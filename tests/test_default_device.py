"""`torch.set_default_device` and `set_default_dtype` are the user's: what the library makes lies where theirs does.

"meta" stands for any other device: what is made there by mistake has no values, so that reading it is an error.
"""

import pytest
import torch
from torch import nn

from fastlocal import LAMB, LARS, ConsensusDistance, DiLoCo, LocalSGD, SlowMo, Workers
from fastlocal.kernels.trust_ratio_queue import queue_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["nothing", "another device", "another dtype"])
def default(request):
    """What a user has set before the library is called; the same numbers must come out."""
    if request.param == "another device":
        torch.set_default_device("meta")
    elif request.param == "another dtype":
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def network():
    made = nn.Sequential(nn.Linear(6, 70), nn.BatchNorm1d(70), nn.Linear(70, 3)).to(torch.float32)
    made.to_empty(device=DEVICE)
    for number, tensor in enumerate([*made.parameters(), *made.buffers()]):
        values = torch.arange(tensor.numel(), dtype=torch.float32, device=DEVICE) % (7 + number)
        tensor.detach().copy_(values.view_as(tensor) * 0.1 - 0.2)
    return made


def backward(model, step):
    x = torch.arange(30, dtype=torch.float32, device=DEVICE).view(5, 6).mul(0.1 * (step + 1)).sin()
    model(x).square().mean().backward()


def stepped(optimizer, model):
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("make", [LAMB, LARS])
def test_optimizers_step_where_their_parameters_lie(make, flags, default):
    extra = {"max_grad_norm": 0.5} if make is LAMB else {"dampening": 0.5}

    def run():
        model = network()
        optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1, **extra, **flags)
        return stepped(optimizer, model)

    under_default = run()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    for a, b in zip(under_default, run(), strict=True):
        assert a.device.type == DEVICE
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (LocalSGD, {}),
        (LocalSGD, {"inner_state": "average", "weights": [1.0, 3.0, 2.0]}),
        (SlowMo, {"wire_dtype": torch.bfloat16}),
        (SlowMo, {"wire_dtype": torch.float8_e4m3fn}),
        (DiLoCo, {"warmup_steps": 2, "impl": "reference"}),
        (SlowMo, {"impl": "triton"}),
    ],
    ids=["LocalSGD", "weighted", "bfloat16 wire", "float8 wire", "DiLoCo", "Triton"],
)
def test_wrappers_sync_where_their_workers_lie(kind, extra, default):
    def run():
        workers = Workers(network(), 3)
        inner = torch.optim.SGD(workers.parameters(), lr=0.1, momentum=0.9)
        optimizer = kind(inner, workers, ConsensusDistance(0.5), **extra)
        for step in range(8):
            optimizer.zero_grad()
            for number, worker in enumerate(workers):
                backward(worker, step + number)
            if step == 3:
                with torch.no_grad():
                    workers[2][0].weight[0, 0] = torch.nan
            optimizer.step()
        optimizer.sync()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        return [t.detach().clone() for t in (*workers.mean().parameters(), *workers.mean().buffers())]

    under_default = run()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    for a, b in zip(under_default, run(), strict=True):
        assert a.device.type == DEVICE
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_queue_lies_where_its_counts_do(default):
    counts = torch.tensor([2, 2], dtype=torch.int64, device="cpu")
    assert queue_of(counts, 0).tolist() == [0, 1, -2, -1, 2, 3, -4, -3]
