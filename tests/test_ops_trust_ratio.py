"""The portable implementation and the door itself, against the float64 reference."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlocal.ops import trust_ratio as ops
from fastlocal.ops.cpu_memory import CHUNK, sum_of_squares
from fastlocal.reference import trust_ratio as reference
from fastlocal.reference.trust_ratio import LambOptions, LarsOptions

LAMB = LambOptions(
    lr=0.1,
    betas=(0.9, 0.99),
    eps=1e-6,
    weight_decay=0.03,
    bias_correction=True,
    grad_averaging=True,
    max_grad_norm=None,
    trust_clip=None,
    decay="update",
    adapt="all",
    maximize=False,
)
LARS = LarsOptions(
    lr=0.1,
    momentum=0.9,
    dampening=0.0,
    weight_decay=0.03,
    nesterov=False,
    trust_coefficient=1e-3,
    eps=1e-8,
    trust_clip=False,
    norm="sum",
    momentum_form="torch",
    adapt="all",
    maximize=False,
)
SHAPES = [(33, 17), (1,), (0,), (5,), (), (2, 3, 4, 5)]
LONG = [(130, 140), (3,), (0,), (17_000,), (20_000,)]  # which are not stepped in one call with others


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    made[3].zero_()  # a zero norm
    return made


def lamb_three_steps(dtype, impl, options, shapes=SHAPES, seed=0):
    params = [p.to(dtype) for p in tensors(seed, shapes=shapes)]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    steps = [torch.zeros(()) for _ in params]
    for seed in (1, 2, 3):
        grads = [0.01 * g.to(dtype) for g in tensors(seed, shapes=shapes)]
        norm = ops.grad_norm(grads, impl=impl)
        ops.lamb_(params, grads, first, second, steps, options, norm=norm, impl=impl)
    return params + first + second


def lars_three_steps(dtype, impl, options, shapes=SHAPES):
    params = [p.to(dtype) for p in tensors(0, shapes=shapes)]
    buffers = [torch.zeros_like(p) if options.momentum else None for p in params]
    steps = [torch.zeros(()) if options.momentum and options.dampening else None for p in params]
    for seed in (1, 2, 3):
        grads = [0.01 * g.to(dtype) for g in tensors(seed, shapes=shapes)]
        ops.lars_(params, grads, buffers, steps, options, impl=impl)
    return params + [b for b in buffers if b is not None]


def assert_within(actual, expected, tolerance):
    """Within `tolerance` relatively, and a tenth of it of the tensor's largest value where digits cancel."""
    for a, e in zip(actual, expected, strict=True):
        largest = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=0.1 * tolerance * largest)


LAMB_CHANGES: list[dict[str, Any]] = [
    {"weight_decay": w, "decay": d, "maximize": m}
    for w, d, m in itertools.product([0.0, 0.03], ["update", "l2", "decoupled"], [False, True])
] + [
    {"bias_correction": "step"},
    {"bias_correction": False},
    {"grad_averaging": False},
    {"trust_clip": (0.5, 2.0)},
    {"adapt": "matrices"},
    {"adapt": "decayed"},
    {"max_grad_norm": 0.1},
    {"max_grad_norm": 100.0},
    {"lr": torch.tensor(0.1, dtype=torch.float64)},
]
LARS_CHANGES: list[dict[str, Any]] = [
    {"momentum": m, "weight_decay": w, "maximize": x}
    for m, w, x in itertools.product([0.0, 0.9], [0.0, 0.03], [False, True])
] + [
    {"dampening": 0.5},
    {"dampening": 0.5, "adapt": "matrices"},
    {"dampening": 0.5, "adapt": "decayed", "weight_decay": 0.0},
    {"momentum_form": "lr_in_buffer", "adapt": "decayed", "weight_decay": 0.0},
    {"nesterov": True},
    {"trust_coefficient": 1e-7},
    {"trust_coefficient": 1e-7, "momentum": 0.0},
    {"trust_coefficient": 2.0, "trust_clip": True},
    {"trust_coefficient": 1e-3, "trust_clip": True},
    {"norm": "joint"},
    {"norm": "joint", "maximize": True},
    {"momentum_form": "lr_in_buffer"},
    {"adapt": "matrices"},
    {"adapt": "decayed"},
]


# In one of many elements g + λw all but cancels, and m/√v is of size 1 whatever is left.
@pytest.mark.parametrize(("shapes", "tolerance"), [(SHAPES, 3e-6), (LONG, 1e-4)], ids=["short", "long"])
@pytest.mark.parametrize("change", LAMB_CHANGES, ids=str)
def test_portable_lamb_is_the_reference_to_float32_precision(change, shapes, tolerance):
    options = replace(LAMB, **change)
    exact = lamb_three_steps(torch.float64, "reference", options, shapes)
    assert_within(lamb_three_steps(torch.float32, "portable", options, shapes), exact, tolerance)
    assert_within(lamb_three_steps(torch.float64, "portable", options, shapes), exact, 1e-14)


