"""LARS and LAMB against the papers and the other libraries, float64, ten steps, to 1e-12."""

import numpy as np
import pytest
import torch
import trust_ratio_formulas as formulas

from fastlocal import LAMB, LARS
from fastlocal.bench.installed import installed_optimizers
from fastlocal.reference import trust_ratio as reference

LRS = [0.1, 0.1, 0.05, 0.2, 0.0, 0.3, 0.01, 0.02, 0.4, 0.1]
# A convolution, a matrix, a vector, a number, nothing at all, one tensor that starts at zero, one whose
# gradient is 0.
SHAPES = [(4, 3, 3, 3), (5, 6), (7,), (1,), (0,), (3, 2), (2, 4)]
ZERO_WEIGHT, ZERO_GRAD = 5, 6


def problem(zeros=True):
    rng = np.random.default_rng(7)
    shapes = SHAPES if zeros else SHAPES[:4]
    weights = [rng.normal(size=s) for s in shapes]
    grads = [[rng.normal(size=s) for s in shapes] for _ in LRS]
    if zeros:
        weights[ZERO_WEIGHT][:] = 0.0
        for step in grads:
            step[ZERO_GRAD][:] = 0.0
    return weights, grads


def run(make, weights, grads, lrs=LRS):
    """Ten steps of an optimizer; `make` gets the parameters."""
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = make(params)
    for step_grads, lr in zip(grads, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, step_grads, strict=True):
            p.grad = torch.from_numpy(g.copy())
        optimizer.step()
    return [p.detach().numpy() for p in params]


def assert_close(actual, expected, tolerance=1e-12):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"tensor {i}")
    assert any(np.abs(b).max(initial=0) > 0.1 for b in expected)


def timm_optimizers():
    """timm's Lamb and Lars."""
    found, _ = installed_optimizers()
    if "timm" not in found:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    return found["timm"]


def two_groups(params):
    """Decayed matrices and undecayed vectors, as training recipes do."""
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.03},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def test_lamb_matches_algorithm_2_of_its_paper():
    weights, grads = problem()
    expected = formulas.lamb_paper(weights, grads, LRS, 0.9, 0.99, 1e-6, 0.03)
    actual = run(lambda p: LAMB(p, betas=(0.9, 0.99), weight_decay=0.03), weights, grads)
    assert_close(actual, expected)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_lamb_matches_apex(l2, averaging, decay):
    weights, grads = problem()
    expected = formulas.lamb_apex(weights, grads, LRS, 0.9, 0.99, 1e-6, decay, 1.0, averaging, l2)
    actual = run(
        lambda p: LAMB(
            p,
            betas=(0.9, 0.99),
            weight_decay=decay,
            max_grad_norm=1.0,
            grad_averaging=averaging,
            decay="l2" if l2 else "update",
        ),
        weights,
        grads,
    )
    assert_close(actual, expected)


def test_lamb_matches_apex_nvlamb():
    weights, grads = problem()
    expected = formulas.lamb_apex(weights, grads, LRS, 0.9, 0.99, 1e-6, 0.0, 1.0, True, False, nvlamb=True)
    actual = run(
        lambda p: LAMB(p, betas=(0.9, 0.99), weight_decay=0.0, max_grad_norm=1.0, adapt="all"), weights, grads
    )
    assert_close(actual, expected)


def test_lamb_matches_deepspeed():
    weights, grads = problem()
    expected = formulas.lamb_deepspeed(weights, grads, LRS, 0.9, 0.99, 1e-8, 0.03, 0.01, 0.3)
    actual = run(
        lambda p: LAMB(
            p, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.03, bias_correction="step", trust_clip=(0.01, 0.3)
        ),
        weights,
        grads,
    )
    assert_close(actual, expected)


