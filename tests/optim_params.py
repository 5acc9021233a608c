"""Parameters of every kind for LARS and LAMB, and what their tests do with them."""

import pytest
import torch
from torch import nn

from fastlocal import LAMB, LARS

BOTH = pytest.mark.parametrize("optimizer", [LAMB, LARS])
IMPLS = pytest.mark.parametrize("impl", ["reference", "portable", "triton"])
FLAGS = pytest.mark.parametrize(
    "flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["reference", "portable", "triton"]
)
EVERY_FORM = pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (LAMB, {}),
        (LAMB, {"foreach": False}),
        (LAMB, {"max_grad_norm": 0.5}),
        (LARS, {}),
        (LARS, {"foreach": False}),
        (LARS, {"dampening": 0.25}),
        (LARS, {"momentum": 0.0}),
    ],
)


def make_params(dtype=torch.float32):
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in [(4, 5), (6,), (), (0,), (2, 3, 2, 2)]]


def set_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    grads = [scale * torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return grads


def step_counts(optimizer):
    return [float(state["step"]) for state in optimizer.state.values() if "step" in state]


def train(optimizer, params, seeds):
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def clone(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


def moved(params, before):
    pairs = zip(params, before, strict=True)
    return any((p.detach() - b.detach()).abs().max() > 1e-4 for p, b in pairs if p.numel())
