"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from optim_params import BOTH, FLAGS, IMPLS
from test_ops_trust_ratio import LAMB as LAMB_OPTIONS
from test_ops_trust_ratio import LAMB_CHANGES, LARS_CHANGES
from test_ops_trust_ratio import LARS as LARS_OPTIONS

from fastlocal import LAMB, LARS
from fastlocal.kernels import lamb
from fastlocal.kernels.rounding import round_to
from fastlocal.kernels.trust_ratio_common import BLOCK, CHUNK, norm_kernel
from fastlocal.kernels.trust_ratio_tables import buckets
from fastlocal.kernels.trust_ratio_upload import Staging
from fastlocal.ops import trust_ratio as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Below, at and above a chunk, nothing, one element, a zero tensor (index 3), a number, a tail of three.
SHAPES = [(CHUNK + 3,), (1,), (0,), (5,), (), (2, 3, 4, 5)]
# What three steps' roundings of the weights may add up to, relative to the largest weight.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
WITHOUT_RATIO = replace(LARS_OPTIONS, momentum=0.0, weight_decay=0.0, adapt="decayed")  # w - lr g


def tensors(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    made[3].zero_()
    return made


def in_float32(change):
    """The change with tensors as float32, the dtype of the hyper-parameters on the device."""
    return {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in change.items()}


def lamb_steps(impl, device, dtype, state_dtype, options, seeds=(1, 2, 3), scale=None, found_inf=None):
    params = [p.to(device, state_dtype if state_dtype == torch.float64 else dtype) for p in tensors(0, dtype)]
    first, second = ([torch.zeros_like(p, dtype=state_dtype) for p in params] for _ in range(2))
    steps = [torch.zeros((), device=device) for _ in params]
    tables: dict = {}
    for seed in seeds:
        grads = [(g * 0.01).to(device, params[0].dtype) for g in tensors(seed, dtype)]
        kept = [g.clone() for g in grads]
        norm = ops.grad_norm(grads, impl=impl, tables=tables.setdefault("norm", {}))
        scaling: dict[str, Any] = {"grad_scale": scale, "found_inf": found_inf}
        ops.lamb_(params, grads, first, second, steps, options, norm=norm, **scaling, impl=impl, tables=tables)
        assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    return params, [*first, *second, *steps]


def lars_steps(impl, device, dtype, state_dtype, options, seeds=(1, 2, 3), scale=None, found_inf=None):
    params = [p.to(device, state_dtype if state_dtype == torch.float64 else dtype) for p in tensors(0, dtype)]
    buffers = [torch.zeros_like(p, dtype=state_dtype) if options.momentum else None for p in params]
    counted = options.momentum and options.dampening
    steps = [torch.zeros((), device=device) if counted else None for _ in params]
    tables: dict = {}
    for seed in seeds:
        grads = [(g * 0.01).to(device, params[0].dtype) for g in tensors(seed, dtype)]
        kept = [g.clone() for g in grads]
        ops.lars_(
            params,
            grads,
            buffers,
            steps,
            options,
            grad_scale=scale,
            found_inf=found_inf,
            impl=impl,
            tables=tables,
        )
        assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    return params, [t for t in (*buffers, *steps) if t is not None]


def assert_within(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        largest = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a.cpu().double(), e.double(), rtol=10 * tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("change", LAMB_CHANGES, ids=str)
def test_lamb_kernels_match_the_float64_reference(change):
    options = replace(LAMB_OPTIONS, **in_float32(change))
    params, state = lamb_steps("triton", DEVICE, torch.float32, torch.float32, options)
    exact, exact_state = lamb_steps("reference", "cpu", torch.float32, torch.float64, options)
    assert_within(params, exact, TOLERANCE[torch.float32])
    assert_within(state, exact_state, 2e-6)


@pytest.mark.parametrize("change", LARS_CHANGES, ids=str)
def test_lars_kernels_match_the_float64_reference(change):
    options = replace(LARS_OPTIONS, **in_float32(change))
    params, state = lars_steps("triton", DEVICE, torch.float32, torch.float32, options)
    exact, exact_state = lars_steps("reference", "cpu", torch.float32, torch.float64, options)
    assert_within(params, exact, TOLERANCE[torch.float32])
    assert_within(state, exact_state, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_step_low_precision_weights_as_the_reference_does(dtype):
    # One step from equal weights: the results may differ by one rounding of the weight, and rarely do.
    for run, options in ((lamb_steps, LAMB_OPTIONS), (lars_steps, LARS_OPTIONS)):
        options = replace(options, lr=0.5)
        params, state = run("triton", DEVICE, dtype, torch.float32, options, seeds=(1,))
        expected, expected_state = run("reference", "cpu", dtype, torch.float32, options, seeds=(1,))
        assert_within(state, expected_state, 1e-6)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.cpu(), e, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        same = [(p.cpu() == e).double().mean() for p, e in zip(params, expected, strict=True) if p.numel() > 100]
        assert min(same) > 0.99


@triton.jit
def round_kernel(values, rounded, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(rounded + places, round_to(tl.load(values + places), tl.bfloat16))


def test_every_nan_stays_one_where_it_is_rounded_to_bfloat16_and_ties_go_to_even():
    # The NaN that a GPU computes has all its digits set; of another the upper half is an infinity's.
    bits = [0x7FFFFFFF, -1, 0x7F800001, 0x7F800001 - 2**31, 0x7F800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000]
    values = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    rounded = torch.empty(8, dtype=torch.bfloat16, device=DEVICE)
    round_kernel[(1,)](values, rounded, 8)
    assert rounded.isnan().tolist() == [True] * 4 + [False] * 4
    assert rounded[4:].tolist() == [math.inf, math.inf, 1.0, 1 + 2**-6]


def test_a_step_repeated_gives_the_same_bits():
    for run, options in ((lamb_steps, LAMB_OPTIONS), (lars_steps, LARS_OPTIONS)):
        first, second = (run("triton", DEVICE, torch.float32, torch.float32, options) for _ in range(2))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b)


def test_the_loss_scale_is_undone_on_the_device():
    scale = torch.tensor(8.0, device=DEVICE)
    options = replace(LAMB_OPTIONS, **{"max_grad_norm": 0.05})
    scaled, _ = lamb_steps("triton", DEVICE, torch.float32, torch.float32, options, scale=scale)
    exact, _ = lamb_steps("reference", "cpu", torch.float32, torch.float64, options, scale=scale.cpu().double())
    assert_within(scaled, exact, 2e-6)
    for change in ({}, {"norm": "joint"}):
        lars = replace(LARS_OPTIONS, **change)
        scaled, _ = lars_steps("triton", DEVICE, torch.float32, torch.float32, lars, scale=scale)
        exact, _ = lars_steps("reference", "cpu", torch.float32, torch.float64, lars, scale=scale.cpu().double())
        assert_within(scaled, exact, 2e-6)


def test_a_found_inf_changes_nothing_not_even_the_count():
    found = torch.ones((), device=DEVICE)
    params, state = lamb_steps("triton", DEVICE, torch.float32, torch.float32, LAMB_OPTIONS, found_inf=found)
    assert all(torch.equal(p.cpu(), e) for p, e in zip(params, tensors(0, torch.float32), strict=True))
    assert all(not s.any() for s in state)
    lars = replace(LARS_OPTIONS, **{"dampening": 0.5})
    params, state = lars_steps("triton", DEVICE, torch.float32, torch.float32, lars, found_inf=found)
    assert all(torch.equal(p.cpu(), e) for p, e in zip(params, tensors(0, torch.float32), strict=True))
    assert all(not s.any() for s in state)
    zero = torch.zeros((), device=DEVICE)
    stepped, _ = lars_steps("triton", DEVICE, torch.float32, torch.float32, lars, found_inf=zero)
    exact, _ = lars_steps("reference", "cpu", torch.float32, torch.float64, lars)
    assert_within(stepped, exact, 2e-6)


def test_a_bias_correction_keeps_its_digits_at_the_first_step():
    # 1 − 0.999 in float32 is off by 1e-5. With g = 1: m̂ = 1 and √v̂ = 1 exactly, u = 1/(1 + ε).
    params = [torch.ones(4, device=DEVICE)]
    grads = [torch.ones(4, device=DEVICE)]
    first, second = ([torch.zeros(4, device=DEVICE)] for _ in range(2))
    options = replace(LAMB_OPTIONS, **{"betas": (0.9, 0.9999), "weight_decay": 0.0, "adapt": "decayed"})
    ops.lamb_(params, grads, first, second, [torch.zeros((), device=DEVICE)], options, impl="triton")
    assert params[0][0].item() == pytest.approx(1 - 0.1 / (1 + 1e-6), abs=1.2e-7)


def last(tensor):
    return tensor.to(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize(
    "layout",
    ["channels_last", "channels_last weight", "channels_last gradient", "gaps", "unaligned", "transposed"],
)
def test_fused_steps_do_not_depend_on_strides_or_alignment(optimizer, layout):
    torch.manual_seed(0)
    weight, grad = torch.randn(4, 6, 3, 5, device=DEVICE), torch.randn(4, 6, 3, 5, device=DEVICE)
    laid_out = {
        "channels_last": (last(weight), last(grad)),
        "channels_last weight": (last(weight), grad),
        "channels_last gradient": (weight, last(grad)),
        "gaps": (torch.randn(4, 6, 3, 10, device=DEVICE)[..., ::2], grad),
        "unaligned": (torch.randn(361, device=DEVICE)[1:].view(4, 6, 3, 5), grad),
        "transposed": (weight.transpose(0, 3).contiguous().transpose(0, 3), grad),
    }[layout]
    strided = torch.nn.Parameter(laid_out[0])
    exact = torch.nn.Parameter(laid_out[0].cpu().double().contiguous())
    fused = optimizer([strided], lr=0.1, weight_decay=0.1, fused=True)
    plain = optimizer([exact], lr=0.1, weight_decay=0.1, foreach=False)
    for factor in (1.0, -0.5, 2.0):
        strided.grad = laid_out[1] * factor
        exact.grad = strided.grad.cpu().double().contiguous()
        fused.step()
        plain.step()
    torch.testing.assert_close(strided.detach().cpu().double(), exact.detach(), rtol=1e-5, atol=1e-6)
    assert strided.data_ptr() == laid_out[0].data_ptr()


@BOTH
def test_fused_steps_follow_new_gradients_reloaded_state_moved_weights_and_changed_options(optimizer):
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(7, 3, device=DEVICE)),
        torch.nn.Parameter(torch.randn(3, device=DEVICE)),
    ]
    exact = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    fused = optimizer(params, lr=0.1, weight_decay=0.1, fused=True)
    plain = optimizer(exact, lr=0.1, weight_decay=0.1, foreach=False)

    def step():
        for p, e in zip(params, exact, strict=True):
            p.grad = torch.randn_like(p)
            e.grad = p.grad.cpu().double()
        fused.step()
        plain.step()
        for p, e in zip(params, exact, strict=True):
            torch.testing.assert_close(p.detach().cpu().double(), e.detach(), rtol=1e-5, atol=1e-6)

    step()
    step()
    fused.load_state_dict(fused.state_dict())
    step()
    params[0].data = params[0].data.clone()
    step()
    for opt in (fused, plain):
        opt.param_groups[0].update(lr=0.01, adapt="matrices")
    step()
    for opt in (fused, plain):
        opt.param_groups[0].update(weight_decay=0.0, adapt="decayed")
    step()


@BOTH
def test_fused_steps_take_mixed_dtypes_in_one_group(optimizer):
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(9, 5).to(DEVICE, d)) for d in (torch.float32, torch.bfloat16, torch.float16)
    ]
    exact = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    extra: dict[str, Any] = {"max_grad_norm": 1.0} if optimizer is LAMB else {}
    fused = optimizer(params, lr=0.1, weight_decay=0.1, fused=True, **extra)
    plain = optimizer(exact, lr=0.1, weight_decay=0.1, foreach=False, **extra)
    for p, e in zip(params, exact, strict=True):
        p.grad = torch.randn_like(p)
        e.grad = p.grad.cpu().double()
    fused.step()
    plain.step()
    for p, e in zip(params, exact, strict=True):
        torch.testing.assert_close(
            p.detach().cpu().double(), e.detach(), rtol=2 * torch.finfo(p.dtype).eps, atol=1e-6
        )


