"""Copies of a module: what `copy.deepcopy` refuses or leaves out."""

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastlocal import comm

_REFUSALS = (TypeError, AssertionError)
"""What deepcopy raises of what is not to be copied; FSDP2 asserts it."""

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def require_initialised(module: nn.Module) -> None:
    """Raise ValueError for a lazy module that has not seen its first input: it cannot be copied."""
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(f"{kind} {name!r} is uninitialised: run one forward pass of the lazy module first")


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy; what a forward pass left in the module, such as an attention map, is copied without its graph.

    Raises:
        ValueError: an attribute is a function around a part of the module, which its copy would use too.
    """
    return _copy_and_memo(module, _FORWARD_HOOKS)[0]


def twin_of(module: nn.Module) -> nn.Module:
    """A copy that trains as the module does: with the attributes and gradient hooks of its parameters too.

    A hook that is a method of the module becomes one of the copy; attributes that cannot be copied are shared.

    Raises:
        ValueError: a parameter has a hook that runs after its gradient was accumulated: that is about this one alone;
            the module is scripted; or see copy_of.
    """
    twin, memo = _copy_and_memo(module, _FORWARD_HOOKS + _BACKWARD_HOOKS)
    if not all(parameter.is_leaf for parameter in twin.parameters()):
        raise ValueError("a scripted or traced module cannot be copied with its parameters: pass the original module")
    for (name, parameter), copied in zip(module.named_parameters(), twin.parameters(), strict=True):
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name!r} has a post-accumulate-grad hook, which would act on worker 0 alone: register it "
                "on each worker's parameters after Workers(...)"
            )
        if copied is parameter:  # its module says that it is its own copy
            continue
        if hasattr(parameter, "grad_dtype") and parameter.grad_dtype != copied.grad_dtype:
            copied.grad_dtype = parameter.grad_dtype
        for attribute, value in vars(parameter).items():
            setattr(copied, attribute, _copied(value, memo))
        trains = copied.requires_grad
        for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
            if isinstance(hook, MethodType) and id(hook.__self__) in memo:
                hook = MethodType(hook.__func__, memo[id(hook.__self__)])
            elif _reaches_original(hook, memo, {id(owner) for owner in _around(module, name)}):
                raise ValueError(
                    f"a gradient hook of parameter {name!r} is a function around a part of the model, which its "
                    "copies would share, and compute with: register it on each worker's after Workers(...)"
                )
            copied.requires_grad_(True).register_hook(hook)  # frozen since then, perhaps for a while
        copied.requires_grad_(trains)
    return twin


def _copy_and_memo(module: nn.Module, hooks: Sequence[str]) -> tuple[nn.Module, dict[int, Any]]:
    """A deep copy as copy_of makes it, and by id what has been copied; these hooks may not tie it to the module."""
    memo = _memo(module)
    try:
        copied = copy.deepcopy(module, memo)
    except _REFUSALS as error:
        raise TypeError(f"{_name_uncopied(module)} cannot be copied, as each worker's model is: {error}") from error
    except RuntimeError as error:
        sparse = [name for name, parameter in module.named_parameters() if parameter.layout is not torch.strided]
        if not sparse:  # out of memory, say
            raise
        raise TypeError(f"the sparse parameter {sparse[0]!r} cannot be copied, as each worker's model is") from error
    _turn_references(module, copied, memo)
    _require_own_functions(module, copied, memo, hooks)
    return copied, memo


def _turn_references(module: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Make attributes that refer weakly to a part of the original, such as a parent, refer to that of the copy."""

    def turned(value: Any) -> Any:
        return ref(memo[id(value())]) if type(value) is ref and id(value()) in memo else value

    for submodule in set(copied.modules()).difference(module.modules()):  # a module may be its own copy
        for attribute, value in vars(submodule).items():
            if type(value) is list and ref in map(type, value):  # of a recurrent layer's weights
                value[:] = map(turned, value)
            vars(submodule)[attribute] = turned(value)


def _name_uncopied(module: nn.Module) -> str:
    """The attribute that deepcopy refuses."""
    memo = _memo(module)
    for name, submodule in module.named_modules():
        for attribute, value in vars(submodule).items():
            if attribute == "_modules":  # they come by themselves
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except _REFUSALS:
                return f"the model's attribute {f'{name}.{attribute}' if name else attribute!r}"
    return f"the model, {type(module).__name__},"


def _require_own_functions(module: nn.Module, copied: nn.Module, memo: dict[int, Any], hooks: Sequence[str]) -> None:
    """Raise ValueError for a function in the copy that closes over a part of the original: copies share functions."""
    modules = dict(module.named_modules())
    # A module may choose what of it is copied.
    for (name, submodule), twin in zip(modules.items(), copied.modules(), strict=False):
        seen: set[int] = set()
        for attribute, value in vars(twin).items():
            if attribute in hooks:
                # What closes over the module it hooks, or one around that, watches rather than computes.
                watched = {id(submodule), *map(id, _around(module, name))}
                if _reaches_original(value, memo, watched):
                    raise ValueError(
                        f"a hook of {name or 'the model'!r} is a function around another part of the model, "
                        "which the copies of the model would share, and compute with: make it a method"
                    )
            elif not attribute.endswith("_hooks") and _reaches_original(value, memo, seen):
                where = f"{name}.{attribute}" if name else attribute
                raise ValueError(
                    f"{where!r} is a function around a part of the model itself, or holds a weak reference to one, "
                    "which the copies of the model would share, and compute with: make it a method"
                )


def _around(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules in which a submodule or parameter of this name lies."""
    return [module, *(module.get_submodule(name[:end]) for end, letter in enumerate(name) if letter == ".")]


def _reaches_original(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    """Whether functions lead from a value in the copy to what was copied and trains: a module or a parameter.

    seen: by id, what has been looked at, and what may be reached. All of it must stay alive: ids are used again.
    """
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return memo.get(id(value), value) is not value and next(value.parameters(), None) is not None
    if isinstance(value, Tensor):
        return memo.get(id(value), value) is not value and value.is_leaf and value.requires_grad
    return any(_reaches_original(each, memo, seen) for each in _held(value))


def _held(value: Any) -> Iterable[Any]:
    """What a function, or a collection of some, computes with."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, deque)):
        return value
    if isinstance(value, ref):
        return (value(),)
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, FunctionType):
        defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
        closed = chain.from_iterable(map(_content, value.__closure__ or ()))
        return *closed, *defaults, *vars(value).values()
    if callable(value) and not isinstance(value, type):
        return vars(value).values() if hasattr(value, "__dict__") else ()
    return ()


def _content(cell: CellType) -> Iterator[Any]:
    """What a closure's cell holds, if anything yet."""
    with contextlib.suppress(ValueError):
        yield cell.cell_contents


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except TypeError:  # a process group, a lock
        return value


def _memo(module: nn.Module) -> dict[int, Any]:
    """What a deep copy finds copied already: results, without their graph; process groups, which are shared."""
    attributes = [vars(submodule) for submodule in module.modules()]
    attributes += [vars(parameter) for parameter in module.parameters()]
    groups = [value for own in attributes for value in own.values() if comm.is_process_group(value)]
    results = {id(tensor): tensor.detach().clone() for tensor in _results(attributes, set())}
    return results | {id(group): group for group in groups}


def _results(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in attributes, and in the collections and dataclasses among them, that have a graph."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif id(value) not in seen:
        seen.add(id(value))
        if is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name, None) for field in fields(value)}
        if isinstance(value, (dict, list, tuple, set, deque)):
            for each in value.values() if isinstance(value, dict) else value:
                yield from _results(each, seen)
