"""The state of LARS and LAMB: copies, checkpoints, and those of other libraries."""

import copy
import gc
import io
import math
import pickle
import weakref
from functools import partial

import pytest
import torch
from optim_params import BOTH, EVERY_FORM, assert_equal, clone, make_params, set_grads, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastlocal import LAMB, LARS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
def test_an_optimizer_pickled_before_there_was_an_option_takes_its_default(optimizer):
    params = make_params()
    opt = optimizer(params, lr=0.1, maximize=True)
    older = copy.deepcopy(opt.__getstate__())
    for group in older["param_groups"]:
        del group["capturable"], group["adapt"]
    again = optimizer(clone(params))
    again.__setstate__(older)
    group = again.param_groups[0]
    assert (group["capturable"], group["adapt"]) == (opt.defaults["capturable"], opt.defaults["adapt"])
    assert (group["lr"], group["maximize"]) == (0.1, True)


@BOTH
def test_a_state_of_the_wrong_shape_is_refused(optimizer):
    params = [nn.Parameter(torch.randn(4, 5))]
    opt = optimizer(params)
    train(opt, params, [1])
    with pytest.raises(ValueError, match=r"must have its parameter's shape \(5, 4\), got \(4, 5\)"):
        optimizer([nn.Parameter(torch.randn(5, 4))]).load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("optimizer", "name", "value"),
    [(LAMB, "exp_avg", None), (LAMB, "exp_avg_sq", 3.0), (LARS, "momentum_buffer", 3.0), (LAMB, "master", "none")],
)
def test_a_state_that_is_no_tensor_is_named_and_changes_nothing(optimizer, name, value):
    params = make_params()
    opt = optimizer(params)
    train(opt, params, [1])
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][name] = value
    again = optimizer(clone(params))
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got {value!r}"):
        again.load_state_dict(saved)
    assert not again.state


def test_a_state_whose_steps_are_others_is_refused():
    params = make_params()
    theirs = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(
        ValueError, match="made with amsgrad=True, which LAMB does not have: its steps would be others"
    ):
        LAMB(params).load_state_dict(theirs.state_dict())
    for option in ("caution", "corrected_weight_decay", "adam", "rectify", "pre_norm"):
        saved = LAMB(params).state_dict()
        saved["param_groups"][0][option] = True
        with pytest.raises(ValueError, match=f"made with {option}=True, which LAMB does not have"):
            LAMB(params).load_state_dict(saved)
        saved["param_groups"][0][option] = False
        LAMB(params).load_state_dict(saved)


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"adapt": "none"}, ValueError, "adapt must be one of 'decayed', 'all', 'matrices', got 'none'"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_in_a_state_dict_is_refused_and_changes_nothing(optimizer, options, error, said):
    params = make_params()
    opt = optimizer(params, lr=0.5)
    train(opt, params, [1])
    saved, before = (copy.deepcopy(opt.state_dict()) for _ in range(2))
    saved["param_groups"][0].update(options)
    for state in saved["state"].values():
        for value in state.values():
            value += 1
    with pytest.raises(error, match=said):
        opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    for param, state in zip(params, before["state"].values(), strict=True):
        assert_equal(opt.state[param].values(), state.values())


@BOTH
@pytest.mark.parametrize(
    "given", [{}, {"param_groups": []}, None, {"state": [], "param_groups": [{"params": [0]}]}], ids=str
)
def test_what_is_no_state_dict_is_refused_as_such_and_changes_nothing(optimizer, given):
    params = make_params()[:1]
    opt = optimizer(params, lr=0.5)
    train(opt, params, [1])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict is not one of an optimizer: "):
        opt.load_state_dict(given)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert_equal(opt.state[params[0]].values(), before["state"][0].values())


@BOTH
def test_a_state_that_was_loaded_is_not_kept_alive(optimizer):
    params = make_params()
    opt = optimizer(params)
    train(opt, params, [1])
    saved = copy.deepcopy(opt.state_dict())
    loaded = [weakref.ref(value) for state in saved["state"].values() for value in state.values()]
    opt.load_state_dict(saved)
    del saved
    gc.collect()
    assert not any(tensor() is not None for tensor in loaded)


