"""Options of LARS and LAMB: what is refused, and how it is said."""

import pytest
import torch
from optim_params import BOTH, make_params
from torch import nn

from fastlocal import LAMB, LARS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        ({"adapt": "none"}, "adapt must be one of 'decayed', 'all', 'matrices', got 'none'"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
        ({"eps": float("nan")}, "Invalid epsilon value: nan"),
        ({"maximize": 1}, "maximize must be one of True, False, got 1"),
        ({"capturable": "no"}, "capturable must be one of True, False, got 'no'"),
        ({"foreach": 0}, "foreach must be one of True, False, None, got 0"),
        ({"fused": "yes"}, "fused must be one of True, False, None, got 'yes'"),
    ],
)
def test_a_wrong_option_is_named_in_the_constructor_and_in_a_group(optimizer, options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        optimizer(make_params(), **options)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        optimizer([{"params": make_params(), **options}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        ({"betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\)"),
        ({"trust_clip": 10.0}, "trust_clip must be two numbers, got 10.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None, got 0.0"),
        ({"trust_clip": (2.0, 1.0)}, r"trust_clip must be \(low, high\)"),
        ({"decay": "L2"}, "decay must be one of"),
        ({"bias_correction": "none"}, "bias_correction must be one of"),
        ({"grad_averaging": "no"}, "grad_averaging must be one of True, False, got 'no'"),
    ],
)
def test_lamb_names_the_option_that_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LAMB(make_params(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"dampening": 1.5}, r"dampening must be in \[0, 1\], got 1.5"),
        ({"trust_coefficient": 0.0}, "trust_coefficient must be positive, got 0.0"),
        ({"nesterov": True, "momentum": 0.0}, "Nesterov momentum requires a momentum and zero dampening"),
        ({"nesterov": "no"}, "nesterov must be one of True, False, got 'no'"),
        ({"norm": "max"}, "norm must be one of"),
        ({"momentum_form": "paper"}, "momentum_form must be one of"),
    ],
)
def test_lars_names_the_option_that_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LARS(make_params(), **options)


@BOTH
def test_foreach_and_fused_exclude_each_other(optimizer):
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        optimizer(make_params(), foreach=True, fused=True)


@BOTH
@pytest.mark.parametrize(
    ("foreach", "fused", "impl"),
    [
        (None, None, "auto"),
        (None, True, "triton"),
        (False, True, "triton"),
        (None, False, "portable"),  # not the kernels, which "auto" might choose
        (True, None, "portable"),
        (True, False, "portable"),
        (False, None, "reference"),
        (False, False, "reference"),
    ],
)
def test_foreach_and_fused_choose_the_implementation_as_in_torch(optimizer, foreach, fused, impl):
    assert optimizer._impl(optimizer(make_params(), foreach=foreach, fused=fused).param_groups[0]) == impl


@BOTH
def test_an_unknown_option_is_an_error(optimizer):
    with pytest.raises(TypeError, match="momentun"):
        optimizer(make_params(), momentun=0.9)


@BOTH
def test_complex_parameters_are_refused(optimizer):
    with pytest.raises(TypeError, match="real floating-point parameters, got torch.complex64"):
        optimizer([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])


@BOTH
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_a_frozen_parameter_may_be_anything_until_it_is_stepped(optimizer, dtype):
    # A quantised weight, with an adapter beside it that learns.
    frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    learns = nn.Parameter(torch.ones(3))
    opt = optimizer([frozen, learns])
    learns.grad = torch.ones(3)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert (frozen == 1).all()
    assert (learns < 1).all()
    if dtype.is_complex:
        frozen.requires_grad_(True)
        frozen.grad = torch.ones_like(frozen)
        with pytest.raises(TypeError, match="real floating-point parameters, got torch.complex64"):
            opt.step()


@BOTH
def test_a_sparse_gradient_is_refused(optimizer):
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="do not support sparse gradients"):
        optimizer(embedding.parameters()).step()
