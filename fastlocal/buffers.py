"""Module buffers, such as BatchNorm statistics: what a sync does to them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Buffers = Literal["average", "keep", "broadcast"]
"""Average them, leave them to each worker, or give everybody the first worker's."""


_REDUCED = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}


def obstacle(buffer: Tensor) -> str | None:
    """Why a buffer can be neither averaged nor overwritten; None if it can."""
    if buffer.layout is not torch.strided:
        return f"has the layout {buffer.layout}"
    if buffer.dtype not in _REDUCED:
        return f"has the dtype {buffer.dtype}"
    if any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)):
        return "is expanded: several of its elements share one place in memory"
    return None


def stored_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is stored of a tensor, as tensors over the same memory that can be written over, with names."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from stored_parts(f"{name}.{part}", getattr(tensor, part))
    elif tensor.layout is torch.strided and not tensor.is_meta:
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        yield name, tensor[tuple(0 if stride == 0 and size else slice(None) for size, stride in dims)]


def are_equal(twins: Sequence[Tensor]) -> bool:
    """Whether a tensor holds the same in every worker."""
    return all(torch.equal(twins[0], other) for other in twins[1:])


def spoilt(tensors: Iterable[Sequence[Tensor]], included: Sequence[bool]) -> list[bool]:
    """Of each tensor, given in every worker: whether one that does not count has it, with something not finite."""
    return [
        any(not counts and not bool(own.isfinite().all()) for own, counts in zip(twins, included, strict=True))
        for twins in tensors
    ]


def is_unit_vector(model: nn.Module, name: str) -> bool:
    """Whether spectral_norm keeps a singular vector in this buffer: a mean of several has another length."""
    path, _, own = name.rpartition(".")
    if not own.endswith(("_u", "_v")):
        return False
    module = model.get_submodule(path)
    if isinstance(module, parametrizations._SpectralNorm):
        return own in ("_u", "_v")
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return own[:-2] in {hook.name for hook in hooks}


def collect(modules: Sequence[nn.Module], choice: Buffers) -> dict[str, list[Tensor]]:
    """Each buffer in every module, by name; with "keep" those that all have in one shape and could overwrite.

    Raises:
        RuntimeError: without "keep" a module lacks one, has it in another shape, or it cannot be averaged or given
            to others.
    """
    workers = [dict(module.named_buffers()) for module in modules]
    buffers: dict[str, list[Tensor]] = {}
    for name, first in workers[0].items():
        if choice == "average" and is_unit_vector(modules[0], name):
            raise RuntimeError(
                f"buffer {name!r} is a unit vector of spectral_norm, and a mean of unit vectors is none: pass "
                "buffers='broadcast', which gives every worker the first one's"
            )
        unlike = [w for w, own in enumerate(workers) if name not in own or own[name].shape != first.shape]
        reason = f"of worker {unlike[0]} is missing or shaped unlike worker 0's" if unlike else obstacle(first)
        if first.is_meta and reason is None:
            continue  # it holds nothing
        if reason is None:
            buffers[name] = [own[name] for own in workers]
        elif choice != "keep":
            raise RuntimeError(f"buffer {name!r} {reason}: pass buffers='keep', which leaves it to each worker")
    return buffers


@torch.no_grad()
def merge_(buffers: Iterable[Sequence[Tensor]], choice: Buffers, included: Sequence[bool]) -> int:
    """Apply the choice; an excluded worker's buffers are replaced whatever it is.

    Args:
        buffers: each buffer in every worker.
        choice: what becomes of them.
        included: which workers count.

    Returns:
        The bytes of one worker's buffers that were sent.
    """
    if choice == "keep" and all(included):
        return 0
    payload = 0
    for twins in buffers:
        value = merged([buffer for buffer, counts in zip(twins, included, strict=True) if counts], choice)
        for buffer, counts in zip(twins, included, strict=True):
            if choice != "keep" or not counts:
                buffer.copy_(value)
        payload += twins[0].nbytes
    return payload


def merged(values: Sequence[Tensor], choice: Buffers) -> Tensor:
    """What one buffer becomes.

    Args:
        values: the buffer in each worker that counts.
        choice: "average" is the mean of those that are finite, of integers the maximum; otherwise the first finite.
    """
    stacked = torch.stack(list(values))
    if not (stacked.is_floating_point() or stacked.is_complex()):
        # torch has no maximum of uint16 and uint32.
        return stacked.to(torch.int64).amax(dim=0).to(stacked.dtype) if choice == "average" else stacked[0]
    finite = torch.stack([value.isfinite().all() for value in values])
    if choice != "average":
        return stacked[finite.to(torch.uint8).argmax()]
    # One worker's infinite batch must not stay in everybody's statistics. What is finite in none, such as a mask of
    # -inf, stays as worker 0 has it.
    kept = torch.where(finite.view(-1, *[1] * (stacked.dim() - 1)), stacked, 0)
    mean = kept.sum(dim=0, dtype=torch.promote_types(stacked.dtype, torch.float32)) / finite.sum()
    return torch.where(finite.any(), mean.to(stacked.dtype), stacked[0])