@pytest.mark.parametrize(("of", "into"), [(LARS, LAMB), (LAMB, LARS)])
@pytest.mark.parametrize("seeds", [[], [1]])
def test_a_state_dict_of_the_other_class_is_refused_and_changes_nothing(of, into, seeds):
    params = make_params()
    given, opt = of(clone(params), lr=0.25), into(params, lr=0.5)
    train(given, given.param_groups[0]["params"], seeds)
    with pytest.raises(ValueError, match=f"is not one of {into.__name__}: its groups have no {into._mark}"):
        opt.load_state_dict(given.state_dict())
    assert opt.param_groups[0]["lr"] == 0.5
    assert not opt.state


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
    params = [nn.Parameter(torch.randn(3)), *make_params(torch.float64)]  # most of which no kernel takes
    there, here = optimizer(params, fused=True), optimizer(params)
    here.load_state_dict(there.state_dict())
    assert here.param_groups[0]["fused"] is None
    theirs = (torch.optim.AdamW if optimizer is LAMB else torch.optim.SGD)(params, lr=0.5, foreach=True).state_dict()
    theirs["param_groups"][0]["capturable"] = True
    there.load_state_dict(theirs)
    assert there.param_groups[0]["lr"] == 0.5
    assert [there.param_groups[0][name] for name in ("foreach", "fused", "capturable")] == [None, True, False]
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


def test_a_state_that_lacks_one_of_two_moments_is_refused_and_changes_nothing():
    params = make_params()
    opt = LAMB(params)
    train(opt, params, [1])
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["exp_avg_sq"]
    again = LAMB(clone(params), lr=0.5)
    with pytest.raises(ValueError, match="state_dict has exp_avg, LAMB goes on from exp_avg and exp_avg_sq"):
        again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 0.5
    assert not again.state


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


def test_the_step_of_a_group_counts_for_those_of_its_states_that_have_none_of_their_own():
    params = make_params()[:3]
    moments = [{name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for p in params]
    theirs = {
        "state": {0: moments[0], 1: {**moments[1], "step": torch.tensor(5.0)}},  # the last has never been stepped
        "param_groups": [{"lr": 0.1, "step": 2, "params": [0, 1, 2]}],
    }
    opt = LAMB(params)
    opt.load_state_dict(theirs)
    assert [opt.state[p]["step"].item() for p in params[:2]] == [2, 5]
    assert params[2] not in opt.state


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


@pytest.mark.parametrize("make", [LAMB, partial(LARS, dampening=0.5)])
def test_a_capture_that_is_refused_leaves_no_state_behind(make, monkeypatch):
    # What is made in a capture is only recorded: a count left in the state would be whatever lay in its memory.
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    param.grad = torch.full_like(param, 0.5)
    optimizer = make([param])

    def refuse(param):
        raise RuntimeError("take one step before the capture")

    with monkeypatch.context() as capture:
        capture.setattr(optimizer, "_require_no_capture", refuse)
        with pytest.raises(RuntimeError, match="before the capture"):
            optimizer.step()
    assert optimizer.state[param] == {}
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


@EVERY_FORM
def test_state_that_was_replaced_is_what_the_next_step_steps(optimizer, options):
    params = make_params()
    opt = optimizer(params, lr=0.1, weight_decay=0.1, **options)
    train(opt, params, [1, 2])
    for p in params:
        opt.state[p] = copy.deepcopy(opt.state[p])
    before = copy.deepcopy([opt.state[p] for p in params])
    train(opt, params, [3])
    for p, old in zip(params, before, strict=True):
        assert all(not torch.equal(opt.state[p][name], value) for name, value in old.items() if value.numel())


def test_a_momentum_buffer_set_to_none_begins_anew():
    params = [nn.Parameter(torch.ones(3))]
    opt = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.0)
    for _ in range(2):
        params[0].grad = torch.full((3,), 2.0)
        opt.step()
        opt.state[params[0]]["momentum_buffer"] = None
    opt.step()
    assert opt.state[params[0]]["momentum_buffer"].tolist() == [2.0] * 3


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_under_dampening_a_momentum_buffer_set_to_none_begins_anew_as_that_of_sgd(options):
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = LARS([ours], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.0, **options)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, dampening=0.5)
    for seed in range(5):
        if seed == 3:
            opt.state[ours]["momentum_buffer"] = sgd.state[theirs]["momentum_buffer"] = None
        ours.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        opt.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_states_of_steps_with_numbers_of_their_own_are_refused():
    params = make_params()
    theirs = torch.optim.NAdam(params)
    train(theirs, params, [1])
    with pytest.raises(ValueError, match="has mu_product and exp_avg and exp_avg_sq, LAMB goes on from"):
        LAMB(params).load_state_dict(theirs.state_dict())


