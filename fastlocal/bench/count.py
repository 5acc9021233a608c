"""Count what PyTorch operations read and write, and how many kernels they start.

An operation reads each of its tensors once and writes each result once, as if nothing stayed in a cache: for
tensors larger than the caches that is the memory traffic, and for a blocked computation an upper bound on it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_START_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "set_", "resize_", "_local_scalar_dense"}
_DO_NOT_READ_THEIR_TARGET = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}


@dataclass
class Traffic:
    """What was counted; `calls` holds (operation, bytes) in order."""

    bytes_read: int = 0
    bytes_written: int = 0
    launches: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        """Read and written together."""
        return self.bytes_read + self.bytes_written


def count(function: Callable[[], object]) -> Traffic:
    """Run `function` once and count its PyTorch operations. Views are free, an in-place target is read and written.

    A `_foreach_` operation counts as one launch. Triton kernels are not PyTorch operations and are not seen.
    """
    counter = _Counter()
    with counter:
        function()
    return counter.traffic


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if is_view or name in _START_NOTHING:
            return result
        read: dict[tuple[int, int, int], int] = {}
        written: dict[tuple[int, int, int], int] = {}
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if argument.name == "grads" and kwargs.get("grad_scale") is None:
                is_written = False  # torch's fused optimizers write gradients only to unscale them
            for tensor in _tensors(value):
                if is_written:
                    written[_key(tensor)] = _num_bytes(tensor)
                if not is_written or (not argument.kwarg_only and name not in _DO_NOT_READ_THEIR_TARGET):
                    read[_key(tensor)] = _num_bytes(tensor)
        if not written:
            written = {_key(tensor): _num_bytes(tensor) for tensor in _tensors(result)}
        moved = sum(read.values()) + sum(written.values())
        if moved:
            self.traffic.bytes_read += sum(read.values())
            self.traffic.bytes_written += sum(written.values())
            self.traffic.launches += 1
            self.traffic.calls.append((name, moved))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _key(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), tensor.element_size()


def _num_bytes(tensor: Tensor) -> int:
    """Of the elements that lie in memory: those of an expanded dimension are one."""
    stored = torch.Size(s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return stored.numel() * tensor.element_size() if tensor.numel() else 0