@BOTH
def test_the_matrices_alone_have_a_ratio_in_a_group_of_several_dtypes_too(optimizer):
    torch.manual_seed(0)
    kinds = ((3,), torch.float32), ((3,), torch.bfloat16), ((3, 2), torch.float32)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=DEVICE)) for shape, dtype in kinds]
    exact = [torch.nn.Parameter(param.detach().cpu().double()) for param in params]
    options = {"lr": 0.1, "weight_decay": 0.1, "adapt": "matrices"}
    fused, plain = optimizer(params, fused=True, **options), optimizer(exact, foreach=False, **options)
    for param, twin in zip(params, exact, strict=True):
        param.grad = torch.randn_like(param)
        twin.grad = param.grad.cpu().double()
    fused.step()
    plain.step()
    for param, twin in zip(params, exact, strict=True):
        digit = 2**-8 if param.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(param.detach().cpu().double(), twin.detach(), rtol=digit, atol=1e-6)


def test_the_norm_of_gradients_of_several_dtypes_is_that_of_their_concatenation():
    grads = [g.to(DEVICE) for d in (torch.float32, torch.bfloat16) for g in tensors(1, d)]
    expected = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads))
    assert ops.grad_norm(grads, impl="triton").item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)])
@IMPLS
def test_lamb_clips_by_the_norm_of_its_own_gradients_where_none_is_given(impl, dtypes):
    options = replace(LAMB_OPTIONS, max_grad_norm=0.5)
    results = []
    for given in (True, False):
        params = [p.to(DEVICE) for d in dtypes for p in tensors(0, d)]
        first, second = ([torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2))
        steps, tables = [torch.zeros((), device=DEVICE) for _ in params], {}
        for seed in (1, 2):  # the second step finds the tables of the first
            grads = [g.to(DEVICE) for d in dtypes for g in tensors(seed, d)]
            norm = ops.grad_norm(grads, impl=impl) if given else None
            ops.lamb_(params, grads, first, second, steps, options, norm=norm, impl=impl, tables=tables)
        results.append([*params, *first, *second])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def pair_of_optimizers(optimizer, shapes, extra=None):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in shapes]
    exact = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, **(extra or {})}
    fused, plain = optimizer(params, fused=True, **options), optimizer(exact, foreach=False, **options)

    def step(grads):
        for p, e, g in zip(params, exact, grads, strict=True):
            p.grad, e.grad = g, None if g is None else g.cpu().double().contiguous()
        fused.step()
        plain.step()
        for p, e in zip(params, exact, strict=True):
            torch.testing.assert_close(p.detach().cpu().double(), e.detach(), rtol=1e-5, atol=1e-6)

    return params, exact, fused, plain, step


