"""Copies of a module: what a forward pass left in it, and what hangs on its parameters."""

import functools
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from fastlocal import LocalSGD, Workers
from fastlocal.twin import copy_of, twin_of


class Remembers(nn.Module):
    """Keeps what its last forward pass came to, as attention maps and auxiliary losses are kept."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kept = {"list": [], "last": None}

    def forward(self, x):
        self.last = self.linear(x)
        self.kept = {"list": [self.last * 2], "last": (self.last + 1,)}
        return self.last


def test_a_module_that_keeps_a_result_of_its_forward_pass_can_be_copied():
    model = Remembers()
    model(torch.ones(1, 3))
    copied = copy_of(model)
    assert torch.equal(copied.last, model.last)
    assert torch.equal(copied.kept["list"][0], 2 * model.last)
    assert copied.last.grad_fn is None
    assert model.last.grad_fn is not None


def test_a_result_that_a_copy_changes_in_place_stays_in_the_original():
    model = Remembers()
    model(torch.ones(1, 3))
    before = model.last.detach().clone()
    copied = copy_of(model)
    copied.last.zero_()
    copied.kept["list"][0].zero_()
    assert torch.equal(model.last, before)
    assert torch.equal(model.kept["list"][0], 2 * before)


def test_workers_that_keep_results_have_a_mean_after_training():
    model = Remembers()
    model(torch.ones(1, 3))
    workers = Workers(model, 2)
    optimizer = LocalSGD(torch.optim.SGD(workers.parameters(), lr=0.1), workers, 1)
    for worker in workers:
        worker(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(workers.mean().linear.weight, workers[1].linear.weight)


def test_old_spectral_norm_has_a_mean():
    workers = Workers(torch.nn.utils.spectral_norm(nn.Linear(3, 2)), 2)
    for worker in workers:
        worker(torch.ones(1, 3)).sum().backward()
    assert workers.mean().weight_orig.shape == (2, 3)


def test_every_worker_has_the_attributes_and_gradient_hooks_of_the_models_parameters():
    model = nn.Linear(2, 1, bias=False)
    model.weight._no_weight_decay = True
    model.weight.tags = ["a"]
    model.weight.register_hook(lambda gradient: gradient * torch.tensor([1.0, 0.0]))
    workers = Workers(model, 3)
    for worker in workers:
        worker(torch.ones(1, 2)).sum().backward()
        assert worker.weight.grad.tolist() == [[1.0, 0.0]]
        assert worker.weight._no_weight_decay
    assert workers[1].weight.tags == ["a"]
    assert workers[1].weight.tags is not model.weight.tags


def test_a_hook_that_steps_one_parameter_is_refused_and_one_a_worker_is_left_alone():
    model = nn.Linear(2, 1, bias=False)
    handle = model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="parameter 'weight' has a post-accumulate-grad hook"):
        Workers(model, 2)
    assert len(Workers(model, 1)) == 1
    handle.remove()
    workers = Workers(nn.Linear(2, 1), 2)
    for parameter in workers.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    assert workers.mean().weight.shape == (1, 2)


@pytest.mark.parametrize(
    "model",
    [nn.LazyLinear(3), *(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=own)) for own in (True, False))],
)
def test_a_lazy_module_is_refused_by_name_until_it_has_seen_an_input(model):
    with pytest.raises(ValueError, match="is uninitialised: run one forward pass of the lazy module first"):
        Workers(model, 2)
    model(torch.ones(4, 2))
    assert len(Workers(model, 2)) == 2


def test_a_hook_of_a_parameter_that_was_frozen_acts_once_it_trains_again():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    model[0].weight.register_hook(lambda gradient: gradient * 0)
    model[0].requires_grad_(False)
    twin = twin_of(model)
    assert not twin[0].weight.requires_grad
    twin.requires_grad_(True)
    twin(torch.ones(1, 2)).sum().backward()
    assert twin[0].weight.grad.tolist() == [[0.0, 0.0]]


class Masked(nn.Module):
    """Its hook is a method, with state of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.weight.register_hook(self.mask_gradient)
        self.weight.owner = self
        self.calls = 0

    def mask_gradient(self, gradient):
        self.calls += 1
        return gradient

    def forward(self, x):
        return self.weight * x


