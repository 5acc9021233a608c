"""Whether parameters have memory of their own: in rows of a flat buffer they would."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastlocal import comm


def require_own_memory(parameters: Mapping[str, Tensor], module: nn.Module | None) -> None:
    """Raise ValueError where one of these parameters has elements in common with another, or with a buffer or a
    frozen parameter of the module, which rows of their own would part, or has no memory that could lie in a row.
    """
    own = {f"parameter {name!r}": parameter for name, parameter in parameters.items()}
    for name, parameter in own.items():
        if not comm.is_sharded(parameter) and is_traceable_wrapper_subclass(parameter):
            raise ValueError(
                f"{name} is a {type(parameter).__name__}, several tensors in one: a flat buffer holds plain ones"
            )
    others: dict[str, Tensor] = {}
    if module is not None:
        others |= {f"parameter {name!r}": parameter for name, parameter in module.named_parameters()}
        others |= {f"buffer {name!r}": buffer for name, buffer in module.named_buffers()}
    known = {id(parameter) for parameter in parameters.values()}
    storages: dict[int, list[str]] = {}
    tensors = own | {name: tensor for name, tensor in others.items() if id(tensor) not in known}
    for name, tensor in tensors.items():
        if _has_memory(tensor):
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    for names in storages.values():
        if len(names) < 2 or own.keys().isdisjoint(names):
            continue
        if (pair := _sharing({name: tensors[name] for name in names}, own.keys())) is not None:
            raise ValueError(
                f"{pair[0]} and {pair[1]} share memory, and would not in rows of their own: tie them by making them "
                "one nn.Parameter, or set such a buffer afterwards"
            )


def _has_memory(tensor: Tensor) -> bool:
    if comm.is_sharded(tensor) or is_traceable_wrapper_subclass(tensor):
        return False
    return bool(tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta)


def _sharing(tensors: dict[str, Tensor], own: Collection[str]) -> tuple[str, str] | None:
    """Two tensors in one storage, the first one of `own`, that have an element in common, if there are such."""
    begin = {name: int(t.storage_offset()) * t.element_size() for name, t in tensors.items()}
    in_order = sorted(tensors, key=begin.__getitem__)
    ends = [begin[name] + extent(tensors[name]) for name in in_order]
    if all(end <= begin[after] for end, after in zip(ends, in_order[1:], strict=False)):
        return None  # one behind the other, as in a flat buffer
    # Columns of one matrix, say: mark who has which element.
    unit = min(t.element_size() for t in tensors.values())
    first = next(iter(tensors.values()))
    owner = torch.zeros(first.untyped_storage().nbytes() // unit, dtype=torch.int32, device="cpu")
    in_order.sort(key=lambda name: name not in own)
    for number, name in enumerate(in_order, start=1):
        tensor = tensors[name]
        scale = tensor.element_size() // unit
        strides = [stride * scale for stride in tensor.stride()]
        for part in range(scale):
            elements = owner.as_strided(tensor.shape, strides, begin[name] // unit + part)
            if taken := int(elements.max()):
                return in_order[taken - 1], name
            if name in own:
                elements.fill_(number)
    return None


def extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