FORMS = pytest.mark.parametrize(
    ("optimizer", "extra"), [(LAMB, {}), (LAMB, {"max_grad_norm": 1.0}), (LARS, {}), (LARS, {"dampening": 0.5})]
)


@FORMS
def test_fused_steps_see_gradients_that_move_vanish_and_change_their_layout(optimizer, extra):
    params, _, _, _, step = pair_of_optimizers(optimizer, [(4, 6), (6, 4), (5,)], extra)

    def random():
        return [torch.randn_like(p) for p in params]

    first, second = random(), random()
    for grads in (first, second, first, second):  # addresses alternate, values stay
        step(grads)
    step([None, *random()[1:]])
    step([random()[0], None, random()[2]])
    step(random())
    for _ in range(2):  # in place, so that only the layout differs from the gradient before
        memory = [torch.randn(24, device=DEVICE), torch.randn(24, device=DEVICE)]
        end = torch.randn(5, device=DEVICE)
        step([memory[0].view(4, 6), memory[1].view(6, 4), end])
        step([memory[0].view(6, 4).T, memory[1].view(6, 4), end])
        step([memory[0].view(4, 6), memory[1].view(4, 6).T, end])
    step([torch.randn(25, device=DEVICE)[1:].view(4, 6), *random()[1:]])  # no longer a multiple of 16
    step(random())


