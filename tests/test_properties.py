"""Properties over drawn shapes, dtypes, workers, intervals and options: ops, optimizers and policies."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from fastlocal import LAMB, LARS, QSR, AdaComm, ConsensusDistance, FixedInterval, PostLocal, Stats, ValidationLoss
from fastlocal.ops import averaging as ops

settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("ci")

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
# Relative to values near 1: float32 sums of a few rows, then one rounding to the rows' dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
seeds = st.integers(0, 2**16)
unit = st.floats(0, 1, allow_nan=False)


def draw_rows(k, n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(k, n + 3, generator=generator).to(dtype)
    rows = wide[:, :n]  # rows of a larger buffer: the columns are dense, the rows are not
    weights = torch.rand(k, generator=generator).add(0.1)
    state = ops.accumulate_dtype(dtype)
    anchor, slow = (torch.randn(n, generator=generator).to(state) for _ in range(2))
    parts = torch.full((k, ops.num_drift_parts(n)), torch.nan)
    return wide, rows, anchor, slow, weights, parts


@given(st.integers(1, 7), st.integers(1, 2500), DTYPES, st.sampled_from(["portable", "reference"]), seeds, st.data())
def test_the_mean_is_the_weighted_mean_in_float64_and_leaves_out_rows_of_weight_zero(k, n, dtype, impl, seed, data):
    wide, rows, _, _, weights, parts = draw_rows(k, n, dtype, seed)
    left_out = data.draw(st.sets(st.integers(0, k - 1), max_size=k - 1))
    for row in left_out:
        weights[row] = 0
        rows[row] = torch.nan
    beyond = wide[:, n:].clone()
    used = [row for row in range(k) if row not in left_out]
    x, w = rows[used].double(), weights[used].double()
    mean = w @ x / w.sum()
    ops.average_(rows, weights, parts, impl=impl)
    for row in rows:
        torch.testing.assert_close(row.double(), mean, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(rows, rows[:1].expand_as(rows))
    assert torch.equal(wide[:, n:], beyond)
    drift = torch.zeros(k, dtype=torch.float64)
    drift[used] = (x - mean).square().sum(1)
    torch.testing.assert_close(parts.double().sum(1), drift, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 6), st.integers(1, 2500), DTYPES, seeds, st.tuples(unit, unit, unit, unit))
def test_the_outer_step_equals_its_formula_in_float64(k, n, dtype, seed, drawn):
    wanted = dict(zip(("direct", "momentum", "decay", "gain"), drawn, strict=True))
    for impl in ("portable", "reference"):
        _, rows, anchor, slow, weights, parts = draw_rows(k, n, dtype, seed)
        x, w = rows.double(), weights.double()
        delta = anchor.to(dtype).double() - w @ x / w.sum()
        v = wanted["decay"] * slow.double() + wanted["gain"] * delta
        new = anchor.double() - wanted["direct"] * delta - wanted["momentum"] * v
        ops.outer_step_(rows, anchor, slow, weights, parts, impl=impl, **wanted)
        tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(slow.double(), v, **tight)
        torch.testing.assert_close(anchor.double(), new, **tight)
        assert torch.equal(rows, anchor.to(dtype).expand_as(rows))


@given(st.integers(1, 6), st.integers(1, 600), DTYPES, seeds)
def test_without_any_weight_nothing_is_written(k, n, dtype, seed):
    for impl in ("portable", "reference"):
        _, rows, anchor, slow, weights, parts = draw_rows(k, n, dtype, seed)
        before = [tensor.clone() for tensor in (rows, anchor, slow)]
        weights.zero_()
        ops.average_(rows, weights, parts, impl=impl)
        ops.outer_step_(rows, anchor, slow, weights, parts, direct=1, momentum=1, decay=1, gain=1, impl=impl)
        for tensor, old in zip((rows, anchor, slow), before, strict=True):
            assert torch.equal(tensor, old)
        assert not parts.any()


shared = {
    "weight_decay": st.sampled_from([0.0, 1e-3, 0.1]),
    "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
    "adapt": st.sampled_from(["decayed", "all", "matrices"]),
    "maximize": st.booleans(),
}
lars_options = st.fixed_dictionaries(
    {
        **shared,
        "lr": st.sampled_from([0.0, 0.1, 5.0]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3, 1.0]),
        "nesterov": st.booleans(),
        "trust_coefficient": st.sampled_from([1e-3, 0.5]),
        "trust_clip": st.booleans(),
        "norm": st.sampled_from(["sum", "joint"]),
        "momentum_form": st.sampled_from(["torch", "lr_in_buffer"]),
    }
)
lamb_options = st.fixed_dictionaries(
    {
        **shared,
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "betas": st.sampled_from([(0.0, 0.0), (0.9, 0.999), (0.5, 0.9)]),
        "bias_correction": st.sampled_from([True, False, "step"]),
        "grad_averaging": st.booleans(),
        "max_grad_norm": st.sampled_from([None, 0.1, 100.0]),
        "trust_clip": st.sampled_from([None, (0.0, 1.0), (0.5, 2.0)]),
        "decay": st.sampled_from(["update", "l2", "decoupled"]),
    }
)
shapes = st.lists(st.sampled_from([(), (1,), (0,), (7,), (16, 3), (2, 3, 5), (1, 40)]), min_size=1, max_size=5)


def five_steps(kind, options, dimensions, dtype, seed, foreach):
    """Parameters after five steps, some of them without a gradient, with a zero gradient or with zero weights."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in dimensions]
    if seed % 3 == 0:
        params[0].data.zero_()
    optimizer = kind(params, foreach=foreach, **options)
    for step in range(5):
        for index, param in enumerate(params):
            drawn = torch.randn(param.shape, generator=generator).to(dtype)
            param.grad = None if (step + index) % 4 == 3 else drawn * ((seed + step) % 5 != 0)
        optimizer.step()
    return params


