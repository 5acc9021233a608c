"""The counter against hand-counted bytes; then our operations and the peers' against their documented numbers."""

import pytest
import torch
from interpreted_traffic import count_kernels

from fastlocal import LAMB, LARS
from fastlocal.bench import cases
from fastlocal.bench.count import count
from fastlocal.ops import averaging as ops

SLOWMO = {"direct": 0.0, "momentum": 0.9, "decay": 0.5, "gain": 1.0}
N = 4096
ONE, ZERO = torch.ones(()), torch.zeros(())
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter loads and stores")


def fused_sgd(x, grad, **scaling):
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False}
    torch.ops.aten._fused_sgd_([x], [grad], [], **options, maximize=False, is_first_step=False, **scaling)


@pytest.mark.parametrize(
    ("name", "call", "num_bytes", "launches"),
    [
        ("a new result", lambda x, y: x + y, 12, 1),
        ("in place", lambda x, y: x.add_(y), 12, 1),
        ("in place, with a scalar", lambda x, y: x.mul_(2.0), 8, 1),
        ("into a buffer", lambda x, y: torch.add(x, x, out=y), 8, 1),
        ("into an input", lambda x, y: torch.add(x, y, out=y), 12, 1),
        ("a copy does not read its target", lambda x, y: x.copy_(y), 8, 1),
        ("zeros are written", lambda x, y: x.zero_(), 4, 1),
        ("views are free", lambda x, y: x.view(64, -1).t()[3:].unbind(), 0, 0),
        ("an expanded dimension is read once", lambda x, y: x.copy_(y[:1].expand_as(x)), 4 + 4 / N, 1),
        ("foreach is one launch", lambda x, y: torch.ops.aten._foreach_mul_([x, y], 2.0), 16, 1),
        ("a foreach copy reads as little", lambda x, y: torch.ops.aten._foreach_copy_([x], [y]), 8, 1),
        ("a fused step leaves gradients", lambda x, y: fused_sgd(x, y), 12, 1),
        ("but for their scale", lambda x, y: fused_sgd(x, y, grad_scale=ONE, found_inf=ZERO), 16 + 8 / N, 1),
        ("two in a row", lambda x, y: x.sub_(y).mul_(0.5), 20, 2),
    ],
)
def test_bytes_are_those_counted_by_hand(name, call, num_bytes, launches):
    x, y = torch.randn(N), torch.randn(N)
    traffic = count(lambda: call(x, y))
    assert (traffic.bytes_moved / N, traffic.launches) == (num_bytes, launches)


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), 28),
        (lambda p: torch.optim.AdamW(p, foreach=True), 80),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True), 20),
    ],
)
def test_optimizers_of_torch_move_what_their_formulas_say(optimizer, num_bytes):
    p = torch.nn.Parameter(torch.randn(N))
    p.grad = torch.randn(N)
    made = optimizer([p])
    made.step()
    assert count(made.step).bytes_moved / N == pytest.approx(num_bytes, abs=0.05)  # step counts aside


@pytest.mark.parametrize(
    ("contender", "num_bytes", "launches"),
    [("torchdistx", 68, (5, 2)), ("fairscale", 92, (8, 2)), ("torchft DiLoCo", 108, (7, 4))],
)
def test_peers_move_their_documented_bytes_in_their_documented_launches(contender, num_bytes, launches):
    case = cases.build("outer-step", "lenet", 1, "cpu", 1)
    call = next(c.calls[0] for c in case.contenders if c.name == contender)
    call()
    traffic = count(call)
    assert traffic.bytes_moved == num_bytes * case.parameters
    assert traffic.launches == launches[0] * case.tensors + launches[1]


def buffers(k, n):
    rows, anchor, slow = torch.randn(k, n), torch.randn(n), torch.zeros(n)
    return rows, anchor, slow, torch.ones(k), torch.empty(k, ops.num_drift_parts(n))


@interpreted
@pytest.mark.parametrize(("k", "n"), [(1, 4096), (4, 4096), (3, 5000)])
def test_averaging_kernels_move_8k_and_8k_plus_16_bytes_in_one_launch(k, n, monkeypatch):
    rows, anchor, slow, weights, parts = buffers(k, n)
    blocks = ops.num_drift_parts(n)
    # A block loads each weight twice and stores a share of each drift.
    average = count_kernels(lambda: ops.average_(rows, weights, parts, impl="triton"), monkeypatch)
    assert (average.bytes_moved, average.launches) == (8 * k * n + 12 * k * blocks, 1)
    step = count_kernels(
        lambda: ops.outer_step_(rows, anchor, slow, weights, parts, impl="triton", **SLOWMO), monkeypatch
    )
    assert (step.bytes_moved, step.launches) == ((8 * k + 16) * n + 12 * k * blocks, 1)
    finite = count_kernels(lambda: ops.finite_rows(rows, impl="triton"), monkeypatch)
    assert (finite.bytes_moved, finite.launches) == (4 * k * n, 1)


@interpreted
@pytest.mark.parametrize(
    ("make", "num_bytes", "launches"),
    [
        (lambda p: LAMB(p, weight_decay=0.01, fused=True), 40, 4),
        (lambda p: LAMB(p, weight_decay=0.01, max_grad_norm=1.0, fused=True), 44, 7),
        (lambda p: LARS(p, lr=0.1, weight_decay=1e-4, fused=True), 28, 3),
    ],
)
def test_trust_ratio_kernels_move_no_more_than_documented(make, num_bytes, launches, monkeypatch):
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (40_000, 1000, 8192)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = make(parameters)
    optimizer.step()
    traffic = count_kernels(optimizer.step, monkeypatch)
    moved = traffic.bytes_moved / sum(p.numel() for p in parameters)
    assert num_bytes <= moved < num_bytes + 0.05  # tables and partial sums
    assert traffic.launches <= launches


def portable_sum(k, measures):
    """(Bytes a column, passes) of a portable sum; most passes find their block in the cache."""
    if k == 1:
        return 0, 0
    added = (4 * k + 4, 1) if k > 8 else (12 * (k - 1), k - 1)  # one call, or row by row
    differences = ((8 * k + 4) + 4 * k, 1 + k) if measures else (0, 0)
    return added[0] + differences[0], added[1] + differences[1]


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_portable_averaging_issues_no_more_operations_than_documented(k, measures):
    n = 8192  # one block
    rows, anchor, slow, weights, parts = buffers(k, n)
    parts = parts if measures else None
    small = 64 * (k + 4) * 4  # bytes of weights, squares and drift parts
    num_bytes, passes = portable_sum(k, measures)
    average = count(lambda: ops.average_(rows, weights, parts, impl="portable"))
    # Divided, written back: the sum lies in the first row, or elsewhere.
    copies = 0 if k == 1 else 8 * (k - 1) if k <= 8 and not measures else 4 * k + 4
    assert average.bytes_moved == pytest.approx((num_bytes + (8 if k > 1 else 0) + copies) * n, abs=small)
    step = count(lambda: ops.outer_step_(rows, anchor, slow, weights, parts, impl="portable", **SLOWMO))
    # Δ 12, v 12, x 12, and the write-back.
    assert step.bytes_moved == pytest.approx((num_bytes + 36 + 4 * k + 4) * n, abs=small)
    assert len([name for name, moved in step.calls if moved >= 4 * n]) == passes + 3 + 1
    if not measures:
        assert step.launches == passes + 3 + 1  # and nothing small beside them