@pytest.mark.parametrize("shapes", [SHAPES, LONG], ids=["short", "long"])
@pytest.mark.parametrize("change", LARS_CHANGES, ids=str)
def test_portable_lars_is_the_reference_to_float32_precision(change, shapes):
    options = replace(LARS, **change)
    exact = lars_three_steps(torch.float64, "reference", options, shapes)
    assert_within(lars_three_steps(torch.float32, "portable", options, shapes), exact, 3e-6)
    assert_within(lars_three_steps(torch.float64, "portable", options, shapes), exact, 1e-14)


@pytest.mark.parametrize("shapes", [SHAPES, LONG], ids=["short", "long"])
def test_a_scaled_gradient_and_its_scale_are_the_gradient(shapes):
    def stepped(dtype, scale):
        params = [p.to(dtype) for p in tensors(0, shapes=shapes)]
        grads = [scale * 0.01 * g.to(dtype) for g in tensors(1, shapes=shapes)]
        buffers, first, second = ([torch.zeros_like(p) for p in params] for _ in range(3))
        others, grad_scale = [p.clone() for p in params], torch.tensor(scale)
        ops.lars_(params, grads, buffers, [None] * len(params), LARS, grad_scale=grad_scale)
        steps = [torch.zeros(()) for _ in params]
        ops.lamb_(others, grads, first, second, steps, LAMB, grad_scale=grad_scale)
        return params + buffers + others + first + second

    assert_within(stepped(torch.float32, 1024.0), stepped(torch.float64, 1.0), 1e-4)


@pytest.mark.parametrize("impl", ["portable", "reference"])
@pytest.mark.parametrize(
    ("dtype", "nesterov", "stepped"),
    # g = 8/4 = 2, v = g: w - 0.1 v, or w - 0.1 (g + 0.9 v).
    [(torch.float64, False, 0.8), (torch.float64, True, 0.62), (torch.float32, True, 0.62)],
    ids=str,
)
def test_the_scale_is_undone_where_lars_goes_tensor_by_tensor_too(dtype, nesterov, stepped, impl):
    options = replace(LARS, weight_decay=0.0, adapt="decayed", nesterov=nesterov)
    param, grad, buffer = torch.ones(3, dtype=dtype), torch.full((3,), 8.0, dtype=dtype), torch.zeros(3, dtype=dtype)
    ops.lars_([param], [grad], [buffer], [None], options, grad_scale=torch.tensor(4.0), impl=impl)
    assert buffer.tolist() == [2.0] * 3
    assert param.tolist() == pytest.approx([stepped] * 3, rel=1e-6)


@pytest.mark.parametrize("bias_correction", [False, "step"])
@pytest.mark.parametrize("impl", ["portable", "reference"])
@pytest.mark.parametrize("shape", [(4,), (130, 140)], ids=["short", "long"])
def test_moments_of_a_long_memory_are_not_corrected_where_none_asks_for_it(shape, impl, bias_correction):
    # m = 0.1, v = 1e-6, u = 100; the "step" is corrected by √1e-6 / 0.1 instead. 0.999999¹⁰⁰⁰⁰ would still be 0.99.
    options = replace(LAMB, betas=(0.9, 1 - 1e-6), eps=0.0, weight_decay=0.0, adapt="decayed", lr=0.01)
    options = replace(options, bias_correction=bias_correction)
    param, grad, first, second = (torch.full(shape, value) for value in (3.0, 1.0, 0.0, 0.0))
    ops.lamb_([param], [grad], [first], [second], [torch.zeros(())], options, impl=impl)
    expected = 3.0 - 0.01 * (1.0 if bias_correction else 100.0)
    torch.testing.assert_close(param, torch.full(shape, expected), rtol=1e-5, atol=0)


def test_tensors_of_other_shapes_and_longer_ones_may_take_turns_in_the_memory_of_a_step():
    tables: dict = {}
    for shapes in ([(3,), (4,)], [(5,), (2,)], [(4,), (3,)], [(2, 2), (3,)], [(CHUNK + 3,), (2,)], [(3,), (4,)]):
        results = []
        for kept in (tables, None):
            generator = torch.Generator().manual_seed(0)
            params = [torch.randn(shape, generator=generator) for shape in shapes]
            first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
            grads, steps = [p + 1 for p in params], [torch.zeros(()) for _ in params]
            ops.lamb_(params, grads, first, second, steps, LAMB, impl="portable", tables=kept)
            results.append(params + first + second)
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_tensors_longer_than_a_chunk_have_one_norm(size):
    shapes = [(size,), *SHAPES[1:]]
    exact = lamb_three_steps(torch.float64, "reference", LAMB, shapes)
    assert_within(lamb_three_steps(torch.float32, "portable", LAMB, shapes), exact, 5e-6)
    exact = lars_three_steps(torch.float64, "reference", LARS, shapes)
    assert_within(lars_three_steps(torch.float32, "portable", LARS, shapes), exact, 5e-6)