@pytest.mark.parametrize(("kind", "options"), [(LARS, lars_options), (LAMB, lamb_options)], ids=["LARS", "LAMB"])
def test_the_portable_optimizer_equals_the_reference_whatever_the_options(kind, options):
    @given(options, shapes, st.sampled_from([torch.float64, torch.float32]), seeds)
    def check(chosen, dimensions, dtype, seed):
        assume(not (chosen.get("nesterov") and (chosen["momentum"] == 0 or chosen["dampening"] != 0)))
        expected = five_steps(kind, chosen, dimensions, dtype, seed, foreach=False)
        found = five_steps(kind, chosen, dimensions, dtype, seed, foreach=True)
        for mine, theirs in zip(found, expected, strict=True):
            tolerance = 1e-10 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)

    check()


bounds = st.tuples(st.integers(1, 40), st.integers(0, 200)).map(lambda pair: (pair[0], pair[0] + pair[1]))
positive = st.floats(1e-6, 1e6)


@st.composite
def policies(draw):
    """A function that builds a policy anew, and the bounds of what it may answer."""
    low, high = draw(bounds)
    within = draw(st.integers(low, high))
    match draw(st.integers(0, 5)):
        case 0:
            return (lambda: FixedInterval(within)), within, within
        case 1:
            start = draw(st.integers(0, 300))
            return (lambda: PostLocal(start, within)), 1, within
        case 2:
            total = draw(st.integers(1, 40))
            return (lambda: ValidationLoss(within, total_epochs=total, minimum=low, maximum=high)), low, high
        case 3:
            alpha = draw(positive)
            return (lambda: QSR(low, alpha, maximum=high, start_step=within)), low, high
        case 4:
            return (lambda: AdaComm(low, maximum=high)), 1, high
        case _:
            target = draw(positive)
            return (lambda: ConsensusDistance(target, initial=within, minimum=low, maximum=high)), low, high


rounds = st.fixed_dictionaries(
    {
        "val_loss": st.none() | st.floats(-10, 1e9),
        "train_loss": st.none() | st.floats(1e-3, 1e9),
        "drift": st.floats(0, 1e9) | st.just(math.inf) | st.just(math.nan),
        "lr": st.floats(0, 1e3),
        "cut": st.integers(0, 3),
    }
)


def replay(policy, trace, stats, restart=None, build=FixedInterval):
    """The intervals of a run whose losses, rates and drifts are drawn; at `restart` the policy is loaded anew."""
    answers = []
    for index, drawn in enumerate(trace):
        if index == restart:
            saved = copy.deepcopy(policy.state_dict())
            policy = build()
            policy.load_state_dict(saved)
        stats.lr, stats.drift = drawn["lr"], drawn["drift"]
        if drawn["val_loss"] is not None:
            stats.val_loss, stats.observations = drawn["val_loss"], stats.observations + 1
        if drawn["train_loss"] is not None:
            stats.train_loss = drawn["train_loss"]
        stats.interval = policy.next_interval(stats)
        answers.append(stats.interval)
        stats.round_steps = max(stats.interval - drawn["cut"], 1)
        stats.rounds += 1
        stats.local_steps += stats.round_steps
    return answers


@settings(max_examples=100)
@given(policies(), st.lists(rounds, min_size=1, max_size=30), st.integers(0, 29))
def test_a_policy_keeps_its_bounds_answers_alike_and_goes_on_from_its_state(drawn, trace, restart):
    build, low, high = drawn
    answers = replay(build(), trace, Stats())
    assert all(isinstance(answer, int) and low <= answer <= high for answer in answers)
    assert replay(build(), trace, Stats()) == answers
    assert replay(build(), trace, Stats(), restart, build) == answers