def test_a_method_of_the_module_acts_on_the_copy_and_back_references_lead_to_it():
    model = Masked()
    twin = twin_of(model)
    twin(torch.ones(2)).sum().backward()
    assert (model.calls, twin.calls) == (0, 1)
    assert twin.weight.owner is twin


def test_attributes_that_deepcopy_refuses_are_copied_without_their_graph_or_shared():
    model = nn.Linear(2, 1, bias=False)
    model.weight.fast = model.weight - 0.1
    model.weight.lock = threading.Lock()
    model.cycle = {}
    model.cycle["itself"] = model.cycle
    twin = twin_of(model)
    assert torch.equal(twin.weight.fast, model.weight.fast)
    assert twin.weight.lock is model.weight.lock
    assert twin.cycle["itself"] is twin.cycle


def test_a_process_group_is_shared_with_the_copies_and_the_mean():
    group = dist.ProcessGroup(0, 1)
    team = Workers(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2, process_group=group)), 2)
    assert team[1][1].process_group is team.mean()[1].process_group is group


def test_an_attribute_that_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].lock = threading.Lock()
    with pytest.raises(TypeError, match=r"the model's attribute '1\.lock' cannot be copied, .*: cannot pickle"):
        Workers(model, 2)


def test_a_module_that_is_its_own_copy_keeps_its_hooks_as_they_are():
    class Shared(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Shared(2, 1), nn.Linear(1, 1))
    model[0].weight.register_hook(lambda gradient: gradient)
    twin = twin_of(model)
    assert twin[0] is model[0]
    assert len(model[0].weight._backward_hooks) == 1


def test_a_tied_parameter_has_its_hook_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    twin = twin_of(model)
    for module in (model, twin):
        module(torch.ones(1, 2)).sum().backward()
    assert torch.equal(twin[0].weight.grad, model[0].weight.grad)


@dataclass
class Output:
    loss: object = None


def test_results_in_collections_and_dataclasses_are_copied_without_their_graph():
    model = Remembers()
    model.recent, model.output = deque(maxlen=2), Output()
    model.recent.append(model(torch.ones(1, 3)))
    model.output.loss = model.recent[0].sum()
    copied = copy_of(model)
    assert torch.equal(copied.recent[0], model.recent[0])
    assert copied.recent[0].grad_fn is None
    assert copied.output.loss == model.output.loss


class Closes(nn.Module):
    """Computes with a function around itself, which a copy would share."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = lambda x: self.linear(x)

    def forward(self, x):
        return self.scale(x)


def test_a_model_that_computes_with_a_function_around_itself_is_refused_by_name():
    with pytest.raises(ValueError, match="'0.scale' is a function around a part of the model itself"):
        Workers(nn.Sequential(Closes()), 2)
    patched = nn.Sequential(nn.Linear(2, 2))
    original = patched.forward
    patched.forward = lambda x: 2 * original(x)
    with pytest.raises(ValueError, match="'forward' is a function around"):
        Workers(patched, 1).mean()
    listed = Closes()
    listed.scale = [listed.scale]
    with pytest.raises(ValueError, match="'scale' is a function around"):
        Workers(listed, 2)


def test_a_function_around_the_model_that_was_made_its_method_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    linear = model[0]
    model.forward = MethodType(lambda self, x: 2 * linear(x), model)
    with pytest.raises(ValueError, match="'forward' is a function around a part of the model itself"):
        Workers(model, 2)


def decorated(function):
    @functools.wraps(function)
    def inner(*arguments):
        return function(*arguments)

    return inner


class Calls:
    """A callable object around a function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda forward: decorated(decorated(forward)),
        lambda forward: torch.autocast("cpu", torch.bfloat16)(decorated(forward)),
        lambda forward: functools.partial(decorated(forward)),
        lambda forward: functools.partial(lambda f, x: f(x), decorated(forward)),
        lambda forward: functools.lru_cache(None)(forward),
        lambda forward: Calls(decorated(forward)),
        lambda forward: {"a": {"b": [lambda x, f=forward: f(x)]}},
        lambda forward: functools.partial(lambda x, f: f(x), f=decorated(forward)),
        lambda forward: lambda x, *, f=forward: f(x),
        lambda forward: deque([decorated(forward)]),
        lambda forward: {decorated(forward)},
    ],
    ids=[
        *("twice", "autocast", "partial", "argument", "cache", "object", "nested"),
        *("named argument", "keyword", "deque", "set"),
    ],
)
def test_a_function_in_a_function_around_the_model_is_refused_too(wrapped):
    model = nn.Sequential(nn.Linear(2, 2))
    model.compute = wrapped(model.forward)
    with pytest.raises(ValueError, match="'compute' is a function around a part of the model itself"):
        Workers(model, 2)