def test_lamb_without_decay_and_adapted_everywhere_matches_optax():
    # optax.lamb is algorithm 2 with eps_root = 0, for every tensor whatever its decay.
    weights, grads = problem()
    expected = formulas.lamb_paper(weights, grads, LRS, 0.9, 0.999, 1e-6, 0.0)
    assert_close(run(lambda p: LAMB(p, weight_decay=0.0, adapt="all"), weights, grads), expected)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"max_grad_norm": 1.0}),
        ({"max_grad_norm": None}, {}),
        ({"max_grad_norm": None, "grad_averaging": False}, {"grad_averaging": False}),
        ({"max_grad_norm": None, "trust_clip": True}, {"trust_clip": (0.0, 1.0)}),
        ({"max_grad_norm": None, "always_adapt": True}, {"adapt": "all"}),
        ({"max_grad_norm": None, "decoupled_decay": True}, {"decay": "decoupled"}),
        ({"max_grad_norm": None, "bias_correction": False}, {"bias_correction": False}),
    ],
)
def test_lamb_matches_timm(theirs, ours):
    lamb, _ = timm_optimizers()
    weights, grads = problem()
    expected = run(lambda p: lamb(two_groups(p), foreach=False, **theirs), weights, grads)
    assert_close(run(lambda p: LAMB(two_groups(p), **ours), weights, grads), expected)


