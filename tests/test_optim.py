"""LARS and LAMB as members of torch.optim: every convention that a training loop relies on."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.tensor
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastlocal import LAMB, LARS

BOTH = pytest.mark.parametrize("optimizer", [LAMB, LARS])
EVERY_FORM = pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (LAMB, {}),
        (LAMB, {"foreach": False}),
        (LAMB, {"max_grad_norm": 0.5}),
        (LARS, {}),
        (LARS, {"foreach": False}),
        (LARS, {"dampening": 0.25}),
        (LARS, {"momentum": 0.0}),
    ],
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_params(dtype=torch.float32):
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in [(4, 5), (6,), (), (0,), (2, 3, 2, 2)]]


def set_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    grads = [scale * torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return grads


def step_counts(optimizer):
    return [float(state["step"]) for state in optimizer.state.values() if "step" in state]


def train(optimizer, params, seeds):
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def clone(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


def moved(params, before):
    pairs = zip(params, before, strict=True)
    return any((p.detach() - b.detach()).abs().max() > 1e-4 for p, b in pairs if p.numel())


# --- construction
# -------------------------------------------------------------------------------------------------


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
def test_an_unknown_option_is_an_error(optimizer):
    with pytest.raises(TypeError, match="momentun"):
        optimizer(make_params(), momentun=0.9)


@BOTH
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_not_real_are_refused(optimizer, dtype):
    with pytest.raises(TypeError, match=f"real floating-point parameters, got {dtype}"):
        optimizer([torch.zeros(3, dtype=dtype)])


@BOTH
def test_a_sparse_gradient_is_refused(optimizer):
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="do not support sparse gradients"):
        optimizer(embedding.parameters()).step()


# --- a step
# -------------------------------------------------------------------------------------------------------


@EVERY_FORM
def test_a_step_leaves_gradients_alone_and_tells_autograd_what_it_wrote(optimizer, options):
    params = make_params()
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    train(opt, params, [1])
    grads = [g.clone() for g in set_grads(params, 2)]
    before, versions = clone(params), [p._version for p in params]
    opt.step()
    assert_equal([p.grad for p in params], grads)
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    assert moved(params, before)


@EVERY_FORM
def test_a_closure_runs_with_gradients_and_its_loss_is_returned(optimizer, options):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = optimizer([weight], lr=0.1, **options)

    def closure():
        opt.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 25.0
    assert opt.step(closure).item() < 25.0


@BOTH
def test_step_and_state_dict_hooks_run(optimizer):
    params, calls = make_params(), []
    opt = optimizer(params)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("pre-load"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("post-load"))
    train(opt, params, [1])
    opt.load_state_dict(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    assert calls == ["pre", "post", "pre-load", "post-load", "pre-load", "post-load"]


@EVERY_FORM
def test_absent_gradients_are_skipped_and_late_ones_start_from_step_one(optimizer, options):
    params = make_params()
    alone = clone(params)
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    opt.step()  # no gradient at all
    assert not opt.state
    for seed in (1, 2):
        set_grads(params, seed)
        params[0].grad = None
        opt.step()
    assert_equal(params[:1], alone[:1])
    late = torch.randn(4, 5) * 1e-3  # too small for max_grad_norm to see the others' absence
    for p in params:
        p.grad = None
    params[0].grad = alone[0].grad = late
    opt.step()
    optimizer(alone, lr=0.1, weight_decay=0.1, **options).step()
    assert_equal(params[:1], alone[:1])


@EVERY_FORM
def test_a_learning_rate_of_zero_leaves_the_weights_alone(optimizer, options):
    params = make_params()
    before = clone(params)
    opt = optimizer(params, lr=0.0, weight_decay=0.1, **options)
    train(opt, params, [1, 2])
    assert_equal(params, before)


@EVERY_FORM
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_changed_in_place_equals_a_float(optimizer, options, shape):
    params = make_params(torch.float64)
    same = clone(params)
    lr = torch.full(shape, 0.5)
    tensor_opt = optimizer(params, lr=lr, weight_decay=0.1, **options)
    float_opt = optimizer(same, lr=0.5, weight_decay=0.1, **options)
    train(tensor_opt, params, [1, 2])
    train(float_opt, same, [1, 2])
    lr.fill_(0.25)
    float_opt.param_groups[0]["lr"] = 0.25
    train(tensor_opt, params, [3])
    train(float_opt, same, [3])
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@EVERY_FORM
def test_a_learning_rate_schedule_gives_what_the_rates_by_hand_give(optimizer, options):
    params = make_params()
    same = clone(params)
    opt = optimizer(params, lr=0.8, weight_decay=0.1, **options)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    by_hand = optimizer(same, lr=0.8, weight_decay=0.1, **options)
    for seed, lr in enumerate([0.8, 0.4, 0.2]):
        train(opt, params, [seed])
        schedule.step()
        by_hand.param_groups[0]["lr"] = lr
        train(by_hand, same, [seed])
    assert_equal(params, same)


@BOTH
def test_a_group_added_later_keeps_its_own_options(optimizer):
    params = make_params()
    same = clone(params)
    opt = optimizer(params[:2], lr=0.1, weight_decay=0.1)
    opt.add_param_group({"params": params[2:], "lr": 0.3, "weight_decay": 0.0})
    apart = [optimizer(same[:2], lr=0.1, weight_decay=0.1), optimizer(same[2:], lr=0.3, weight_decay=0.0)]
    for seed in (1, 2, 3):
        set_grads(params, seed)
        set_grads(same, seed)
        opt.step()
        for o in apart:
            o.step()
    assert_equal(params, same)


@BOTH
def test_a_refused_group_leaves_the_optimizer_as_it_was(optimizer):
    params = make_params()
    opt = optimizer(params)
    with pytest.raises(TypeError, match="real floating-point"):
        opt.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64)]})
    assert len(opt.param_groups) == 1


def test_global_clipping_counts_every_group_and_each_group_has_its_own_bound():
    # ‖G‖ = 5 over both groups. The first clips to 1, the second does not clip.
    params = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    opt = LAMB(
        [{"params": params[:1], "max_grad_norm": 1.0}, {"params": params[1:]}],
        eps=1.0,
        weight_decay=0.0,
        lr=1.0,
    )
    params[0].grad = torch.tensor([3.0], dtype=torch.float64)
    params[1].grad = torch.tensor([4.0], dtype=torch.float64)
    opt.step()
    # u = m̂/(√v̂ + 1) with m̂ = g, √v̂ = |g|: 0.6/1.6 and 4/5.
    assert params[0].item() == pytest.approx(1 - 0.6 / 1.6, abs=1e-14)
    assert params[1].item() == pytest.approx(1 - 4 / 5, abs=1e-14)


# --- memory layouts and dtypes
# --------------------------------------------------------------------------------------


def last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def layouts():
    base = torch.randn(4, 6, 3, 5)
    dense = torch.randn(4, 6, 3, 5)
    return {
        "both channels_last": (
            base.to(memory_format=torch.channels_last),
            dense.to(memory_format=torch.channels_last),
        ),
        "channels_last weight": (last(base), dense),
        "channels_last gradient": (base, dense.to(memory_format=torch.channels_last)),
        "weight with gaps": (torch.randn(4, 6, 3, 10)[..., ::2], dense),
        "expanded gradient": (base, torch.randn(1, 6, 1, 5).expand(4, 6, 3, 5)),
        "row of a buffer": (torch.randn(3, 360)[1].view(4, 6, 3, 5), dense),
        "unaligned": (torch.randn(361)[1:].view(4, 6, 3, 5), dense),
    }


@EVERY_FORM
@pytest.mark.parametrize("layout", layouts())
def test_a_step_does_not_depend_on_strides(optimizer, options, layout):
    torch.manual_seed(0)
    weight, grad = layouts()[layout]
    strided, dense = nn.Parameter(weight), nn.Parameter(weight.double().contiguous())
    assert strided.data_ptr() == weight.data_ptr()
    opts = [optimizer([p], lr=0.1, weight_decay=0.1, **options) for p in (strided, dense)]
    for scale in (1.0, -0.5, 2.0):
        strided.grad = grad if "expanded" in layout else grad * scale
        dense.grad = strided.grad.double().contiguous()
        for o in opts:
            o.step()
    torch.testing.assert_close(strided.double(), dense, rtol=1e-5, atol=1e-6)
    assert strided.stride() == weight.stride()
    assert strided.data_ptr() == weight.data_ptr()


@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_state_through_a_reload(optimizer, options, dtype):
    params = make_params(dtype)
    same = clone(params)
    exact = [nn.Parameter(p.detach().double()) for p in params]
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    exact_opt = optimizer(exact, lr=0.1, weight_decay=0.1, **options)
    for seed in (1, 2, 3):
        grads = set_grads(params, seed)
        for p, e, g in zip(params, exact, grads, strict=True):
            e.data.copy_(p.data)  # one step at a time, so that only a step's own rounding counts
            e.grad = g.double()
        opt.step()
        exact_opt.step()
        for p, e in zip(params, exact, strict=True):
            torch.testing.assert_close(p.double(), e, rtol=2.0 * torch.finfo(dtype).eps, atol=1e-5)
    for state in opt.state.values():
        assert all(v.dtype == torch.float32 for v in state.values())
    reloaded = optimizer(same, **options)
    reloaded.load_state_dict(opt.state_dict())
    for p, s in zip(params, same, strict=True):
        s.data.copy_(p.data)
    train(opt, params, [4])
    train(reloaded, same, [4])
    assert_equal(params, same)


@EVERY_FORM
def test_dtypes_may_be_mixed_in_a_group(optimizer, options):
    # A bound on the global norm would tie the tensors together.
    options = {k: v for k, v in options.items() if k != "max_grad_norm"}
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [nn.Parameter(torch.randn(5, 3).to(d)) for d in dtypes]
    apart = clone(params)
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    opts = [optimizer([p], lr=0.1, weight_decay=0.1, **options) for p in apart]
    for seed in (1, 2):
        set_grads(params, seed)
        for p, a in zip(params, apart, strict=True):
            a.grad = p.grad
        opt.step()
        for o in opts:
            o.step()
    assert_equal(params, apart)


# --- copies and checkpoints
# -----------------------------------------------------------------------------------------


def copies(opt):
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    return [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), torch.load(buffer, weights_only=False)]


@EVERY_FORM
def test_deepcopy_pickle_and_save_keep_every_option_and_the_state(optimizer, options):
    params = make_params()
    opt = optimizer(params, lr=0.1, weight_decay=0.1, maximize=True, **options)
    train(opt, params, [1, 2])
    duplicates = copies(opt)
    train(opt, params, [3])
    for duplicate in duplicates:
        own = duplicate.param_groups[0]["params"]
        train(duplicate, own, [3])
        assert_equal(own, params)


@EVERY_FORM
def test_a_resumed_run_is_the_run_that_was_never_stopped(optimizer, options):
    params = make_params()
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    train(opt, params, [1, 2])
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = clone(params)
    again = optimizer(resumed, lr=7.0)
    again.load_state_dict(saved)
    train(opt, params, [3, 4])
    train(again, resumed, [3, 4])
    assert_equal(params, resumed)


@BOTH
def test_loading_neither_changes_nor_shares_the_state_dict(optimizer):
    params = make_params()
    opt = optimizer(params, lr=0.1)
    train(opt, params, [1])
    saved = opt.state_dict()
    before = copy.deepcopy(saved)
    again = clone(params)
    other = optimizer(again)
    other.load_state_dict(saved)
    train(other, again, [2, 3])
    assert saved["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert_equal(saved["state"][key].values(), state.values())


@BOTH
def test_a_state_dict_can_be_loaded_before_the_first_step_and_with_older_groups(optimizer):
    params = make_params()
    opt = optimizer(params, lr=0.1, adapt="all")
    saved = optimizer(clone(params), lr=0.1).state_dict()
    for group in saved["param_groups"]:
        del group["adapt"], group["maximize"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["adapt"] == "all"
    assert opt.param_groups[0]["maximize"] is False


@BOTH
def test_a_state_of_the_wrong_shape_is_refused(optimizer):
    params = [nn.Parameter(torch.randn(4, 5))]
    opt = optimizer(params)
    train(opt, params, [1])
    with pytest.raises(ValueError, match=r"must have its parameter's shape \(5, 4\), got \(4, 5\)"):
        optimizer([nn.Parameter(torch.randn(5, 4))]).load_state_dict(opt.state_dict())


def test_a_state_whose_steps_are_others_is_refused():
    params = make_params()
    theirs = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(
        ValueError, match="made with amsgrad=True, which LAMB does not have: its steps would be others"
    ):
        LAMB(params).load_state_dict(theirs.state_dict())
    saved = LAMB(params).state_dict()
    saved["param_groups"][0]["caution"] = True
    with pytest.raises(ValueError, match="made with caution=True, which LAMB does not have"):
        LAMB(params).load_state_dict(saved)


def test_moments_without_a_count_of_steps_are_refused_by_lamb():
    params = make_params()
    opt = LAMB(params)
    train(opt, params, [1])
    saved = opt.state_dict()
    for state in saved["state"].values():
        del state["step"]
    with pytest.raises(ValueError, match="moments but no 'step'"):
        LAMB(params).load_state_dict(saved)


@BOTH
def test_a_checkpoint_of_kernels_goes_on_where_there_are_none_and_another_class_does_not_choose_the_path(optimizer):
    params = make_params(torch.float64)  # which no kernel takes
    there, here = optimizer(params, fused=True), optimizer(params)
    here.load_state_dict(there.state_dict())
    assert here.param_groups[0]["fused"] is None
    theirs = (torch.optim.AdamW if optimizer is LAMB else torch.optim.SGD)(params, lr=0.5, foreach=True)
    there.load_state_dict(theirs.state_dict())
    assert there.param_groups[0]["lr"] == 0.5
    assert (there.param_groups[0]["foreach"], there.param_groups[0]["fused"]) == (None, True)
    here.load_state_dict(optimizer(params, foreach=False).state_dict())  # one's own path is part of the same bits
    assert here.param_groups[0]["foreach"] is False


@BOTH
def test_parameters_that_became_float64_are_not_stepped_in_float32(optimizer):
    params = make_params()
    opt = optimizer(params, lr=0.1, weight_decay=0.01)
    train(opt, params, [1])
    for p in params:
        p.data = p.data.double()
    set_grads(params, 2)
    with pytest.raises(TypeError, match="must be float64, as their parameters are, got torch.float32"):
        opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    moments = [v for state in opt.state.values() for name, v in state.items() if name != "step"]
    assert {m.dtype for m in moments} == {torch.float64}


def test_a_buffer_that_a_checkpoint_has_as_none_begins_with_the_whole_gradient_under_dampening():
    params = [nn.Parameter(torch.ones(3))]
    theirs = torch.optim.SGD(params, momentum=0.9)
    params[0].grad = torch.full((3,), 2.0)
    theirs.step()
    saved = theirs.state_dict()
    saved["state"][0]["momentum_buffer"] = None
    opt = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.0)
    opt.load_state_dict(saved)
    opt.param_groups[0].update(dampening=0.5, nesterov=False)
    opt.step()
    assert opt.state[params[0]]["momentum_buffer"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("other", "optimizer", "said"),
    [
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            LAMB,
            "momentum_buffer, LAMB goes on from exp_avg and exp_avg_sq",
        ),
        (torch.optim.AdamW, LARS, "exp_avg and exp_avg_sq, LARS goes on from momentum_buffer"),
        (torch.optim.Adamax, LAMB, "exp_avg and exp_inf, LAMB goes on from exp_avg and exp_avg_sq"),
        (
            lambda params: torch.optim.RMSprop(params, momentum=0.9),
            LARS,
            "square_avg and momentum_buffer, LARS goes on from momentum_buffer",
        ),
    ],
)
def test_a_state_of_other_moments_is_refused_and_changes_nothing(other, optimizer, said):
    params = make_params()
    given = other(params)
    train(given, params, [1])
    opt = optimizer(clone(params), lr=0.5)
    with pytest.raises(ValueError, match=f"state_dict has {said}"):
        opt.load_state_dict(given.state_dict())
    assert opt.param_groups[0]["lr"] == 0.5
    assert not opt.state


@BOTH
def test_state_takes_the_strides_of_the_parameter_it_is_loaded_for(optimizer):
    weight = nn.Parameter(torch.randn(4, 6, 3, 5))
    opt = optimizer([weight])
    train(opt, [weight], [1])
    last = nn.Parameter(weight.detach().clone(memory_format=torch.channels_last))
    other = optimizer([last])
    other.load_state_dict(opt.state_dict())
    for name, value in other.state[last].items():
        torch.testing.assert_close(value, opt.state[weight][name], rtol=0, atol=0)
        assert name == "step" or value.stride() == last.stride()


def test_lars_goes_on_from_a_torch_sgd_checkpoint():
    params = make_params()
    same = clone(params)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    train(sgd, params, [1, 2])
    for p, s in zip(params, same, strict=True):
        s.data.copy_(p.data)
    opt = LARS(same)  # without decay nothing is adapted: plain SGD
    opt.load_state_dict(sgd.state_dict())
    assert opt.param_groups[0]["dampening"] == 0.5
    train(sgd, params, [3, 4])
    train(opt, same, [3, 4])
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_lamb_goes_on_from_a_torch_adamw_checkpoint():
    params = make_params()
    same = clone(params)
    adamw = torch.optim.AdamW(params, lr=0.1, weight_decay=0.0, eps=1e-3)
    train(adamw, params, [1, 2])
    for p, s in zip(params, same, strict=True):
        s.data.copy_(p.data)
    opt = LAMB(same)  # without decay nothing is adapted: plain Adam
    opt.load_state_dict(adamw.state_dict())
    train(adamw, params, [3, 4])
    train(opt, same, [3, 4])
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [2, torch.tensor(2.0)])
def test_lamb_reads_the_step_that_apex_and_timm_keep_in_the_group(step):
    params = make_params()
    same = clone(params)
    opt = LAMB(params, lr=0.1, adapt="all", decay="decoupled", trust_clip=(0.0, 1.0))
    train(opt, params, [1, 2])
    theirs = opt.state_dict()
    theirs = {
        "state": {k: {n: v for n, v in s.items() if n != "step"} for k, s in theirs["state"].items()},
        "param_groups": [
            {
                "lr": 0.1,
                "bias_correction": 1,
                "betas": (0.9, 0.999),
                "eps": 1e-6,
                "weight_decay": 0.01,
                "grad_averaging": True,
                "max_grad_norm": None,
                "trust_clip": True,
                "always_adapt": True,
                "decoupled_decay": True,
                "step": step,
                "params": list(range(len(params))),
            }
        ],
    }
    for p, s in zip(params, same, strict=True):
        s.data.copy_(p.data)
    again = LAMB(same)
    again.load_state_dict(theirs)
    assert "step" not in again.param_groups[0]
    train(opt, params, [3])
    train(again, same, [3])
    assert_equal(params, same)


def test_lars_reads_the_names_that_timm_gives_its_options():
    params = make_params()
    opt = LARS(params)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["trust_coefficient"], group["adapt"]
        group |= {"trust_coeff": 0.02, "always_adapt": True}
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["trust_coefficient"], opt.param_groups[0]["adapt"]) == (0.02, "all")


@BOTH
def test_distributed_checkpointing_saves_and_restores_by_name_and_moves_no_weight(optimizer):
    model, again = nn.Linear(4, 3), nn.Linear(4, 3)
    again.load_state_dict(model.state_dict())
    opt, fresh = optimizer(model.parameters(), lr=0.1), optimizer(again.parameters(), lr=0.1)
    before = clone(model.parameters())
    initial = get_optimizer_state_dict(model, opt)  # takes a step with lr = 0 to have state to describe
    assert_equal(model.parameters(), before)
    train(opt, list(model.parameters()), [1, 2])
    again.load_state_dict(model.state_dict())
    saved = get_optimizer_state_dict(model, opt)
    assert set(initial["state"]) == set(saved["state"]) == {"weight", "bias"}
    set_optimizer_state_dict(again, fresh, saved)
    train(opt, list(model.parameters()), [3])
    train(fresh, list(again.parameters()), [3])
    assert_equal(again.parameters(), model.parameters())


# --- gradient scaling, compilation
# ------------------------------------------------------------------------------------


@EVERY_FORM
def test_the_scale_of_a_grad_scaler_is_undone_and_a_found_inf_changes_nothing(optimizer, options):
    params = make_params()
    same = clone(params)
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    plain = optimizer(same, lr=0.1, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for seed, bad in enumerate([True, False, False, True, False]):
        scaler.scale(torch.ones(()))
        grads = set_grads(params, seed, scaler.get_scale())
        set_grads(same, seed)
        before, counts = clone(params), step_counts(opt)
        if bad:
            grads[0][0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        if bad:
            assert_equal(params, before)
            assert all(count == 0 for count in step_counts(opt)) if not counts else step_counts(opt) == counts
            continue
        plain.step()
        for a, b in zip(params, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not hasattr(opt, "found_inf")
    assert moved(params, make_params())


@EVERY_FORM
def test_gradients_unscaled_before_the_step_are_not_divided_again(optimizer, options):
    params = make_params()
    same = clone(params)
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    set_grads(params, 1, 1024.0)
    scaler.unscale_(opt)
    scaler.step(opt)
    train(optimizer(same, lr=0.1, weight_decay=0.1, **options), same, [1])
    assert_equal(params, same)


@EVERY_FORM
def test_maximize_steps_along_the_negated_gradients(optimizer, options):
    params = make_params()
    same = clone(params)
    up = optimizer(params, lr=0.1, weight_decay=0.1, maximize=True, **options)
    down = optimizer(same, lr=0.1, weight_decay=0.1, **options)
    for seed in (1, 2):
        set_grads(params, seed)
        set_grads(same, seed, -1.0)
        up.step()
        down.step()
    assert_equal(params, same)


@BOTH
def test_checkpoints_load_with_and_without_names_of_parameters(optimizer):
    params = make_params()
    named = optimizer([(f"layer{i}", p) for i, p in enumerate(params)], lr=0.1, weight_decay=0.1)
    train(named, params, [1, 2])
    saved = named.state_dict()
    assert saved["param_groups"][0]["param_names"] == [f"layer{i}" for i in range(len(params))]
    unnamed_params, again_params = clone(params), clone(params)
    unnamed = optimizer(unnamed_params, lr=0.1, weight_decay=0.1)
    unnamed.load_state_dict(saved)
    again = optimizer([(f"layer{i}", p) for i, p in enumerate(again_params)], lr=0.1, weight_decay=0.1)
    again.load_state_dict(optimizer_without_names(saved))
    for opt, own in ((named, params), (unnamed, unnamed_params), (again, again_params)):
        train(opt, own, [3])
    assert_equal(unnamed_params, params)
    assert_equal(again_params, params)
    assert again.param_groups[0]["param_names"] == saved["param_groups"][0]["param_names"]


def optimizer_without_names(saved):
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in saved["param_groups"]]
    return {**saved, "param_groups": groups}


@EVERY_FORM
def test_a_step_can_be_compiled(optimizer, options):
    torch.compiler.reset()
    params = make_params()
    same = clone(params)
    opt = optimizer(params, lr=torch.tensor(0.1), weight_decay=0.1, **options)
    eager = optimizer(same, lr=0.1, weight_decay=0.1, **options)
    compiled = torch.compile(opt.step, backend="aot_eager")
    for seed in (1, 2, 3):
        set_grads(params, seed)
        compiled()
        train(eager, same, [seed])
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@BOTH
def test_a_compiled_step_is_one_graph(optimizer):
    torch.compiler.reset()
    params = make_params()
    opt = optimizer(params, lr=0.1, weight_decay=0.1)
    set_grads(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]

    @torch.compile(backend="eager", fullgraph=True)
    def step():
        opt.step()

    step()
    assert not torch.equal(params[0], before[0])


@EVERY_FORM
def test_state_that_was_dropped_right_after_a_step_is_gone(optimizer, options):
    dropped, fresh = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    first, second = (optimizer([p], lr=0.1, weight_decay=0.1, **options) for p in (dropped, fresh))
    for forget in (first.state.clear, lambda: first.state.pop(dropped, None)):
        dropped.grad = torch.tensor([1.0, 2.0])
        first.step()
        forget()
        with torch.no_grad():
            dropped.copy_(torch.tensor([3.0, 4.0]))
            fresh.copy_(torch.tensor([3.0, 4.0]))
        second.state.clear()
        second.__setstate__(second.__getstate__())  # knows nothing from before
        dropped.grad, fresh.grad = (torch.tensor([-2.0, 1.0]) for _ in range(2))
        first.step()
        second.step()
        assert torch.equal(dropped, fresh)
        assert len(first.state) == len(second.state)
        first.state.clear()


@BOTH
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"master_weights": True}], ids=str)
def test_a_parameter_that_changed_its_size_is_refused_before_anything_is_written(optimizer, flags):
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **flags)
    set_grads(params, 0)
    opt.step()
    for size in (40_000, 2):
        params[1].data = torch.ones(size)
        params[1].grad = torch.ones(size)
        before = params[0].detach().clone()
        with pytest.raises(ValueError, match=rf"must have their parameter's shape \({size},\), got \(3,\)"):
            opt.step()
        assert torch.equal(params[0], before)
        assert torch.equal(params[1], torch.ones(size))


@BOTH
def test_state_that_an_optimizer_around_this_one_keeps_beside_it_comes_back(optimizer):
    params = make_params()
    opt = optimizer(params, weight_decay=0.01)
    train(opt, params, [1])
    for p in params:
        opt.state[p]["slow_weights"] = p.detach().clone()
    again = optimizer(clone(params), weight_decay=0.01)
    again.load_state_dict(opt.state_dict())
    kept = [state["slow_weights"] for state in again.state.values()]
    assert_equal(kept, params)