@FORMS
def test_fused_steps_see_state_replaced_state_moved_and_groups_added(optimizer, extra):
    params, exact, fused, plain, step = pair_of_optimizers(optimizer, [(7, 3), (3,)], extra)
    name = "exp_avg" if optimizer is LAMB else "momentum_buffer"

    def random():
        return [torch.randn_like(p) for p in params]

    step(random())
    step(random())
    for opt, first in ((fused, params[0]), (plain, exact[0])):
        opt.state[first][name] = opt.state[first][name] * 0.5
    step(random())
    for opt, first in ((fused, params[0]), (plain, exact[0])):
        opt.state[first][name].data = opt.state[first][name] * 0.5
    step(random())
    for opt, first in ((fused, params[0]), (plain, exact[0])):
        opt.state[first] = {key: value.clone() * 1.0 for key, value in opt.state[first].items()}
    step(random())
    for opt, first in ((fused, params[0]), (plain, exact[0])):
        del opt.state[first][name]
    step(random())
    for opt, first in ((fused, params[0]), (plain, exact[0])):
        del opt.state[first]
    step(random())
    params.append(torch.nn.Parameter(torch.randn(4, 4, device=DEVICE)))
    exact.append(torch.nn.Parameter(params[-1].detach().cpu().double()))
    fused.add_param_group({"params": params[-1:], "lr": 0.3})
    plain.add_param_group({"params": exact[-1:], "lr": 0.3})
    step(random())
    step(random())
    for group in (fused.param_groups[0], plain.param_groups[0]):
        group["lr"] = 0.01
    step(random())


def exchange(first, second):
    first.data, second.data = second.data, first.data


@FORMS
def test_fused_steps_see_memory_exchanged_between_tensors_of_one_shape(optimizer, extra):
    params, exact, fused, plain, step = pair_of_optimizers(optimizer, [(7, 3), (7, 3), (3,)], extra)
    names = {LAMB: ["exp_avg", "exp_avg_sq"], LARS: ["momentum_buffer"]}[optimizer]

    def random():
        return [torch.randn_like(p) for p in params]

    grads = random()
    step(grads)
    for name in names:
        for opt, own in ((fused, params), (plain, exact)):
            exchange(opt.state[own[0]][name], opt.state[own[1]][name])
        step(grads)
    for own in (params, exact):
        exchange(own[0], own[1])
    step(grads)
    exchange(grads[0], grads[1])
    step(grads)
    for opt, own in ((fused, params), (plain, exact)):
        opt.state[own[0]], opt.state[own[1]] = opt.state[own[1]], opt.state[own[0]]
    step(grads)
    for opt, own in ((fused, params), (plain, exact)):
        for name in set(opt.state[own[0]]) - set(names):  # the count of steps, of another memory and value
            opt.state[own[0]][name].data = torch.full_like(opt.state[own[0]][name], 7.0)
    step(grads)
    step(random())


@FORMS
def test_fused_steps_never_read_memory_that_state_has_left(optimizer, extra):
    params, _, fused, _, step = pair_of_optimizers(optimizer, [(70, 3), (3,)], extra)
    grads = [torch.randn_like(p) for p in params]
    step(grads)
    for _ in range(3):  # what an offloading framework does: away, the memory for something else, back
        for tensor in fused.state[params[0]].values():
            tensor.data = tensor.cpu().clone()
        others = [torch.full_like(params[0], float("nan")) for _ in range(4)]
        for tensor in fused.state[params[0]].values():
            tensor.data = tensor.to(DEVICE).clone()
        step(grads)
        assert all(other.isnan().all() for other in others)


