"""float32 master weights of bfloat16 and float16 parameters, in all three implementations."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from optim_params import BOTH, FLAGS, IMPLS
from test_ops_trust_ratio import LAMB as LAMB_OPTIONS
from test_ops_trust_ratio import LARS as LARS_OPTIONS
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastlocal import LARS
from fastlocal.kernels.trust_ratio_common import CHUNK
from fastlocal.ops import trust_ratio as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(33, 17), (1,), (0,), (5,), (), (2, 3, 4, 5), (CHUNK + 3,)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
CHANGES: list[Any] = [
    (LAMB_OPTIONS, {}),
    (LAMB_OPTIONS, {"decay": "decoupled"}),
    (LAMB_OPTIONS, {"decay": "l2", "maximize": True}),
    (LARS_OPTIONS, {}),
    (LARS_OPTIONS, {"momentum": 0.0}),
    (LARS_OPTIONS, {"dampening": 0.5, "norm": "joint"}),
    (LARS_OPTIONS, {"nesterov": True, "adapt": "matrices"}),
]


def three_steps(options, impl, dtype, exact, device="cpu"):
    """(rounded, weights, state) after three steps from weights that `dtype` holds, in float64 if `exact`."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    params = [p.double() if exact else p.to(device) for p in start]
    masters = None if exact else [p.float() for p in params]
    wide = torch.float64 if exact else torch.float32
    moments = [[torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2)]
    steps = [torch.zeros((), device=p.device) for p in params]
    tables: dict = {}
    for _ in range(3):
        grads = [(0.01 * torch.randn(s, generator=generator)).to(dtype).to(params[0].device) for s in SHAPES]
        how: dict[str, Any] = {"masters": masters, "impl": impl, "tables": tables}
        if hasattr(options, "betas"):
            ops.lamb_(params, grads, *moments, steps, options, **how)
        else:
            buffers = moments[0] if options.momentum else [None] * len(params)
            counts = steps if options.dampening else [None] * len(params)
            ops.lars_(params, grads, buffers, counts, options, **how)
    return params, params if masters is None else masters, [*moments[0], *moments[1]]


@IMPLS
@DTYPES
@pytest.mark.parametrize(("options", "change"), CHANGES, ids=str)
def test_masters_follow_the_float64_reference_and_parameters_are_their_rounding(impl, dtype, options, change):
    options = replace(options, **change)
    _, exact, exact_state = three_steps(options, "reference", dtype, exact=True)
    params, masters, state = three_steps(options, impl, dtype, exact=False, device=DEVICE)
    for m, e in zip([*masters, *state], [*exact, *exact_state], strict=True):
        largest = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(m.cpu().double(), e, rtol=2e-5, atol=2e-6 * largest)
    for p, m in zip(params, masters, strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, m.to(dtype))


@FLAGS
@DTYPES
def test_steps_too_small_for_the_parameter_add_up(flags, dtype):
    # Below 1 neighbours are 2^-8 (bfloat16) or 2^-11 (float16) apart, so steps of 2^-13 round away. 64 make 2^-7.
    rate = 2.0**-13
    params = [nn.Parameter(torch.ones(5, dtype=dtype, device=DEVICE)) for _ in range(2)]
    kept = LARS(params[:1], lr=rate, momentum=0.0, master_weights=True, **flags)
    lost = LARS(params[1:], lr=rate, momentum=0.0, **flags)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(64):
        kept.step()
        lost.step()
    assert params[0].tolist() == [1 - 2.0**-7] * 5
    assert params[1].tolist() == [1.0] * 5


@BOTH
@FLAGS
def test_what_others_write_to_a_parameter_reaches_its_master(optimizer, flags):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(7, 3, device=DEVICE).bfloat16())
    opt = optimizer([param], lr=0.1, weight_decay=0.1, master_weights=True, **flags)
    param.grad = torch.randn_like(param)
    opt.step()
    master = opt.state[param]["master"]
    before = master.clone()
    with torch.no_grad():
        param[2] = 3.0
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert torch.equal(master[2], torch.full_like(master[2], 3.0))
    rest = [0, 1, 3, 4, 5, 6]
    assert torch.equal(master[rest], before[rest])
    assert not torch.equal(before[rest], param[rest].float())
    assert torch.equal(param, master.bfloat16())


@BOTH
@FLAGS
def test_only_low_precision_parameters_have_masters_and_dtypes_may_be_mixed(optimizer, flags):
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64][: 3 if "fused" in flags else 4]
    params = [nn.Parameter(torch.randn(5, 3, device=DEVICE).to(d)) for d in dtypes]
    apart = [nn.Parameter(p.detach().clone()) for p in params]
    options = {"lr": 0.1, "weight_decay": 0.1, "master_weights": True, **flags}
    opt = optimizer(params, **options)
    opts = [optimizer([p], **options) for p in apart]
    for _ in range(3):
        for p, a in zip(params, apart, strict=True):
            p.grad = a.grad = torch.randn_like(p)
        opt.step()
        for o in opts:
            o.step()
    for p, a in zip(params, apart, strict=True):
        assert torch.equal(p, a)
        assert ("master" in opt.state[p]) == (p.dtype in (torch.bfloat16, torch.float16))