@pytest.mark.parametrize("harmless", range(6))
def test_a_function_around_the_model_is_found_behind_others(harmless):
    model = nn.Sequential(nn.Linear(2, 2))
    linear = model[0]
    model.functions = [lambda x, k=k: x * k for k in range(harmless)]
    model.more = [(lambda k, j: lambda x: x * k + j)(number, 1.5) for number in range(harmless)]
    Workers(model, 2)
    model.last = [*model.more, lambda x: linear(x)]
    with pytest.raises(ValueError, match="'last' is a function around"):
        Workers(model, 2)


def test_hooks_that_keep_activations_may_be_shared_after_a_forward_pass_too():
    model, kept = nn.Sequential(nn.Linear(2, 2)), {}
    model.kept = kept
    model[0].register_forward_hook(lambda module, inputs, output: kept.update(x=output))
    model(torch.ones(1, 2))
    Workers(model, 2)


def test_a_hook_that_computes_with_another_part_of_the_model_is_refused():
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "adapter": nn.Linear(2, 2)})
    adapter = model["adapter"]
    handle = model["base"].register_forward_hook(lambda module, inputs, output: output + adapter(inputs[0]))
    with pytest.raises(ValueError, match="a hook of 'base' is a function around another part of the model"):
        Workers(model, 2)
    handle.remove()
    handle = model["base"].register_forward_pre_hook(lambda module, inputs: adapter(inputs[0]))
    with pytest.raises(ValueError, match="a hook of 'base' is a function around another part of the model"):
        Workers(model, 2)
    handle.remove()
    model["base"].register_forward_hook(lambda module, inputs, output: vars(model).update(seen=output.shape))
    Workers(model, 2)


def test_a_gradient_hook_that_computes_with_a_parameter_is_refused():
    model = nn.Linear(2, 1)
    handle = model.weight.register_hook(lambda gradient, weight=model.weight: gradient + 0.1 * weight.detach())
    with pytest.raises(ValueError, match="a gradient hook of parameter 'weight' is a function around a part"):
        Workers(model, 2)
    handle.remove()
    model.weight.register_hook(lambda gradient: vars(model).update(seen=gradient.norm()))  # watches
    factor = torch.tensor(2.0)
    model.weight.register_hook(lambda gradient: gradient * factor)
    for worker in Workers(model, 2):
        worker(torch.ones(1, 2)).sum().backward()
        assert worker.weight.grad.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_that_computes_with_another_part_of_the_model_is_refused(register):
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "gate": nn.Linear(2, 2)})
    gate = model["gate"]
    getattr(model["base"], register)(lambda module, *gradients: gradients[-1][0] * gate.bias)
    with pytest.raises(ValueError, match="a hook of 'base' is a function around another part of the model"):
        Workers(model, 2)
    Workers(model, 1).mean()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_recurrent_layer_trains_in_each_worker(wrap):
    model = wrap(nn.LSTM(2, 3), "weight_hh_l0")
    team = Workers(model, 2)
    for number, worker in enumerate(team, start=1):
        worker(torch.full((4, 1, 2), float(number)))[0].sum().backward()
    for parameters in zip(*(worker.parameters() for worker in team), strict=True):
        assert not torch.equal(parameters[0].grad, parameters[1].grad)
    team.mean()(torch.ones(4, 1, 2))