def test_a_gradient_of_another_dtype_in_the_same_memory_is_read_as_such():
    options = replace(LARS_OPTIONS, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.1, lr=0.1)
    memory = torch.randn(24, device=DEVICE)
    half = memory.view(torch.bfloat16)[:24].view(4, 6)
    param = torch.randn(4, 6, device=DEVICE)
    exact, tables = param.cpu().double(), {}
    for grad in (memory.view(4, 6), half, memory.view(4, 6), half):
        grad.copy_(torch.randn(4, 6))
        ops.lars_([param], [grad], [None], [None], options, impl="triton", tables=tables)
        ops.lars_([exact], [grad.cpu().double()], [None], [None], options, impl="reference")
        torch.testing.assert_close(param.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), TypeError, "state must be float32 .* got torch.float64"),
        (
            torch.zeros(4, dtype=torch.bfloat16),
            TypeError,
            "momentum_buffers must be at least float32, got .*bfloat16",
        ),
        (torch.zeros(5), ValueError, r"must have their parameter's shape \(4,\), got \(5,\)"),
        (torch.zeros(4, device="meta"), RuntimeError, "must be on the parameter's .*, got meta"),
    ],
)
def test_state_that_the_kernels_would_misread_is_refused(state, error, message):
    param = torch.randn(4, device=DEVICE)
    moved = state if state.is_meta else state.to(DEVICE)
    options = replace(LARS_OPTIONS, dampening=0.0, nesterov=False)
    with pytest.raises(error, match=message):
        ops.lars_([param], [torch.ones_like(param)], [moved], [None], options, impl="triton")


def test_a_count_of_steps_that_the_kernels_would_misread_is_refused():
    param = torch.randn(4, device=DEVICE)
    first, second = (torch.zeros_like(param) for _ in range(2))
    for dtype in (torch.float64, torch.int64):
        step = torch.zeros((), dtype=dtype, device=DEVICE)
        with pytest.raises(TypeError, match=f"state must be float32 .* got {dtype}"):
            ops.lamb_([param], [param], [first], [second], [step], LAMB_OPTIONS, impl="triton")
    step = torch.zeros((), device="meta")
    with pytest.raises(RuntimeError, match=f"must be on the parameter's {param.device}, got meta"):
        ops.lamb_([param], [param], [first], [second], [step], LAMB_OPTIONS, impl="triton")


def test_tensors_with_gaps_are_read_and_written_without_them_where_no_state_says_how_they_lie():
    memory = torch.full((3, 8), 100.0, device=DEVICE)
    gradient = memory[:, ::2].fill_(2.0)
    assert ops.grad_norm([gradient], impl="triton").item() == pytest.approx(48**0.5)
    weights = torch.full((3, 8), 100.0, device=DEVICE)
    param = weights[:, ::2].fill_(1.0)
    ops.lars_([param], [gradient], [None], [None], WITHOUT_RATIO, impl="triton")
    torch.testing.assert_close(weights.cpu(), torch.tensor([0.8, 100.0] * 4).expand(3, 8), rtol=1e-6, atol=0)


def test_a_gradient_expanded_from_one_value_is_read_and_not_written_to():
    param, value = torch.ones(3, 4, device=DEVICE), torch.full((), 2.0, device=DEVICE)
    ops.lars_([param], [value.expand(3, 4)], [None], [None], WITHOUT_RATIO, impl="triton")
    torch.testing.assert_close(param, torch.full_like(param, 0.8), rtol=1e-6, atol=0)
    assert value.item() == 2.0


def test_gradients_that_are_transposed_in_turn_where_they_lie_are_read_as_they_are():
    first, second = (torch.arange(16.0, device=DEVICE).view(4, 4) + n for n in (0, 16))
    params = [torch.zeros(4, 4, device=DEVICE) for _ in range(2)]
    options = replace(WITHOUT_RATIO, lr=1.0)
    tables: dict = {}
    for grads in ([first.T, second], [first, second.T], [first.T, second]):
        before = [param.clone() for param in params]
        ops.lars_(params, grads, [None] * 2, [None] * 2, options, impl="triton", tables=tables)
        assert all(torch.equal(b - g, param) for b, g, param in zip(before, grads, params, strict=True))


@BOTH
def test_a_sparse_gradient_after_dense_ones_is_refused_by_name(optimizer):
    params, _, fused, _, step = pair_of_optimizers(optimizer, [(4, 6)])
    step([torch.randn_like(params[0])])
    params[0].grad = torch.randn_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="do not support sparse gradients"):
        fused.step()


def test_lars_follows_a_momentum_and_a_dampening_set_between_fused_steps():
    params, _, fused, plain, step = pair_of_optimizers(LARS, [(7, 3), (3,)], {"momentum": 0.0})
    for change in ({}, {"momentum": 0.9}, {"dampening": 0.5}, {"momentum": 0.0}, {"momentum": 0.5}):
        for group in (fused.param_groups[0], plain.param_groups[0]):
            group.update(change)
        step([torch.randn_like(p) for p in params])
        step([torch.randn_like(p) for p in params])