def test_a_state_of_pytorch_optimizer_with_what_its_last_step_left_goes_on_as_theirs():
    lamb = pytest.importorskip(
        "pytorch_optimizer", reason="pytorch-optimizer, of the test extra, is not installed"
    ).Lamb
    (param,) = params = [nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))]
    theirs = lamb(params, lr=0.1, eps=0.0, weight_decay=0.1, weight_decouple=False, foreach=False)
    param.grad = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    theirs.step()
    assert {"weight_norm", "adam_norm", "trust_ratio"} <= theirs.state[param].keys()
    same = clone(params)
    opt = LAMB(same, weight_decay=0.1, bias_correction=False)
    opt.load_state_dict(theirs.state_dict())
    opt.param_groups[0]["eps"] = 0.0
    opt.param_groups[0]["lr"] = 0.1 / (1 - 0.9**2)  # it divides only the step, by 1 − β1^t
    opt.param_groups[0]["bias_correction"] = False
    assert opt.state[same[0]]["step"].item() == 1.0
    same[0].grad = param.grad.clone()
    theirs.step()
    opt.step()
    torch.testing.assert_close(same[0], param, rtol=1e-12, atol=1e-12)


def test_groups_of_deepspeed_bound_the_ratio_and_do_not_clip():
    params = make_params()
    opt = LAMB(params)
    train(opt, params, [1])
    saved = copy.deepcopy(opt.state_dict())
    theirs = {"lr": 0.1, "bias_correction": True, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    bounds = {"max_grad_norm": 0.0, "max_coeff": 10.0, "min_coeff": 0.01}
    saved["param_groups"] = [{**theirs, **bounds, "params": g["params"]} for g in saved["param_groups"]]
    opt.load_state_dict(saved)
    for group in opt.param_groups:
        assert group["trust_clip"] == (0.01, 10.0)
        assert (group["bias_correction"], group["adapt"], group["max_grad_norm"]) == ("step", "all", None)
        assert not group.keys() & {"max_coeff", "min_coeff"}
    train(opt, params, [2])


def test_a_count_that_timm_keeps_in_the_group_loads_under_another_default_device():
    params = make_params()
    opt = LAMB(params)
    train(opt, params, [1])
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        del state["step"]
    for group in saved["param_groups"]:
        del group["adapt"], group["grad_averaging"]
        group["step"] = 7
    with torch.device("meta"):
        opt.load_state_dict(saved)
    assert [opt.state[p]["step"].item() for p in params] == [7.0] * len(params)


def test_an_option_that_needs_more_state_may_be_set_later():
    params = [nn.Parameter(torch.ones(3))]
    opt = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.0)
    for dampening in (0.0, 0.5):
        opt.param_groups[0]["dampening"] = dampening
        params[0].grad = torch.full((3,), 2.0)
        opt.step()
    assert opt.state[params[0]]["momentum_buffer"].tolist() == pytest.approx([0.9 * 2 + 0.5 * 2] * 3)


@pytest.mark.parametrize("make", [LAMB, partial(LARS, lr=0.1, momentum=0.9, dampening=0.5)], ids=["LAMB", "LARS"])
def test_a_step_count_below_zero_or_nan_is_refused(make):
    params = make_params()
    opt = make(params)
    train(opt, params, [1])
    for wrong in (-1.0, math.nan):
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0]["step"] = torch.tensor(wrong)
        with pytest.raises(ValueError, match=f"step must be at least 0, got {wrong}"):
            make(params).load_state_dict(saved)
