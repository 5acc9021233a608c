"""Whether parameters have memory of their own: in rows of a flat buffer they would."""

import torch
from torch import Tensor, nn

from fastlocal import comm


def require_own_memory(parameters: dict[str, nn.Parameter]) -> None:
    """Raise ValueError where two parameters have elements in common, which rows of their own would part."""
    storages: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.numel() and not parameter.is_meta and not comm.is_sharded(parameter):
            storages.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    for names in storages.values():
        if len(names) > 1 and (pair := _sharing({name: parameters[name] for name in names})) is not None:
            raise ValueError(
                f"the parameters {pair[0]!r} and {pair[1]!r} share memory, and would not in rows of their own: tie "
                "them by making them one nn.Parameter"
            )


def _sharing(parameters: dict[str, nn.Parameter]) -> tuple[str, str] | None:
    """Two parameters in one storage that have an element in common, if there are such."""
    begin = {name: int(p.storage_offset()) * p.element_size() for name, p in parameters.items()}
    in_order = sorted(parameters, key=begin.__getitem__)
    ends = [begin[name] + extent(parameters[name]) for name in in_order]
    if all(end <= begin[after] for end, after in zip(ends, in_order[1:], strict=False)):
        return None  # one behind the other, as in a flat buffer
    # Columns of one matrix, say: mark who has which element.
    unit = min(p.element_size() for p in parameters.values())
    first = next(iter(parameters.values()))
    owner = torch.zeros(first.untyped_storage().nbytes() // unit, dtype=torch.int32, device="cpu")
    for number, name in enumerate(in_order, start=1):
        parameter = parameters[name]
        scale = parameter.element_size() // unit
        strides = [stride * scale for stride in parameter.stride()]
        for part in range(scale):
            own = owner.as_strided(parameter.shape, strides, begin[name] // unit + part)
            if taken := int(own.max()):
                return in_order[taken - 1], name
            own.fill_(number)
    return None


def extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