@pytest.mark.parametrize("decoupled", [False, True])
def test_lamb_matches_pytorch_optimizer(decoupled):
    # It divides only the step by 1 − β1^t, adds ε to the ratio's denominator, and bounds ‖p‖ by 10: without
    # ε, on weights of norm below 10, and with that factor in our learning rate, nothing is left to differ.
    # Its decoupled decay uses the learning rate without the factor, so ours gets it in the decay. lr = 0 and
    # a gradient of 0 (0/0) are left out, as is its foreach path, which equals its loop.
    theirs = pytest.importorskip(
        "pytorch_optimizer", reason="pytorch-optimizer, of the test extra, is not installed"
    ).Lamb
    weights, grads = problem(zeros=False)
    weights = [0.5 * w for w in weights]
    lrs = [0.02 * (lr or 0.07) for lr in LRS]
    expected = run(
        lambda p: theirs(p, betas=(0.9, 0.99), eps=0.0, weight_decay=0.03, weight_decouple=decoupled, foreach=False),
        weights,
        grads,
        lrs,
    )
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = LAMB(params, betas=(0.9, 0.99), eps=0.0, weight_decay=0.03, bias_correction=False)
    for t, (step_grads, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        correction = 1 - 0.9**t
        optimizer.param_groups[0].update(
            lr=lr / correction,
            decay="decoupled" if decoupled else "update",
            weight_decay=0.03 * correction if decoupled else 0.03,
        )
        for p, g in zip(params, step_grads, strict=True):
            p.grad = torch.from_numpy(g.copy())
        optimizer.step()
    assert max(map(formulas.norm, expected)) < 10
    assert_close([p.detach().numpy() for p in params], expected)


def test_lamb_skips_the_ratio_of_vectors_when_only_matrices_adapt():
    weights, grads = problem()
    options = {"betas": (0.9, 0.99), "weight_decay": 0.03}
    adapted = formulas.lamb_paper(weights, grads, LRS, 0.9, 0.99, 1e-6, 0.03)
    actual = run(lambda p: LAMB(p, adapt="matrices", **options), weights, grads)
    plain = run(lambda p: LAMB(p, adapt="all", trust_clip=(1.0, 1.0), **options), weights, grads)
    matrices = [w.ndim > 1 for w in weights]
    assert_close(actual, [a if m else p for a, p, m in zip(adapted, plain, matrices, strict=True)])


def test_lars_matches_algorithm_1_of_its_paper():
    weights, grads = problem()
    expected = formulas.lars_paper(weights, grads, LRS, 0.9, 0.02, 0.03)
    actual = run(
        lambda p: LARS(p, weight_decay=0.03, trust_coefficient=0.02, eps=0.0, momentum_form="lr_in_buffer"),
        weights,
        grads,
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("clip", [False, True])
def test_lars_matches_apex_larc(clip):
    weights, grads = problem(zeros=False)
    lrs = [lr or 0.07 for lr in LRS]
    expected = formulas.larc(weights, grads, lrs, 0.9, 0.2, 0.03, 1e-8, clip)
    actual = run(lambda p: LARS(p, weight_decay=0.03, trust_coefficient=0.2, trust_clip=clip), weights, grads, lrs)
    assert_close(actual, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_matches_optax(nesterov):
    weights, grads = problem()
    expected = formulas.lars_optax(weights, grads, LRS, 0.9, 0.02, 0.03, 1e-3, nesterov)
    actual = run(
        lambda p: LARS(
            p,
            weight_decay=0.03,
            trust_coefficient=0.02,
            eps=1e-3,
            norm="joint",
            momentum_form="lr_in_buffer",
            nesterov=nesterov,
        ),
        weights,
        grads,
    )
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"momentum": 0.0}, {"momentum": 0.0}),
        ({"dampening": 0.3}, {"dampening": 0.3}),
        ({"nesterov": True}, {"nesterov": True}),
        ({"always_adapt": True}, {"adapt": "all"}),
        ({"trust_coeff": 0.2, "eps": 1e-3}, {"trust_coefficient": 0.2, "eps": 1e-3}),
        ({"trust_coeff": 0.2, "trust_clip": True}, {"trust_coefficient": 0.2, "trust_clip": True}),
    ],
)
def test_lars_matches_timm(theirs, ours):
    _, lars = timm_optimizers()
    weights, grads = problem()
    lrs = [lr or 0.07 for lr in LRS] if "trust_clip" in theirs else LRS  # timm divides the ratio by lr
    expected = run(lambda p: lars(two_groups(p), foreach=False, **{"momentum": 0.9, **theirs}), weights, grads, lrs)
    assert_close(run(lambda p: LARS(two_groups(p), **ours), weights, grads, lrs), expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_matches_pytorch_optimizer(nesterov):
    # It neither adapts nor decays vectors, and gives a tensor with a zero gradient the ratio η/λ where ours
    # is 1.
    theirs = pytest.importorskip(
        "pytorch_optimizer", reason="pytorch-optimizer, of the test extra, is not installed"
    ).LARS
    weights, grads = problem()
    for step in grads:
        step[ZERO_GRAD][:] = 0.5
    expected = run(lambda p: theirs(p, weight_decay=0.03, nesterov=nesterov, foreach=False), weights, grads)
    actual = run(lambda p: LARS(two_groups(p), eps=0.0, nesterov=nesterov), weights, grads)
    assert_close(actual, expected)


@pytest.mark.parametrize(("optimizer", "sign"), [(LAMB, -1.0), (LARS, -1.0)])
def test_maximize_is_minimizing_the_negated_gradient(optimizer, sign):
    weights, grads = problem()
    negated = [[sign * g for g in step] for step in grads]
    expected = run(lambda p: optimizer(p, weight_decay=0.03), weights, negated)
    assert_close(run(lambda p: optimizer(p, weight_decay=0.03, maximize=True), weights, grads), expected)


def test_a_lamb_step_by_hand():
    # p = (3, 4), g = (1, −1): after one step m̂/√v̂ = (1, −1), ‖p‖ = 5, ‖u‖ = √2, p ← p − 0.1·5/√2·(1, −1).
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    p.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    LAMB([p], lr=0.1, eps=0.0, weight_decay=0.0, adapt="all").step()
    move = 0.5 / 2**0.5
    torch.testing.assert_close(
        p.data, torch.tensor([3 - move, 4 + move], dtype=torch.float64), rtol=1e-15, atol=1e-15
    )


def test_a_lars_step_by_hand():
    # p = (3, 4), g = (0, 2), λ = 0.2: d = (0.6, 2.8), r = 0.01·5/(2 + 0.2·5) = 1/60, p ← p − 0.5·d/60.
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    p.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    LARS([p], lr=0.5, weight_decay=0.2, trust_coefficient=0.01, eps=0.0).step()
    expected = torch.tensor([3 - 0.3 / 60, 4 - 1.4 / 60], dtype=torch.float64)
    torch.testing.assert_close(p.data, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("size", [1024, 1025, 3_000_000])
def test_a_long_tensors_norm_keeps_its_digits(size):
    for tensor in (
        torch.full((size,), 0.01),
        torch.linspace(-1, 1, size),
        torch.full((size, 1), 0.01).expand(size, 2),
    ):
        expected = torch.linalg.vector_norm(tensor.double())
        torch.testing.assert_close(reference.norm_of(tensor).double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_a_bias_correction_keeps_its_digits_in_float32(beta):
    for step in (1, 2, 10, 1000, 10**6):
        found = reference._bias_correction(beta, torch.tensor(float(step)))
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(1 - beta**step, rel=3e-7)
