"""Averaging and the outer step: the reference against float64 formulas, each implementation against the reference."""

import os
import subprocess
import sys

import pytest
import torch

from fastlocal.ops import averaging as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The sums run in float32 in the same order; what may differ is fused multiply-add and the last rounding.
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (8e-3, 8e-3), torch.float16: (1e-3, 1e-3)}
COEFFICIENTS = {
    "slowmo": {"direct": 0.0, "momentum": 0.9, "decay": 0.35, "gain": 1.0},
    "nesterov": {"direct": 0.7, "momentum": 0.63, "decay": 0.9, "gain": 1.0},
    "paused": {"direct": 0.8, "momentum": 0.0, "decay": 1.0, "gain": 0.0},
}
SIZES = [(1, 1), (1, 5000), (2, 1024), (3, 1023), (4, 40_000), (5, 16), (8, 2050)]
# More columns than one block of the portable path, and rows that sum rather than run.
EQUAL_WEIGHTS = [(1, 400_003), (2, 400_003), (5, 200_001), (16, 250_001)]
IMPLS = pytest.mark.parametrize("impl", ["reference", "portable", "triton"])


def make(k, n, dtype, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, n, generator=generator).to(device, dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    anchor = torch.randn(n, generator=generator).to(device, state)
    slow = torch.randn(n, generator=generator).to(device, state)
    weights = torch.rand(k, generator=generator).add(0.5).to(device)
    parts = torch.full((k, ops.num_drift_parts(n)), torch.nan, device=device)
    return rows, anchor, slow, weights, parts


def expected_step(rows, anchor, slow, weights, *, direct, momentum, decay, gain):
    """The formula by NumPy-like float64 expressions that share nothing with the reference."""
    x, w = rows.double(), weights.double()
    mean = torch.einsum("k,kn->n", w, x) / w.sum()
    delta = anchor.double() - mean
    v = decay * slow.double() + gain * delta
    return anchor.double() - direct * delta - momentum * v, v, (x - mean).pow(2).sum(1)


@pytest.mark.parametrize("impl", ["reference", "portable"])
@pytest.mark.parametrize("form", COEFFICIENTS)
def test_outer_step_equals_the_formula_in_float64(form, impl):
    rows, anchor, slow, weights, parts = make(3, 70_000, torch.float64, device="cpu")
    new, v, drift = expected_step(rows, anchor, slow, weights, **COEFFICIENTS[form])
    ops.outer_step_(rows, anchor, slow, weights, parts, impl=impl, **COEFFICIENTS[form])
    torch.testing.assert_close(anchor, new, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slow, v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows, new.expand(3, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.double().sum(1), drift, rtol=1e-6, atol=0)


@IMPLS
def test_mean_of_two_rows_is_the_hand_computed_one(impl):
    rows = torch.tensor([[1.0, 2.0, 3.0], [5.0, 2.0, -3.0]], device=DEVICE)
    weights = torch.tensor([3.0, 1.0], device=DEVICE)
    parts = torch.empty(2, 1, device=DEVICE)
    ops.average_(rows, weights, parts, impl=impl)
    assert rows.tolist() == [[2.0, 2.0, 1.5], [2.0, 2.0, 1.5]]
    assert parts.tolist() == [[1.0 + 2.25], [9.0 + 20.25]]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("impl", ["portable", "triton"])
def test_average_agrees_with_float64(impl, k, n, dtype):
    rows, _, _, weights, parts = make(k, n, dtype)
    mean = torch.einsum("k,kn->n", weights.double(), rows.double()) / weights.double().sum()
    drift = (rows.double() - mean).pow(2).sum(1)
    ops.average_(rows, weights, parts, impl=impl)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(rows.double(), mean.expand(k, -1), rtol=rtol, atol=atol)
    torch.testing.assert_close(parts.double().sum(1), drift, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("k", "n"), [(1, 5000), (2, 1024), (5, 16), (8, 400_001), (16, 250_001)])
@pytest.mark.parametrize("kept", ["all", "all alike", "but the first", "the last"])
@IMPLS
def test_results_without_a_drift_that_nobody_reads_agree_with_float64(impl, kept, k, n, dtype):
    if impl == "triton" and DEVICE == "cpu" and n > 5000:
        pytest.skip("the interpreter is slow, and its blocks are all alike")
    rows, anchor, slow, weights, _ = make(k, n, dtype)
    weights = torch.ones_like(weights) if kept == "all alike" else weights
    if k > 1 and kept != "all" and kept != "all alike":
        left_out = slice(0, 1) if kept == "but the first" else slice(0, k - 1)
        weights[left_out], rows[left_out] = 0.0, torch.nan
    counted = weights > 0
    started, x, w = anchor.to(dtype).double(), rows[counted].double(), weights[counted].double()
    mean = torch.einsum("k,kn->n", w, x) / w.sum()
    averaged = rows.clone()
    ops.average_(averaged, weights, None, impl=impl)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(averaged.double(), mean.expand(k, -1), rtol=rtol, atol=atol)
    v = 0.5 * slow.double() + started - mean
    new = anchor.double() - 0.9 * v
    coefficients = {"direct": 0.0, "momentum": 0.9, "decay": 0.5, "gain": 1.0}
    ops.outer_step_(rows, anchor, slow, weights, None, impl=impl, **coefficients)
    torch.testing.assert_close(slow.double(), v, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(anchor.double(), new, rtol=2e-6, atol=2e-6)
    assert torch.equal(rows, anchor.to(dtype).expand(k, -1))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("form", COEFFICIENTS)
def test_outer_step_kernel_agrees_with_the_reference(form, k, n, dtype):
    rows, anchor, slow, weights, parts = make(k, n, dtype)
    expected = rows.clone(), anchor.clone(), slow.clone(), parts.clone()
    ops.outer_step_(rows, anchor, slow, weights, parts, impl="triton", **COEFFICIENTS[form])
    ops.outer_step_(
        expected[0], expected[1], expected[2], weights, expected[3], impl="reference", **COEFFICIENTS[form]
    )
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(rows, expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(anchor, expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slow, expected[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.sum(1), expected[3].sum(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("k", "n"), EQUAL_WEIGHTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_portable_outer_step_over_several_blocks_agrees_with_float64(dtype, k, n):
    rows, anchor, slow, weights, parts = make(k, n, dtype)
    weights.fill_(1.0)
    started = anchor.to(dtype).double()
    mean = rows.double().mean(0)
    drift = (rows.double() - mean).pow(2).sum(1)
    v = 0.5 * slow.double() + started - mean
    new = anchor.double() - 0.9 * v
    coefficients = {"direct": 0.0, "momentum": 0.9, "decay": 0.5, "gain": 1.0}
    ops.outer_step_(rows, anchor, slow, weights, parts, impl="portable", **coefficients)
    torch.testing.assert_close(slow.double(), v, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(anchor.double(), new, rtol=2e-6, atol=2e-6)
    assert torch.equal(rows, anchor.to(dtype).expand(k, -1))
    torch.testing.assert_close(parts.double().sum(1), drift, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("impl", ["reference", "portable"])
@pytest.mark.parametrize("weights", [[1.0] * 3, [1.0] * 5, [1.0] * 12, [1.0, 2.0, 3.0]], ids=str)
def test_equal_rows_do_not_grow_under_slow_momentum_whatever_their_number(weights, impl, measures):
    row = make(1, 1000, torch.float32, device="cpu")[0][0]
    rows, anchor, slow = row.repeat(len(weights), 1), row.clone(), torch.zeros(1000)
    parts = torch.empty(len(weights), 1) if measures else None
    for _ in range(1000):
        ops.outer_step_(rows, anchor, slow, torch.tensor(weights), parts, impl=impl, **COEFFICIENTS["nesterov"])
    # Times a float32 of 1/3, which is 3e-8 above, they would grow by 1e-4. Single values move by their last digits.
    torch.testing.assert_close(rows, row.expand_as(rows), rtol=16 * 2**-24, atol=0)


def test_a_lone_row_with_weight_is_what_the_portable_mean_copies():
    rows, _, _, _, parts = make(3, 5000, torch.float32)
    last = rows[2].clone()
    rows[0] = torch.nan
    ops.average_(rows, torch.tensor([0.0, 0.0, 0.7], device=DEVICE), parts, impl="portable")
    assert torch.equal(rows, last.expand(3, -1))
    assert not parts.any()


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_two_runs_give_the_same_bits(impl, dtype):
    results = []
    for _ in range(2):
        rows, anchor, slow, weights, parts = make(4, 5000, dtype)
        ops.outer_step_(rows, anchor, slow, weights, parts, impl=impl, **COEFFICIENTS["slowmo"])
        results.append((rows, anchor, slow, parts))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_bfloat16_rows_are_rounded_to_nearest_even(impl):
    # 1 + 2^-8 lies halfway between two bfloat16 numbers, 1 and 1 + 2^-7: even is 1. A little more goes up.
    rows = torch.zeros(1, 3, dtype=torch.bfloat16, device=DEVICE)
    anchor = torch.tensor([1 + 2**-8, 1 + 2**-8 + 2**-12, -(1 + 3 * 2**-8)], device=DEVICE)
    slow, weights, parts = (
        torch.zeros_like(anchor),
        torch.ones(1, device=DEVICE),
        torch.empty(1, 1, device=DEVICE),
    )
    ops.outer_step_(rows, anchor, slow, weights, parts, direct=0.0, momentum=0.0, decay=1.0, gain=0.0, impl=impl)
    assert rows.tolist() == [[1.0, 1 + 2**-7, -(1 + 2 * 2**-7)]]


@IMPLS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 1024, 39_999])
def test_finite_rows_finds_one_bad_value(impl, bad, column):
    rows = torch.zeros(4, 40_000, device=DEVICE)
    rows[2, column] = bad
    assert ops.finite_rows(rows, impl=impl).tolist() == [True, True, False, True]


@IMPLS
def test_finite_rows_is_not_misled_by_a_sum_that_overflows_or_cancels(impl):
    rows = torch.zeros(3, 2000, device=DEVICE)
    rows[0] = 3e38
    rows[1, :2] = torch.tensor([torch.inf, -torch.inf])
    assert ops.finite_rows(rows, impl=impl).tolist() == [True, False, True]


@IMPLS
def test_a_row_of_weight_zero_is_left_out_even_if_it_is_nan(impl):
    rows, anchor, slow, _, parts = make(3, 3000, torch.float32)
    good = rows[[0, 2]].double().mean(0)
    rows[1] = torch.nan
    weights = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    ops.outer_step_(rows, anchor, slow, weights, parts, direct=1.0, momentum=0.0, decay=0.0, gain=1.0, impl=impl)
    torch.testing.assert_close(rows.double(), good.expand(3, -1), rtol=1e-5, atol=1e-6)
    assert parts.sum(1)[1] == 0
    assert parts.isfinite().all()


@IMPLS
def test_nothing_is_written_when_no_row_has_weight(impl):
    rows, anchor, slow, weights, parts = make(2, 3000, torch.float32)
    before = [tensor.clone() for tensor in (rows, anchor, slow)]
    ops.outer_step_(rows, anchor, slow, weights * 0, parts, impl=impl, **COEFFICIENTS["slowmo"])
    ops.average_(rows, weights * 0, parts, impl=impl)
    for tensor, old in zip((rows, anchor, slow), before, strict=True):
        assert torch.equal(tensor, old)
    assert not parts.any()


@IMPLS
def test_columns_outside_a_slice_are_not_touched(impl):
    rows, _, _, weights, _ = make(3, 4096, torch.float32)
    before = rows.clone()
    ops.average_(rows[:, 1024:2000], weights, torch.empty(3, 1, device=DEVICE), impl=impl)
    assert torch.equal(rows[:, :1024], before[:, :1024])
    assert torch.equal(rows[:, 2000:], before[:, 2000:])
    assert not torch.equal(rows[:, 1024:2000], before[:, 1024:2000])


def test_difference_first_keeps_the_digits_that_dividing_first_loses():
    # x near 1, Δ near 1e-4, γ = 1e-3: u = x0/γ − x/γ cancels; Δ = x0 − x, then scaled, does not.
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(1, 100_000, generator=generator)
    rows = anchor + 1e-4 * torch.randn(anchor.shape, generator=generator)
    lr = 1e-3
    exact = (anchor.double() - rows.double()) / lr
    divided_first = anchor / lr - rows / lr
    slow, weights = torch.zeros(anchor.shape[1]), torch.ones(1)
    parts = torch.empty(1, ops.num_drift_parts(anchor.shape[1]))
    ops.outer_step_(rows, anchor[0].clone(), slow, weights, parts, direct=0.0, momentum=1.0, decay=0.5, gain=1.0)
    ours = slow.double() / lr

    def error(u):
        return ((u.double() - exact).norm() / exact.norm()).item()

    assert error(divided_first) > 1e-4
    assert error(ours) < 1e-6


@IMPLS
def test_rows_without_columns_are_accepted(impl):
    rows, parts = torch.empty(2, 0, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    ops.average_(rows, torch.ones(2, device=DEVICE), parts, impl=impl)
    assert not parts.any()
    assert ops.finite_rows(rows, impl=impl).tolist() == [True, True]
    none, weights = torch.empty(0, device=DEVICE), torch.ones(2, device=DEVICE)
    ops.outer_step_(rows, none, none, weights, parts.fill_(1), impl=impl, **COEFFICIENTS["slowmo"])
    assert not parts.any()


def test_wrong_arguments_are_named_with_value_and_rule():
    rows, anchor, slow, weights, parts = make(2, 2000, torch.float32)
    with pytest.raises(ValueError, match=r"weights must have the shape \(2,\), got \(3,\)"):
        ops.average_(rows, torch.ones(3, device=DEVICE), parts)
    with pytest.raises(ValueError, match=r"drift_parts must have the shape \(2, 2\), got \(2, 1\)"):
        ops.average_(rows, weights, parts[:, :1])
    with pytest.raises(ValueError, match=r"rows must have the shape .* got \(2000,\)"):
        ops.average_(rows[0], weights, parts)
    with pytest.raises(ValueError, match=r"stride 1\), got stride 2"):
        ops.average_(rows.t().contiguous().t(), weights, parts)
    with pytest.raises(ValueError, match="anchor must be torch.float32, got torch.float64"):
        ops.outer_step_(rows, anchor.double(), slow, weights, parts, direct=0, momentum=1, decay=1, gain=1)
    strided = torch.zeros(4000, device=DEVICE)[::2]
    with pytest.raises(ValueError, match=r"slow_momentum must be contiguous, got strides \(2,\)"):
        ops.outer_step_(rows, anchor, strided, weights, parts, direct=0, momentum=1, decay=1, gain=1)
    with pytest.raises(ValueError, match="rows must be floating-point, got torch.int64"):
        ops.finite_rows(rows.long())
    with pytest.raises(ValueError, match="impl must be one of auto, triton, portable, reference, got 'cuda'"):
        ops.finite_rows(rows, impl="cuda")


def test_companions_that_would_be_misread_or_spread_over_all_columns_are_named():
    rows, _, _, weights, parts = make(2, 2000, torch.float32)
    mean = torch.zeros(2000, device=DEVICE)
    with pytest.raises(ValueError, match=r"mean must have the shape \(2000,\), got \(1,\)"):
        ops.average_(rows, weights, parts, mean[:1])
    with pytest.raises(ValueError, match="mean must be torch.float32, got torch.bfloat16"):
        ops.average_(rows, weights, parts, mean.bfloat16())
    with pytest.raises(ValueError, match="weights must be torch.float32, got torch.float64"):
        ops.average_(rows, weights.double(), parts)
    with pytest.raises(ValueError, match="drift_parts must be torch.float32, got torch.float64"):
        ops.average_(rows, weights, parts.double())
    with pytest.raises(ValueError, match=f"weights must be on the device of rows, {rows.device}, got meta"):
        ops.average_(rows, weights.to("meta"), parts)
    with pytest.raises(ValueError, match=r"rows must have the shape .* got \(0, 2000\)"):
        ops.finite_rows(rows[:0])
    with pytest.raises(ValueError, match=r"total must have the shape \(2000,\), got \(3000,\)"):
        ops.weighted_sum_(torch.zeros(3000, device=DEVICE), rows, [1.0, 1.0])
    with pytest.raises(ValueError, match="total must be torch.float32, got torch.bfloat16"):
        ops.weighted_sum_(mean.bfloat16(), rows, [1.0, 1.0])


def test_rows_without_columns_have_a_sum():
    out = torch.empty(0)
    ops.weighted_sum_(out, torch.empty(2, 0), [0.5, 0.5])
    assert out.shape == (0,)


def test_asking_for_a_kernel_that_cannot_run_is_an_error():
    with pytest.raises(RuntimeError, match="has kernels for float32, bfloat16 and float16, got torch.float64"):
        ops.finite_rows(torch.zeros(1, 4, dtype=torch.float64), impl="triton")
    with pytest.raises(RuntimeError, match="needs tensors on a CUDA device, they are on meta"):
        ops.finite_rows(torch.zeros(1, 4, device="meta"), impl="triton")  # in the interpreter too
    code = "import torch; from fastlocal.ops.averaging import *; finite_rows(torch.zeros(1, 4), impl='triton')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs tensors on a CUDA device" in done.stderr


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, *COEFFICIENTS])
def test_a_mean_that_is_known_is_written_to_all_rows_whatever_the_weights(form, dtype, impl):
    rows, anchor, slow, _, parts = make(3, 2050, dtype)
    rows[1, 7] = torch.nan
    weights = torch.tensor([2.0, 0.0, 1.0], device=DEVICE)
    mean = torch.linspace(-1, 1, 2050, device=DEVICE)
    drift = (rows.double() - mean.double()).square().sum(1) * torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    drift[1] = 0.0
    expected = mean.double()
    if form is not None:
        c = COEFFICIENTS[form]
        delta = anchor.to(dtype).double() - mean.double()
        v = c["decay"] * slow.double() + c["gain"] * delta
        expected = anchor.double() - c["direct"] * delta - c["momentum"] * v
        ops.outer_step_(rows, anchor, slow, weights, parts, mean, impl=impl, **c)
        torch.testing.assert_close(slow.double(), v, rtol=1e-5, atol=1e-5)
    else:
        ops.average_(rows, weights, parts, mean, impl=impl)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(rows.double(), expected.expand(3, -1), rtol=rtol + 1e-5, atol=atol + 1e-5)
    torch.testing.assert_close(parts.double().sum(1), drift, rtol=1e-5, atol=1e-5)


def test_a_known_mean_is_written_though_every_row_is_left_out():
    for impl in ("reference", "portable", "triton"):
        rows, parts = torch.full((2, 20), torch.nan, device=DEVICE), torch.empty(2, 1, device=DEVICE)
        ops.average_(rows, torch.zeros(2, device=DEVICE), parts, torch.full((20,), 3.0, device=DEVICE), impl=impl)
        assert rows.eq(3).all()
        assert parts.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weighted_sum_equals_the_formula_and_leaves_out_rows_of_share_zero(dtype):
    rows, anchor, *_ = make(3, 70_000, dtype, device="cpu")
    expected = 0.25 * rows[0].double() + 0.5 * rows[2].double()
    rows[1] = torch.nan
    ops.weighted_sum_(anchor, rows, [0.25, 0.0, 0.5])
    torch.testing.assert_close(anchor.double(), expected, rtol=1e-6, atol=1e-7)
    ops.weighted_sum_(anchor, rows, [0.0, 0.0, 0.0])
    assert anchor.eq(0).all()
    with pytest.raises(ValueError, match="shares must have one number for each of 3 rows, got 1"):
        ops.weighted_sum_(anchor, rows, [1.0])


@IMPLS
def test_the_mean_of_three_equal_rows_is_on_average_neither_above_nor_below_them(impl):
    row, weights = make(1, 5000, torch.float32)[0][0], torch.ones(3, device=DEVICE)
    averaged, stepped = row.repeat(3, 1), row.repeat(3, 1)
    parts = torch.empty(3, ops.num_drift_parts(5000), device=DEVICE)
    ops.average_(averaged, weights, parts, impl=impl)
    ops.outer_step_(
        stepped, row.clone(), torch.zeros_like(row), weights, parts, impl=impl, direct=1, momentum=0, decay=0, gain=0
    )
    for rows in (averaged, stepped):
        # Each is off by its last digit, 6e-8, at most; times a float32 of 1/3, all would be 3e-8 above.
        assert abs((rows[0].double() / row.double() - 1).mean().item()) < 1e-8


@pytest.mark.parametrize("measures", [False, True])
@IMPLS
def test_many_rows_have_their_mean_whatever_weight_they_share(impl, measures):
    rows, _, _, weights, parts = make(12, 1000, torch.float32)
    mean = rows.double().mean(0)
    ops.average_(rows, weights.fill_(0.5), parts if measures else None, impl=impl)
    torch.testing.assert_close(rows.double(), mean.expand(12, -1), rtol=1e-6, atol=1e-6)


@IMPLS
def test_a_single_column_may_have_any_stride(impl):
    rows, parts = torch.tensor([[1.0, 2.0, 6.0]], device=DEVICE).t(), torch.empty(3, 1, device=DEVICE)
    assert rows.stride() == (1, 3)
    ops.average_(rows, torch.ones(3, device=DEVICE), parts, impl=impl)
    assert rows.tolist() == [[3.0]] * 3
    assert parts.tolist() == [[4.0], [1.0], [9.0]]