def test_the_norm_of_gradients_of_other_sizes_is_theirs():
    tables: dict = {}
    for size in (10, 1000, 4, 2 * CHUNK):
        norm = ops.grad_norm([torch.ones(size, device=DEVICE)], impl="triton", tables=tables)
        assert norm.item() == pytest.approx(size**0.5)


def test_heads_that_take_turns_are_clipped_by_their_own_norm():
    torch.manual_seed(0)
    body, small, large = (torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in (6, 10, 1000))
    exact = [torch.nn.Parameter(p.detach().cpu().double()) for p in (body, small, large)]
    options = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0}
    fused = LAMB([{"params": [body]}, {"params": [small, large], "weight_decay": 0.0}], fused=True, **options)
    plain = LAMB([{"params": exact[:1]}, {"params": exact[1:], "weight_decay": 0.0}], foreach=False, **options)
    for head in (1, 2, 1, 2):
        for index, (param, twin) in enumerate(zip((body, small, large), exact, strict=True)):
            param.grad = torch.randn_like(param) if index in (0, head) else None
            twin.grad = None if param.grad is None else param.grad.cpu().double()
        fused.step()
        plain.step()
    for param, twin in zip((body, small, large), exact, strict=True):
        torch.testing.assert_close(param.detach().cpu().double(), twin.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_a_parameter_cut_in_place_is_refused_and_nothing_beyond_it_is_written(optimizer):
    param = torch.nn.Parameter(torch.ones(10, device=DEVICE))
    fused = optimizer([param], lr=0.1, weight_decay=0.1, fused=True)
    param.grad = torch.ones_like(param)
    fused.step()
    whole, before = param.data, param.detach().clone()
    param.data = whole[:5]  # at the same address
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"must have their parameter's shape \(5,\), got \(10,\)"):
        fused.step()
    assert torch.equal(whole, before)


def test_a_gradient_that_moves_off_a_multiple_of_16_bytes_leaves_the_bucket_whose_loads_need_one():
    param, memory = torch.zeros(64, device=DEVICE), torch.zeros(65, device=DEVICE)
    cache: dict = {}
    for grad, aligned in ((memory[:64], True), (memory[1:], False)):
        (bucket,) = buckets(cache, "step", [[param], [grad]], (0,), None, lambda _: True)
        assert bucket.aligned == aligned
        assert bucket.pointers.tolist() == [[param.data_ptr()], [grad.data_ptr()]]


def test_memory_set_aside_for_captures_is_given_out_once_at_multiples_of_16_and_renewed_when_used(monkeypatch):
    # Pinned memory needs a GPU.
    monkeypatch.setattr(Staging, "_pinned", lambda self, size: torch.full((size,), 77, dtype=torch.uint8))
    staging = Staging()
    staging.set_aside(0)
    assert staging._aside is None
    staging.set_aside(100)
    first = staging._aside
    assert first is not None
    staging.set_aside(100)
    assert staging._aside is first
    tables = [torch.arange(3, dtype=torch.int32), torch.arange(4).view(2, 2), torch.tensor([7], dtype=torch.int32)]
    placed = [staging.place(table) for table in tables]
    assert [table.data_ptr() - first.data_ptr() for table in placed] == [0, 16, 48]
    staging.set_aside(100)
    (renewed := staging.place(torch.tensor([5, 6, 7]))).add_(1)
    assert renewed.tolist() == [6, 7, 8]
    for table, copy in zip(tables, placed, strict=True):
        assert copy.dtype == table.dtype
        assert torch.equal(copy, table)
    staging.set_aside(8000)
    assert staging.place(torch.arange(2000)).tolist() == list(range(2000))  # twice the bytes, for another division
    staging.set_aside(1)
    last = staging._aside
    staging.set_aside(8000)
    assert staging._aside is not last


def test_more_tensors_than_one_program_prepares_are_all_stepped(monkeypatch):
    monkeypatch.setattr(lamb, "TENSORS", 4)
    params = [torch.nn.Parameter(torch.full((2,), 1.0 + n, device=DEVICE)) for n in range(6)]
    fused = LAMB(params, lr=0.1, weight_decay=0.0, fused=True)
    for param in params:
        param.grad = torch.ones_like(param)
    fused.step()
    # Without decay there is no trust ratio: every weight moves by lr in the first step.
    for n, param in enumerate(params):
        torch.testing.assert_close(param.detach().cpu(), torch.full((2,), 0.9 + n), rtol=1e-5, atol=0)
        assert fused.state[param]["step"].item() == 1


