"""Copies of a module: what a forward pass left in it, and what hangs on its parameters."""

import pytest
import torch
from torch import nn

from fastlocal import LocalSGD, Workers
from fastlocal.twin import copy_of


class Remembers(nn.Module):
    """Keeps what its last forward pass came to, as attention maps and auxiliary losses are kept."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kept = {"list": [], "last": None}

    def forward(self, x):
        self.last = self.linear(x)
        self.kept = {"list": [self.last * 2], "last": (self.last + 1,)}
        return self.last


def test_a_module_that_keeps_a_result_of_its_forward_pass_can_be_copied():
    model = Remembers()
    model(torch.ones(1, 3))
    copied = copy_of(model)
    assert torch.equal(copied.last, model.last)
    assert torch.equal(copied.kept["list"][0], 2 * model.last)
    assert copied.last.grad_fn is None
    assert model.last.grad_fn is not None


def test_workers_that_keep_results_have_a_mean_after_training():
    model = Remembers()
    model(torch.ones(1, 3))
    workers = Workers(model, 2)
    optimizer = LocalSGD(torch.optim.SGD(workers.parameters(), lr=0.1), workers, 1)
    for worker in workers:
        worker(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(workers.mean().linear.weight, workers[1].linear.weight)


def test_old_spectral_norm_has_a_mean():
    workers = Workers(torch.nn.utils.spectral_norm(nn.Linear(3, 2)), 2)
    for worker in workers:
        worker(torch.ones(1, 3)).sum().backward()
    assert workers.mean().weight_orig.shape == (2, 3)


def test_every_worker_has_the_attributes_and_gradient_hooks_of_the_models_parameters():
    model = nn.Linear(2, 1, bias=False)
    model.weight._no_weight_decay = True
    model.weight.tags = ["a"]
    model.weight.register_hook(lambda gradient: gradient * torch.tensor([1.0, 0.0]))
    workers = Workers(model, 3)
    for worker in workers:
        worker(torch.ones(1, 2)).sum().backward()
        assert worker.weight.grad.tolist() == [[1.0, 0.0]]
        assert worker.weight._no_weight_decay
    assert workers[1].weight.tags == ["a"]
    assert workers[1].weight.tags is not model.weight.tags


def test_a_hook_that_steps_one_parameter_is_refused_and_one_a_worker_is_left_alone():
    model = nn.Linear(2, 1, bias=False)
    handle = model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="parameter 'weight' has a post-accumulate-grad hook"):
        Workers(model, 2)
    assert len(Workers(model, 1)) == 1
    handle.remove()
    workers = Workers(nn.Linear(2, 1), 2)
    for parameter in workers.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    assert workers.mean().weight.shape == (1, 2)


@pytest.mark.parametrize("model", [nn.LazyLinear(3), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())])
def test_a_lazy_module_is_refused_by_name_until_it_has_seen_an_input(model):
    with pytest.raises(ValueError, match="is uninitialised: run one forward pass of the lazy module first"):
        Workers(model, 2)
    model(torch.ones(4, 2))
    assert len(Workers(model, 2)) == 2
