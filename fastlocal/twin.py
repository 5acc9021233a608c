"""Copies of a module: what `copy.deepcopy` refuses or leaves out."""

import copy
from collections.abc import Iterator, Mapping
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
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in _all_results(module)})


def twin_of(module: nn.Module) -> nn.Module:
    """A copy that trains as the module does: with the attributes and gradient hooks of its parameters too.

    Raises:
        ValueError: a parameter has a hook that runs after its gradient was accumulated: that is about this one alone.
    """
    twin = copy_of(module)
    for (name, parameter), copied in zip(module.named_parameters(), twin.parameters(), strict=True):
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name!r} has a post-accumulate-grad hook, which would act on worker 0 alone: register it "
                "on each worker's parameters after Workers(...)"
            )
        for attribute, value in copy.deepcopy(vars(parameter)).items():
            setattr(copied, attribute, value)
        for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
            copied.register_hook(hook)
    return twin


def _all_results(module: nn.Module) -> Iterator[Tensor]:
    for submodule in module.modules():
        yield from _results(vars(submodule))


def _results(value: Any) -> Iterator[Tensor]:
    """The tensors in attributes, and in their lists and dicts, that have a graph."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _results(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _results(each)