class Itself(nn.Module):
    """A backbone that all share."""

    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def __deepcopy__(self, memo):
        return self


def test_a_part_that_is_its_own_copy_keeps_referring_to_its_parent():
    model = nn.Module()
    model.linear, model.shared = nn.Linear(2, 1), Itself(model)
    with pytest.raises(ValueError, match=r"'shared\.parent' is a function .* or holds a weak reference to one"):
        Workers(model, 2)
    assert model.shared.parent() is model


def test_what_has_nothing_to_do_with_a_parameter_is_raised_as_it_is():
    class Full(nn.Linear):
        def __deepcopy__(self, memo):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        Workers(Full(2, 1), 2)


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return x * self.parent().scale


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.child = Child(self)

    def forward(self, x):
        return self.child(x)


def test_a_child_that_refers_weakly_to_its_parent_refers_to_that_of_its_own_worker():
    team = Workers(Parent(), 2)
    for worker in team:
        worker(torch.ones(1)).sum().backward()
    assert [worker.scale.grad.item() for worker in team] == [1.0, 1.0]
    mean = team.mean()
    with torch.no_grad():
        team[0].scale.fill_(100.0)
    assert mean(torch.ones(1)).item() == 2.0
    team[0].child.parents = [team[0].child.parent, None]
    mean = team.mean()
    assert mean.child.parents[0]() is mean
    assert team[0].child.parents[0]() is team[0]
    team[0].child.parents = {"all": [team[0].child.parent]}
    with pytest.raises(ValueError, match=r"'child\.parents' is a function .* or holds a weak reference to one"):
        team.mean()


def test_a_sparse_parameter_cannot_be_copied_and_says_so():
    model = nn.Linear(2, 1)
    model.register_parameter("sparse", nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False))
    with pytest.raises(TypeError, match="the sparse parameter 'sparse' cannot be copied, as each worker's model is"):
        Workers(model, 2)


def test_copies_have_gradients_in_the_dtype_that_the_parameters_ask_for():
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has gradients in their parameter's dtype alone")
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    for worker in Workers(model, 2):
        worker(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        assert worker.weight.grad.dtype == torch.float32


def test_functions_around_what_does_not_train_and_hooks_that_watch_may_be_shared():
    class Masks(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            mask, others = torch.ones(2), nn.Linear(2, 2)
            self.register_buffer("mask", mask)
            self.masked = lambda x: others(x * mask)
            self.seen = {}
            self.register_forward_hook(lambda module, inputs, output: self.seen.update(last=output.detach()))

    workers = Workers(Masks(), 2)
    workers[0](torch.ones(1, 2))
    assert workers.mean().seen["last"].shape == (1, 2)


def test_a_compiled_model_makes_functions_of_its_own():
    model = torch.compile(nn.Linear(2, 2), backend="eager")
    workers = Workers(model, 2)
    for worker in workers:
        worker(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in workers.parameters())


def test_a_function_around_a_result_of_the_forward_pass_may_be_shared():
    model = Remembers()
    last = model(torch.ones(1, 3))
    model.scale = lambda x: x * last
    assert copy_of(model).scale is model.scale


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_is_refused():
    with pytest.raises(ValueError, match="a scripted or traced module cannot be copied with its parameters"):
        twin_of(torch.jit.script(nn.Linear(2, 2)))