@pytest.mark.parametrize("view", [torch.Tensor.t, lambda data: data.view(16)])
def test_a_weight_laid_out_otherwise_where_it_lies_is_stepped_or_refused_as_without_kernels(view):
    memory = torch.arange(16.0, device=DEVICE)
    pairs = [
        (torch.nn.Parameter(memory.clone().view(4, 4)), flags) for flags in ({"fused": True}, {"foreach": False})
    ]
    said = []
    for param, flags in pairs:
        optimizer = LARS([param], lr=0.1, weight_decay=0.1, adapt="matrices", **flags)
        param.grad = memory.view(4, 4).clone()
        optimizer.step()
        param.data, param.grad = view(param.data), None
        param.grad = memory.view(param.shape).clone()
        try:
            optimizer.step()
            said.append("")
        except ValueError as error:
            said.append(str(error).split(" ", 1)[1])
    assert said[0] == said[1]
    (fused, _), (plain, _) = pairs
    torch.testing.assert_close(fused, plain)


@BOTH
def test_a_minus_sign_that_is_pending_on_a_gradient_is_read(optimizer):
    plain, negated = (torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2))
    grad = torch.tensor([1.0, -2.0, 3.0], device=DEVICE)
    plain.grad, negated.grad = grad, torch._neg_view(-grad)  # pyright: ignore[reportPrivateImportUsage]
    for param in (plain, negated):
        optimizer([param], lr=0.1, fused=True).step()
    assert negated.grad.is_neg()
    assert torch.equal(plain, negated)
    assert torch.equal(plain.sign() * (1 - plain).sign(), grad.sign())


def test_a_gradient_that_is_nan_spreads_through_the_norm_that_clips():
    params = [torch.nn.Parameter(torch.ones(4, device=DEVICE)) for _ in range(2)]
    fused = LAMB(params, lr=0.1, max_grad_norm=1.0, fused=True)
    for param, value in zip(params, (100.0, float("nan")), strict=True):
        param.grad = torch.full_like(param, value)
    fused.step()
    assert all(fused.state[param]["exp_avg"].isnan().all() for param in params)


@IMPLS
@pytest.mark.parametrize(
    ("weight", "grad", "norm", "stepped"),
    [(0.0, 3.0, "sum", -0.3), (0.0, 3.0, "joint", -0.3), (2.0, 0.0, "sum", 1.9), (2.0, 0.0, "joint", 1.95)],
)
def test_lars_steps_zero_weights_and_zero_gradients_without_a_ratio(weight, grad, norm, stepped, impl):
    # By lr·(g + λw), lr = 0.1 and λ = 0.5. The joint norm of the last, of λw, is not zero: the ratio is η/λ = 0.5.
    options = replace(LARS_OPTIONS, momentum=0.0, weight_decay=0.5, trust_coefficient=0.25, eps=0.0, norm=norm)
    param, grads = torch.full((5,), weight, device=DEVICE), torch.full((5,), grad, device=DEVICE)
    ops.lars_([param], [grads], [None], [None], options, impl=impl)
    torch.testing.assert_close(param.cpu(), torch.full((5,), stepped), rtol=1e-6, atol=0)


@IMPLS
@pytest.mark.parametrize(("weight", "grad", "stepped"), [(0.0, 3.0, -0.1), (2.0, 0.0, 2.0)])
def test_lamb_steps_zero_weights_and_zero_updates_without_a_ratio(weight, grad, stepped, impl):
    options = replace(LAMB_OPTIONS, weight_decay=0.0, trust_clip=None)
    param, grads = torch.full((5,), weight, device=DEVICE), torch.full((5,), grad, device=DEVICE)
    first, second = (torch.zeros(5, device=DEVICE) for _ in range(2))
    ops.lamb_([param], [grads], [first], [second], [torch.zeros((), device=DEVICE)], options, impl=impl)
    torch.testing.assert_close(param.cpu(), torch.full((5,), stepped), rtol=1e-6, atol=0)


@IMPLS
@pytest.mark.parametrize("norm", ["sum", "joint"])
def test_eps_counts_in_the_denominator_of_the_ratio_of_lars(norm, impl):
    # ‖w‖ = 5, ‖g‖ = λ‖w‖ = 1, ‖g + λw‖ = 2: either denominator is 2 + ε = 5, and the ratio is η = 0.5.
    options = replace(LARS_OPTIONS, lr=1.0, momentum=0.0, weight_decay=0.2, trust_coefficient=0.5, eps=3.0, norm=norm)
    param, grad = torch.tensor([3.0, 4.0], device=DEVICE), torch.tensor([0.6, 0.8], device=DEVICE)
    ops.lars_([param], [grad], [None], [None], options, impl=impl)
    torch.testing.assert_close(param.cpu(), torch.tensor([2.4, 3.2]), rtol=1e-6, atol=0)


