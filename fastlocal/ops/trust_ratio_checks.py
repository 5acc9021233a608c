"""What is checked before a step of LARS or LAMB: the lists fit together, and kernels can read them."""

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor


def _require_shapes(name: str, values: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> None:
    """Raises ValueError unless all that are there have their parameter's shape: torch's fused kernels do not look."""
    there: Sequence[Any] = values
    if any(map(is_, values, repeat(None))):
        pairs = [(v, s) for v, s in zip(values, shapes, strict=True) if v is not None]
        there, shapes = [v for v, _ in pairs], [s for _, s in pairs]
    if (found := [v.shape for v in there]) != list(shapes):
        own, shape = next((f, s) for f, s in zip(found, shapes, strict=True) if f != s)
        raise ValueError(f"{name} must have their parameter's shape {tuple(shape)}, got {tuple(own)}")


def _require_as_precise(params: Sequence[Tensor], state: Mapping[str, Sequence[Tensor | None]]) -> None:
    """Raises TypeError where the state of a float64 parameter is not float64: it would be stepped in float32."""
    for name, values in state.items():
        for param, value in zip(params, values, strict=True):
            if param.dtype == torch.float64 and value is not None and value.dtype != torch.float64:
                raise TypeError(
                    f"{name} must be float64, as their parameters are, got {value.dtype}: were they cast since the "
                    "last step? optimizer.load_state_dict(optimizer.state_dict()) casts the state too"
                )


def check(lists: Mapping[str, Sequence[Any]]) -> None:
    """Raise unless the lists of one step fit together, by name: "params", if there are any, first.

    Raises:
        ValueError: one has another length, or a tensor another shape than its parameter.
        TypeError: a parameter is not real floating-point, or its state is less precise than itself or float32.
        RuntimeError: a gradient is sparse.
    """
    first = next(iter(lists.values()))
    num_tensors, shapes = len(first), [t.shape for t in first]
    for name, values in lists.items():
        if len(values) != num_tensors:
            raise ValueError(f"{name} must hold one entry a parameter, {num_tensors}, got {len(values)}")
    for name, values in lists.items():
        if name != "steps":
            _require_shapes(name, values, shapes)
    dtypes = {tensor.dtype for tensor in first}
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise TypeError(f"LARS and LAMB step real floating-point parameters, got {dtype}")
    if torch.float64 in dtypes:
        _require_as_precise(first, {n: v for n, v in lists.items() if n not in ("params", "grads", "steps")})
    for name in lists.keys() - {"params", "grads", "steps"}:
        for dtype in {value.dtype for value in lists[name] if value is not None}:
            if torch.promote_types(dtype, torch.float32) != dtype:
                raise TypeError(f"{name} must be at least float32, got {dtype}")
    require_strided(lists["grads"])


def require_strided(grads: Sequence[Tensor]) -> None:
    """Raises RuntimeError for a sparse gradient."""
    for grad in grads:
        if grad.layout is not torch.strided:
            raise RuntimeError(f"LARS and LAMB do not support sparse gradients, got one of layout {grad.layout}")


def resolved(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients with every minus sign that is pending written out: kernels read memory alone.

    Autograd leaves one at what real parameters get from conjugates and imaginary parts.
    """
    if torch.compiler.is_compiling() or not any(map(torch.Tensor.is_neg, grads)):
        return grads
    return [grad.resolve_neg() for grad in grads]
