"""A step of LARS and LAMB: every convention of torch.optim that a training loop relies on."""

import math

import pytest
import torch
from optim_params import BOTH, EVERY_FORM, assert_equal, clone, make_params, moved, set_grads, step_counts, train
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlocal import LAMB, LARS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
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


@BOTH
def test_a_grad_scaler_unscales_and_skips_itself_unless_the_step_is_fused(optimizer):
    # So that others may clip in between, and steps that were skipped run no hooks: as with torch.optim.
    opt = optimizer(make_params())
    assert not opt._step_supports_amp_scaling
    assert optimizer(make_params(), fused=True)._step_supports_amp_scaling
    mixed = [{"params": make_params(), "fused": True}, {"params": make_params()}]
    assert not optimizer(mixed)._step_supports_amp_scaling
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append("step"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (True, False):
        scaler.scale(torch.ones(()))
        grads = set_grads(opt.param_groups[0]["params"], 0, scaler.get_scale())
        if bad:
            grads[0][0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
    assert seen == ["step"]


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


@pytest.mark.parametrize("bias_correction", [True, "step"])
def test_a_compiled_lamb_step_takes_no_exponential_an_element(bias_correction):
    torch.compiler.reset()
    params = [nn.Parameter(torch.ones(64, 64))]
    opt = LAMB(params, lr=torch.tensor(0.1), bias_correction=bias_correction)
    params[0].grad = torch.full((64, 64), 0.5)
    opt.step()
    _, sources = run_and_get_code(torch.compile(opt.step))
    kernels = [text for text in "\n".join(sources).split("'''") if "for(int64_t" in text or "std::expm1" in text]
    assert any("4096L" in kernel for kernel in kernels)
    assert any("std::expm1" in kernel for kernel in kernels)
    for kernel in kernels:  # one corrects the bias, another loops over the elements
        assert "std::expm1" not in kernel or "4096L" not in kernel


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


@BOTH
@pytest.mark.parametrize(
    ("dtypes", "options", "scaled"),
    [
        ((torch.float32, torch.bfloat16), {"master_weights": True}, False),
        ((torch.float32, torch.float32), {}, True),
        ((torch.float32, torch.float32), {"fused": True}, False),
    ],
    ids=["several dtypes", "found_inf", "fused"],
)
def test_a_compiled_step_of_several_groups_steps_each_with_its_own_state(optimizer, dtypes, options, scaled):
    torch.compiler.reset()
    if optimizer is LARS:
        options = {**options, "momentum": 0.9, "dampening": 0.5}
    params = [nn.Parameter(torch.randn(3).to(dtype)) for dtype in dtypes * 2]
    same = clone(params)
    opt, eager = (
        optimizer([{"params": each[:2]}, {"params": each[2:]}], lr=0.1, weight_decay=0.1, **options)
        for each in (params, same)
    )
    if scaled:
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    compiled = torch.compile(opt.step, backend="eager")
    for seed in (1, 2, 3):
        set_grads(params, seed)
        compiled()
        train(eager, same, [seed])
    assert [opt.state[p]["step"].item() for p in params] == [3.0] * 4
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[(4,), (3, 5)], [(2, 40_000), (700, 900)]], ids=["short", "long"])
def test_groups_of_lamb_share_memory_no_larger_than_a_step_needs(sizes):
    params = [nn.Parameter(torch.randn(size)) for size in sizes]
    opt = LAMB([{"params": [p]} for p in params], lr=0.1)
    train(opt, params, [1, 2])
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(opt._tables)}
    longest = 4 * max(p.numel() for p in params)
    assert sum(kept.values()) <= 2 * longest  # an update, and a gradient unless that is longer than a chunk


def tensors_in(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@BOTH
def test_a_step_of_fake_tensors_is_one_of_plain_ones(optimizer):
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        model(torch.randn(2, 3)).sum().backward()
        opt = (
            optimizer(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
            if optimizer is LARS
            else (optimizer(model.parameters(), lr=0.1, weight_decay=0.1))
        )
        opt.step()
    moments = [value for state in opt.state.values() for name, value in state.items() if name != "step"]
    assert {tuple(value.shape) for value in moments} == {(4, 3), (4,)}


@BOTH
def test_a_later_group_that_has_no_kernels_is_refused_before_anything_is_written(optimizer):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = optimizer([{"params": [first]}, {"params": [second]}], lr=0.1, fused=True)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    with pytest.raises(RuntimeError, match="kernels for float32, bfloat16 and float16, got"):
        opt.step()
    assert torch.equal(first, torch.ones(3))


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_the_norm_of_scaled_gradients_is_taken_unscaled(options):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = LARS([weight], lr=0.1, weight_decay=0.0, adapt="all", trust_coefficient=1.0, **options)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    weight.grad = torch.tensor([3e15, 4e15]) * 2.0**16  # whose squares are beyond float32
    opt.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2.7, 3.6]), rtol=1e-6, atol=0)


