"""Copies of a module: what `copy.deepcopy` refuses or leaves out."""

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def require_initialised(module: nn.Module) -> None:
    """Raise ValueError for a lazy module that has not seen its first input: it cannot be copied."""
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(f"{kind} {name!r} is uninitialised: run one forward pass of the lazy module first")


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy; what a forward pass left in the module, such as an attention map, is copied without its graph."""
    return copy.deepcopy(module, _memo(module))


def twin_of(module: nn.Module) -> nn.Module:
    """A copy that trains as the module does: with the attributes and gradient hooks of its parameters too.

    A hook that is a method of the module becomes one of the copy; attributes that cannot be copied are shared.

    Raises:
        ValueError: a parameter has a hook that runs after its gradient was accumulated: that is about this one alone.
    """
    memo = _memo(module)
    twin = copy.deepcopy(module, memo)
    for (name, parameter), copied in zip(module.named_parameters(), twin.parameters(), strict=True):
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name!r} has a post-accumulate-grad hook, which would act on worker 0 alone: register it "
                "on each worker's parameters after Workers(...)"
            )
        if copied is parameter:  # its module says that it is its own copy
            continue
        for attribute, value in vars(parameter).items():
            setattr(copied, attribute, _copied(value, memo))
        trains = copied.requires_grad
        for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
            if isinstance(hook, MethodType) and id(hook.__self__) in memo:
                hook = MethodType(hook.__func__, memo[id(hook.__self__)])
            copied.requires_grad_(True).register_hook(hook)  # frozen since then, perhaps for a while
        copied.requires_grad_(trains)
    return twin


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except TypeError:  # a process group, a lock
        return value


def _memo(module: nn.Module) -> dict[int, Any]:
    """What a deep copy finds copied already: results, without their graph."""
    attributes = [vars(submodule) for submodule in module.modules()]
    attributes += [vars(parameter) for parameter in module.parameters()]
    return {id(tensor): tensor.detach().clone() for tensor in _results(attributes, set())}


def _results(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in attributes, and in their lists and dicts, that have a graph."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for each in value.values() if isinstance(value, dict) else value:
            yield from _results(each, seen)