@pytest.mark.parametrize("impl", ["reference", "portable", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_of_all_gradients_is_that_of_their_concatenation(impl, dtype):
    grads = tensors(0, dtype, [(2 * CHUNK + 3,), *SHAPES[1:]])
    expected = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]))
    actual = ops.grad_norm(grads, impl=impl)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_a_gradient_with_gaps_among_others_does_not_make_their_norm_worse():
    long = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    expected = (long.double().square().sum().item() + 12 * 2**2) ** 0.5
    assert ops.grad_norm([long, torch.full((3, 1), 2.0).expand(3, 4)]).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_multiplier_is_one_over_scale_and_clip():
    # ‖G‖/s = 6/2 = 3, c = max(1, 3/1.5) = 2, so each gradient is multiplied by 1/(2·2).
    norm, scale = torch.tensor(6.0), torch.tensor(2.0)
    assert float(reference.grad_multiplier(norm, 1.5, scale)) == 0.25
    assert float(reference.grad_multiplier(norm, 10.0, scale)) == 0.5
    assert float(reference.grad_multiplier(norm, None, scale)) == 0.5
    assert float(reference.grad_multiplier(norm, 1.5, None)) == 0.25
    assert reference.grad_multiplier(None, None, None) == 1.0


def test_steps_name_the_argument_that_is_wrong():
    p, g = [torch.zeros(2)], [torch.ones(2)]
    options = LAMB
    with pytest.raises(ValueError, match=r"grads must hold one entry a parameter, 1, got 0"):
        ops.lamb_(p, [], p, p, [torch.zeros(())], options)
    with pytest.raises(ValueError, match=r"impl must be"):
        ops.lamb_(p, g, p, p, [torch.zeros(())], options, impl="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"momentum_buffers must hold a tensor a parameter"):
        ops.lars_(p, g, [None], [None], LARS)
    with pytest.raises(ValueError, match=r"steps must hold None for every parameter"):
        ops.lars_(p, g, p, [torch.zeros(())], LARS)
    low = [torch.zeros(2, dtype=torch.bfloat16)]
    with pytest.raises(TypeError, match="exp_avg_sqs must be at least float32, got torch.bfloat16"):
        ops.lamb_(p, g, p, low, [torch.zeros(())], options)
    with pytest.raises(TypeError, match="momentum_buffers must be at least float32, got torch.bfloat16"):
        ops.lars_(low, low, low, [None], LARS)
    with pytest.raises(ValueError, match=r"grads must hold at least one tensor"):
        ops.grad_norm([])


@pytest.mark.parametrize(
    ("name", "second", "error", "message"),
    [
        ("params", torch.ones(2, dtype=torch.complex64), TypeError, "step real floating-point parameters, got"),
        ("grads", torch.ones(2).to_sparse(), RuntimeError, "do not support sparse gradients"),
        ("grads", torch.ones(3), ValueError, r"grads must have their parameter's shape \(2,\), got \(3,\)"),
        ("exp_avgs", torch.zeros(2).bfloat16(), TypeError, "exp_avgs must be at least float32, got torch.bfloat16"),
    ],
    ids=["complex", "sparse", "another shape", "low precision"],
)
def test_a_wrong_tensor_behind_a_right_one_is_found_before_anything_is_written(name, second, error, message):
    lists = {which: [torch.ones(2), torch.ones(2)] for which in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    lists[name][1] = second
    steps = [torch.zeros(()), torch.zeros(())]
    with pytest.raises(error, match=message):
        ops.lamb_(*lists.values(), steps, LAMB)
    assert torch.equal(lists["params"][0], torch.ones(2))
    assert steps[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64])
def test_triton_refuses_dtypes_it_does_not_step(dtype):
    p, g = [torch.zeros(2, dtype=dtype)], [torch.ones(2, dtype=dtype)]
    with pytest.raises(RuntimeError, match="kernels for float32, bfloat16 and float16, got torch.float64"):
        ops.lamb_(p, g, p, p, [torch.zeros(())], LAMB, impl="triton")


@pytest.mark.parametrize("size", [4, 256 * 256])
@pytest.mark.parametrize("norm", [1.0, 1e-6, 1e-10, 2e-12, 1e-14, 1e-17])
def test_lars_keeps_its_digits_where_the_ratio_is_small(norm, size):
    options = replace(LARS, weight_decay=0.0, eps=0.0, trust_coefficient=1.0, lr=10.0)
    grad = -torch.rand(size, generator=torch.Generator().manual_seed(0))
    grad /= grad.norm()
    start = -norm * grad
    param, buffer = start.clone(), torch.zeros(size)
    ops.lars_([param], [grad], [buffer], [None], options)
    ops.lars_([param], [grad], [buffer], [None], options)
    expected, momentum = start.double(), torch.zeros(size, dtype=torch.float64)
    for _ in range(2):
        momentum = 0.9 * momentum + expected.norm() / grad.double().norm() * grad
        expected = expected - 10.0 * momentum
    torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(buffer.double(), momentum, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, CHUNK + 5, 40 * CHUNK])
@pytest.mark.parametrize("value", [None, 0.1234567, 1 / 3, 1e-3])
def test_a_sum_of_squares_keeps_its_digits_where_all_elements_are_alike(size, value):
    flat = (
        torch.randn(size, generator=torch.Generator().manual_seed(0)) if value is None else torch.full((size,), value)
    )
    assert sum_of_squares(flat) == pytest.approx(flat.double().square().sum().item(), rel=2e-6)
