"""What GradScaler leaves on a wrapper, handed on to the inner optimizer."""

import pytest
import torch
from torch import nn

from fastlocal.local.scaling import Scaling


def scaling_of(weights, scale):
    """What a wrapper of these weights is told by a GradScaler; None for one that has unscaled already."""
    wrapper = torch.optim.SGD(weights, lr=1.0)
    told = {"grad_scale": None if scale is None else torch.tensor(scale), "found_inf": torch.tensor(0.0)}
    vars(wrapper).update(told)
    return Scaling(wrapper, lambda flag: flag)


@pytest.mark.parametrize("scale", [None, 8.0])
def test_gradients_of_every_group_are_divided_by_the_scale_unless_they_have_been(scale):
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    inner = torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:]}], lr=1.0)
    weights[0].grad, weights[2].grad = torch.tensor([8.0]), torch.tensor([16.0])
    scaling_of(weights, scale).step(inner)
    assert [weight.item() * (scale or 1.0) for weight in weights] == [-8.0, 0.0, -16.0]


def test_a_fused_step_that_fails_leaves_nothing_of_the_scaler_to_the_next_one():
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=1.0, fused=True)
    weight.grad = torch.tensor([0.0, 8.0]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        scaling_of([weight], 8.0).step(inner)
    weight.grad = torch.ones(2)
    inner.step()
    assert weight.tolist() == [-1.0, -1.0]