@BOTH
@FLAGS
def test_a_found_inf_changes_neither_the_parameter_nor_its_master(optimizer, flags):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(7, 3, device=DEVICE).bfloat16())
    opt = optimizer([param], lr=0.1, weight_decay=0.1, master_weights=True, **flags)
    param.grad = torch.randn_like(param)
    opt.step()
    before = copy.deepcopy([param.detach(), *opt.state[param].values()])
    opt.found_inf = torch.ones((), device=DEVICE)
    opt.step()
    for now, then in zip([param.detach(), *opt.state[param].values()], before, strict=True):
        assert torch.equal(now, then)


@BOTH
@FLAGS
def test_masters_survive_a_checkpoint_without_a_cast(optimizer, flags):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(7, 3, device=DEVICE).bfloat16())
    opt = optimizer([param], lr=0.01, weight_decay=0.1, master_weights=True, **flags)
    grads = [torch.randn_like(param) for _ in range(4)]
    for grad in grads[:2]:
        param.grad = grad
        opt.step()
    again = nn.Parameter(param.detach().clone())
    resumed = optimizer([again], lr=0.01, **flags)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert resumed.param_groups[0]["master_weights"] is True
    assert resumed.state[again]["master"].dtype == torch.float32
    assert torch.equal(resumed.state[again]["master"], opt.state[param]["master"])
    for grad in grads[2:]:
        param.grad = again.grad = grad
        opt.step()
        resumed.step()
    assert torch.equal(param, again)
    assert torch.equal(resumed.state[again]["master"], opt.state[param]["master"])


@BOTH
def test_a_checkpoint_without_masters_starts_them_from_the_parameters(optimizer):
    param = nn.Parameter(torch.randn(7, 3).bfloat16())
    param.grad = torch.randn_like(param)
    opt = optimizer([param], lr=0.01)
    opt.step()
    opt.param_groups[0]["master_weights"] = True
    before = param.detach().float()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert torch.equal(opt.state[param]["master"], before)


@BOTH
def test_a_master_that_is_none_in_a_checkpoint_begins_as_the_parameter(optimizer):
    param = nn.Parameter(torch.full((3,), 2.0, dtype=torch.bfloat16))
    opt = optimizer([param], lr=1.0, weight_decay=0.0, master_weights=True)
    param.grad = torch.ones_like(param)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["master"] = None
    opt.load_state_dict(saved)
    assert opt.state[param].get("master") is None
    with torch.no_grad():
        param.fill_(8.0)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert opt.state[param]["master"].tolist() == [8.0] * 3


@BOTH
def test_distributed_checkpointing_keeps_masters(optimizer):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    again = copy.deepcopy(model)
    opt, fresh = (optimizer(m.parameters(), lr=0.01, master_weights=True) for m in (model, again))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, fresh, get_optimizer_state_dict(model, opt))
    for p, a in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(fresh.state[a]["master"], opt.state[p]["master"])
        assert fresh.state[a]["master"].dtype == torch.float32


def test_steps_name_masters_that_do_not_fit():
    p = [torch.zeros(2, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"masters must hold one entry a parameter, 1, got 0"):
        ops.lars_(p, p, [None], [None], replace(LARS_OPTIONS, momentum=0.0), masters=[])
    with pytest.raises(TypeError, match=r"masters must be at least float32, got torch.bfloat16"):
        ops.lars_(p, p, [None], [None], replace(LARS_OPTIONS, momentum=0.0), masters=p)
    mixed, none = [torch.zeros(2), *p], [None, None]  # the first is its own master
    with pytest.raises(ValueError, match=r"masters must have their parameter's shape \(2,\), got \(3,\)"):
        ops.lars_(mixed, mixed, none, none, replace(LARS_OPTIONS, momentum=0.0), masters=[None, torch.zeros(3)])


@BOTH
def test_master_weights_must_be_true_or_false(optimizer):
    with pytest.raises(ValueError, match="master_weights must be one of True, False, got 'yes'"):
        optimizer([torch.zeros(2)], master_weights="yes")


@FLAGS
@BOTH
def test_a_parameter_without_a_master_may_join_those_that_have_one(optimizer, flags):
    params = [nn.Parameter(torch.ones(3, dtype=dtype, device=DEVICE)) for dtype in (torch.bfloat16, torch.float32)]
    stepped = optimizer(params, lr=0.1, weight_decay=0.0, master_weights=True, **flags)
    for number in (1, 1, 2):  # of those that have a gradient
        for param in params[:number]:
            param.grad = torch.ones_like(param)
        stepped.step()
    # Without decay there is no trust ratio: the weight moves by lr in its first step.
    torch.testing.assert_close(params[1].detach().cpu(), torch.full((3,), 0.9), rtol=1e-5, atol=0)