@BOTH
def test_a_sparse_gradient_in_a_later_group_is_refused_before_anything_is_written(optimizer):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = optimizer([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad, second.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="do not support sparse gradients"):
        opt.step()
    assert torch.equal(first, torch.ones(3))


@BOTH
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels can run there")
def test_kernels_asked_for_where_none_can_run_are_refused_before_anything_is_stepped_or_made(optimizer, monkeypatch):
    monkeypatch.setattr("fastlocal.ops.implementation._is_interpreting", lambda: False)
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = optimizer([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    opt.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match="needs tensors on a CUDA device"):
        opt.step()
    assert not opt.state
    opt.param_groups[0]["fused"] = None
    opt.step()
    stepped = first.detach().clone()
    opt.param_groups[1]["fused"] = True  # that a group was stepped by other means tells nothing
    with pytest.raises(RuntimeError, match="needs tensors on a CUDA device"):
        opt.step()
    assert torch.equal(first, stepped)


@EVERY_FORM
def test_a_loss_scale_of_one_element_is_taken_as_a_number(optimizer, options):
    number = nn.Parameter(torch.tensor(3.0))
    opt = optimizer([number], lr=0.1, weight_decay=0.0, **options)
    opt.grad_scale, opt.found_inf = torch.tensor([4.0]), torch.tensor([0.0])
    twin = clone([number])[0]
    number.grad, twin.grad = torch.tensor(2.0), torch.tensor(0.5)
    opt.step()
    optimizer([twin], lr=0.1, weight_decay=0.0, **options).step()
    assert_equal([number], [twin])
    assert number.shape == ()


@EVERY_FORM
def test_the_gradient_of_an_imaginary_part_steps_as_its_value_does(optimizer, options):
    real, imaginary = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    (torch.complex(real, imaginary).conj() * (1 + 2j)).imag.sum().backward()
    assert imaginary.grad is not None
    assert imaginary.grad.is_neg()  # a minus sign that is not written to memory
    twins = clone([real, imaginary])
    for twin, value in zip(twins, (2.0, -1.0), strict=True):
        twin.grad = torch.tensor([value])
    for params in ([real, imaginary], twins):
        optimizer(params, lr=0.1, weight_decay=0.1, **options).step()
    assert_equal([real, imaginary], twins)


class _NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's: no operation may result in it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)), func
        return result


@BOTH
@pytest.mark.parametrize("flags", [{}, {"foreach": False}])
def test_a_step_needs_no_float64_from_a_device(optimizer, flags):
    param = nn.Parameter(torch.randn(3, 3, device="meta"))
    param.grad = torch.randn_like(param)
    opt = optimizer([param], weight_decay=0.1, **flags)
    with _NoFloat64():
        opt.step()


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


@pytest.mark.parametrize("foreach", [None, True, False])
def test_weights_that_are_infinite_at_a_rate_of_zero_are_no_error(foreach):
    param = torch.nn.Parameter(torch.tensor([math.inf, 1.0]))
    param.grad = torch.ones_like(param)
    LARS([param], lr=0.0, momentum=0.0, weight_decay=0.1, trust_clip=True, foreach=foreach).step()
    assert param.isnan().all()  # 0 · ∞


@BOTH
def test_parameters_that_are_several_tensors_in_one_are_stepped_by_the_reference_alone(optimizer):
    def pair():
        return TwoTensor(torch.ones(2, 2), torch.full((2, 2), 2.0))

    options = {"lr": 0.1, "weight_decay": 0.1}
    ends = []
    for choice in ({}, {"foreach": False}):
        param = nn.Parameter(pair())
        param.grad = pair()
        optimizer([param], **options, **choice).step()
        ends.append((param.a.tolist(), param.b.tolist()))
    assert ends[0] == ends[1]
    assert ends[0][0] != [[1.0, 1.0]] * 2
    param.grad = pair()
    for choice in ({"foreach": True}, {"fused": True}):
        with pytest.raises(TypeError, match="steps plain tensors, got a TwoTensor"):
            optimizer([param], **options, **choice).step()