def test_partial_sums_of_more_than_one_block_are_all_summed():
    sums, norm = torch.ones(2 * BLOCK + 452, device=DEVICE), torch.empty((), device=DEVICE)
    norm_kernel[(1,)](sums, len(sums), norm, BLOCK)
    assert norm.item() == 50.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_nothing_beyond_the_end_of_a_tensor_is_written(kind, dtype):
    size = 13
    params, grads, masters, first, second = (
        torch.ones(32, dtype=d, device=DEVICE) for d in (dtype, dtype, *[torch.float32] * 3)
    )
    own = [[memory[:size]] for memory in (params, grads, first, second)]
    grads[:size] = 2
    exact = {"masters": [masters[:size]] if dtype != torch.float32 else None, "impl": "triton"}
    if kind == "lamb":
        ops.lamb_(*own, [torch.zeros((), device=DEVICE)], LAMB_OPTIONS, **exact)
    else:
        ops.lars_(*own[:3], [None], LARS_OPTIONS, **exact)
    assert not first[:size].eq(1).any()
    for memory in (params, grads, masters, first, second):
        assert memory[size:].eq(1).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@IMPLS
@pytest.mark.parametrize(("bounds", "ratio"), [((0.0, 10.0), 4.0), ((5.0, 10.0), 5.0), ((0.0, 2.0), 2.0)])
def test_the_ratio_of_lamb_keeps_to_either_bound(bounds, ratio, impl):
    # u = 1, so the ratio is ‖w‖/‖u‖ = 4. Without ε what lies beyond the end of a block is 0/0.
    options = replace(LAMB_OPTIONS, weight_decay=0.0, eps=0.0, trust_clip=bounds)
    param, grad = (torch.full((2,), value, device=DEVICE) for value in (4.0, 3.0))
    first, second = (torch.zeros(2, device=DEVICE) for _ in range(2))
    ops.lamb_([param], [grad], [first], [second], [torch.zeros((), device=DEVICE)], options, impl=impl)
    torch.testing.assert_close(param.cpu(), torch.full((2,), 4 - 0.1 * ratio), rtol=1e-6, atol=0)


@FLAGS
@BOTH
def test_a_weight_that_becomes_channels_last_between_steps_meets_its_own_state(optimizer, flags):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4, 6, 3, 5, device=DEVICE))
    exact = torch.nn.Parameter(param.detach().cpu().double())
    options = {"lr": 0.1, "weight_decay": 0.1}
    stepped, plain = optimizer([param], **options, **flags), optimizer([exact], foreach=False, **options)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        exact.grad = param.grad.cpu().double().contiguous()
        stepped.step()
        plain.step()
        param.data = last(param.data)
    torch.testing.assert_close(param.detach().cpu().double(), exact.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have their parameter's dtype there")
@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_gradients_that_no_kernel_takes_are_refused_by_name_or_stepped_without_one(kind):
    for fused in (True, None):
        param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
        param.grad_dtype = None
        param.grad = torch.full((5,), 0.5, dtype=torch.float64, device=DEVICE)
        opt = kind([param], lr=0.1, fused=fused)
        if fused:
            with pytest.raises(
                RuntimeError, match="has kernels for float32, bfloat16 and float16, got torch.float64"
            ):
                opt.step()
        else:
            opt.step()
        assert torch.equal(param, torch.ones_like(param)) == bool(fused)


def test_state_laid_out_otherwise_where_the_old_one_lay_is_read_as_it_lies():
    results = []
    for impl in ("triton", "portable"):
        generator = torch.Generator().manual_seed(0)
        weight, grad, memory = (torch.randn(16, 32, generator=generator).to(DEVICE) for _ in range(3))
        tables: dict = {}
        for buffer in (memory, memory.view(32, 16).t(), memory):
            ops.lars_([weight], [grad], [buffer], [None], LARS_OPTIONS, impl=impl, tables=tables)
        results.append((weight, memory))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have their parameter's dtype there")
def test_a_weight_of_another_dtype_where_the_old_one_lay_is_read_as_such():
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, device=DEVICE))
    param.grad_dtype = None
    param.grad = torch.ones(3, device=DEVICE)
    fused = LARS([param], lr=0.1, momentum=0.9, fused=True)
    fused.step()
    param.data = param.data.view(torch.float16)
    param.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    fused.step()  # the buffer holds 1 + 0.9
    torch.testing.assert_close(param.tolist(), [0.81, 1.81, 2.81], rtol=0, atol=2e-3)


def test_float64_state_is_left_to_the_portable_steps_unless_the_kernels_were_asked_for(monkeypatch):
    monkeypatch.setattr(ops, "choose", lambda impl, device, dtype: choose_as_on_cuda(impl, dtype))
    for fused in (None, True):
        param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        optimizer = LAMB([param], lr=0.1, fused=fused, weight_decay=0.0)
        param.grad = torch.ones(3, device=DEVICE)
        optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][name] = optimizer.state[param][name].double()
        if fused:
            with pytest.raises(TypeError, match="state must be float32 for impl='triton'"):
                optimizer.step()
        else:
            optimizer.step()
            assert param.tolist() == pytest.approx([0.8] * 3, rel=1e-5)
            assert optimizer.state[param]["step"].item() == 2


def choose_as_on_cuda(impl, dtype):
    if impl == "auto":
        return "portable" if dtype == torch.float64 else "triton"
    return impl
