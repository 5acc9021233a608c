"""The door to LARS and LAMB: check the arguments, choose an implementation, call it.

Every step works in place on lists of tensors, returns None, and leaves the gradients alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlocal.ops import trust_ratio_portable as portable
from fastlocal.ops import trust_ratio_sharded as sharded
from fastlocal.ops.implementation import Implementation, choose
from fastlocal.ops.trust_ratio_checks import check, resolved
from fastlocal.ops.trust_ratio_sharded import Sum
from fastlocal.reference import trust_ratio as reference
from fastlocal.reference.trust_ratio import Adapt as Adapt
from fastlocal.reference.trust_ratio import LambOptions as LambOptions
from fastlocal.reference.trust_ratio import LarsOptions as LarsOptions


@dataclass(frozen=True)
class _Part:
    """Tensors that one implementation steps with one call."""

    chosen: Implementation
    device: torch.device
    mastered: bool


def _split(
    impl: Implementation,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    masters: Sequence[Tensor | None] | None,
    tables: dict | None,
) -> list[tuple[_Part, Sequence[int]]]:
    mastered = [False] * len(tensors) if masters is None else [m is not None for m in masters]
    looked_at: list[Sequence[Tensor | None]] = [tensors, grads]
    if impl == "auto":  # kernels that were asked for refuse other state by name
        looked_at.append(moments)
    dtypes = [tuple(t.dtype for t in own if t is not None) for own in zip(*looked_at, strict=True)]
    kinds = [(t.device, own, type(t), has) for t, own, has in zip(tensors, dtypes, mastered, strict=True)]
    choices = {kind: _Part(_choose(impl, *kind[:3]), kind[0], kind[3]) for kind in dict.fromkeys(kinds)}
    parts = list(dict.fromkeys(choices.values()))
    if tables is not None:
        tables["kernels alone"] = impl if [part.chosen for part in parts] == ["triton"] else None
    return [(part, [i for i, kind in enumerate(kinds) if choices[kind] == part]) for part in parts]


def _choose(impl: Implementation, device: torch.device, dtypes: Sequence[torch.dtype], kind: type) -> Implementation:
    """The implementation for tensors of a class too: those that are several in one, or fake, have no memory.

    dtypes: of the tensor, its gradient and its first moment.
    """
    plain = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    if kind not in (Tensor, nn.Parameter) and kind.__torch_dispatch__ != plain:
        if impl not in ("auto", "reference"):
            raise TypeError(
                f"impl={impl!r} (foreach or fused) steps plain tensors, got a {kind.__name__}: leave foreach and "
                "fused unset, or set foreach=False"
            )
        impl = "reference"
    chosen: set[Implementation] = {choose(impl, device, dtype) for dtype in dtypes}
    return chosen.pop() if len(chosen) == 1 else "portable"


def require_implementation(impl: Implementation, params: Sequence[Tensor]) -> None:
    """Raises RuntimeError or TypeError if an implementation cannot step one of these tensors."""
    for device, dtype, kind in dict.fromkeys((p.device, p.dtype, type(p)) for p in params):
        _choose(impl, device, [dtype], kind)


def _room(tables: dict | None, parts: Sequence[tuple[_Part, Sequence[int]]], these: _Part) -> dict:
    """Where a part's tables are kept: by itself if there are others, which may lie on other devices."""
    if tables is None or torch.compiler.is_compiling():  # which could not make the key, and keeps no tables
        return {}
    return tables if len(parts) == 1 else tables.setdefault(these, {"memory": tables.setdefault("memory", {})})


def _take(values: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    return values if len(indices) == len(values) else [values[i] for i in indices]


def _scalars(device: torch.device, *values: Tensor | None) -> dict[str, Tensor]:
    """Those of norm, grad_scale and found_inf that there are, on a device."""
    names = ("norm", "grad_scale", "found_inf")
    return {n: value.to(device).reshape(()) for n, value in zip(names, values, strict=True) if value is not None}


def _may_repeat(impl: Implementation, tables: dict | None) -> bool:
    """Whether the kernels stepped everything last time, so that they may find every check done."""
    return tables is not None and tables.get("kernels alone") == impl and not torch.compiler.is_compiling()


def _step_(
    kind: Literal["lamb_", "lars_"],
    lists: Mapping[str, Sequence[Any]],
    masters: Sequence[Tensor | None] | None,
    options: LambOptions | LarsOptions,
    norm: Tensor | None,
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    impl: Implementation,
    tables: dict | None,
    sum_: Sum | None,
) -> None:
    params: Any = lists["params"]
    grads: Any = resolved(lists["grads"])
    lists = {**lists, "grads": grads}
    must_find_norm = norm is None and max_grad_norm is not None
    if sum_ is not None:
        if impl == "triton":
            raise RuntimeError(
                "impl='triton' (fused=True) has no kernels for DTensors: leave impl, foreach and fused unset"
            )
        check(lists if masters is None else {**lists, "masters": masters})
        if must_find_norm:
            norm = grad_norm(grads, sum_=sum_)
        if not sharded.found_anywhere(found_inf, len(params), sum_):
            multiplier = reference.grad_multiplier(norm, max_grad_norm, grad_scale)
            _step_with_torch_(kind, impl, list(lists.values()), masters, options, multiplier, {}, sum_)
        return
    if params and _may_repeat(impl, tables) and (masters is None or not any(map(is_, masters, repeat(None)))):
        from fastlocal.kernels import trust_ratio as kernels

        scalars = _scalars(params[0].device, norm, grad_scale, found_inf)
        if getattr(kernels, kind)(*lists.values(), options, tables, masters, again=True, **scalars):
            torch.autograd.graph.increment_version(params)
            return
    check(lists if masters is None else {**lists, "masters": masters})
    _, _, first_moments, *_ = lists.values()
    parts = _split(impl, params, grads, first_moments, masters, tables)
    kernels_find_it = [these.chosen for these, _ in parts] == ["triton"]
    if must_find_norm and parts and not kernels_find_it:
        norm = grad_norm(grads, impl=impl, tables=None if tables is None else tables.setdefault("norm", {}))
    for these, indices in parts:
        room = _room(tables, parts, these)
        part: list[Any] = [_take(values, indices) for values in lists.values()]
        own: Any = _take(masters, indices) if masters is not None and these.mastered else None
        scalars = _scalars(these.device, norm, grad_scale, found_inf)
        if these.chosen == "triton":
            from fastlocal.kernels import trust_ratio as kernels

            getattr(kernels, kind)(*part, options, room, own, **scalars)
        elif not scalars.get("found_inf", 0):
            multiplier = reference.grad_multiplier(scalars.get("norm"), max_grad_norm, scalars.get("grad_scale"))
            _step_with_torch_(kind, these.chosen, part, own, options, multiplier, room, None)
        if not torch.compiler.is_compiling():
            # Neither Triton nor torch's fused CPU kernels tell autograd what they wrote.
            torch.autograd.graph.increment_version(part[0])


def _step_with_torch_(
    kind: Literal["lamb_", "lars_"],
    chosen: Implementation,
    lists: list[Any],
    masters: Sequence[Tensor | None] | None,
    options: LambOptions | LarsOptions,
    multiplier: float | Tensor,
    scratch: dict,
    sum_: Sum | None,
) -> None:
    params, *others = lists
    mastered = [] if masters is None else [(m, p) for m, p in zip(masters, params, strict=True) if m is not None]
    for master, param in mastered:
        reference.adopt_(master, param)
    weights = params
    if masters is not None:
        weights = [p if m is None else m for m, p in zip(masters, params, strict=True)]
    counters = [s for s in others[-1] if s is not None]
    if counters:
        torch._foreach_add_(counters, 1.0)  # pyright: ignore[reportPrivateImportUsage]
    if sum_ is not None:
        getattr(sharded, kind)(weights, *others, options, multiplier, sum_)
    elif chosen == "portable":
        getattr(portable, kind)(weights, *others, options, multiplier, scratch)
    else:
        step = getattr(reference, kind)
        for tensors in zip(weights, *others, strict=True):
            step(*tensors, options, multiplier)
    for master, param in mastered:
        param.copy_(master)


@torch.no_grad()
def grad_norm(
    grads: Sequence[Tensor],
    *,
    impl: Implementation = "auto",
    tables: dict | None = None,
    sum_: Sum | None = None,
) -> Tensor:
    """‖G‖ of all gradients together: a 0-dimensional tensor, not read back from its device.

    Args:
        grads: of any shapes, on any devices, at least one.
        impl: "auto" chooses Triton on CUDA and the portable path elsewhere.
        tables: where the Triton implementation keeps its device tables between calls; None builds them anew.
        sum_: where the gradients are pieces of larger ones, adds up over the processes that hold the others.

    Raises:
        ValueError: there is no gradient.
        TypeError: one is not real floating-point.
        RuntimeError: one is sparse, or the implementation asked for cannot run there.
    """
    if not grads:
        raise ValueError("grads must hold at least one tensor, got none")
    grads = resolved(grads)
    if sum_ is not None:
        return sharded.grad_norm(grads, sum_)
    if _may_repeat(impl, tables):
        from fastlocal.kernels import trust_ratio as kernels

        norm = kernels.grad_norm(grads, {} if tables is None else tables, again=True)
        if norm is not None:
            return norm
    check({"grads": grads})
    norms, parts = [], _split(impl, grads, grads, grads, None, tables)
    for these, indices in parts:
        part = _take(grads, indices)
        if these.chosen == "triton":
            from fastlocal.kernels import trust_ratio as kernels

            norms.append(kernels.grad_norm(part, _room(tables, parts, these)))
        else:
            norms.append(portable.grad_norm(part) if these.chosen == "portable" else reference.grad_norm(part))
    return norms[0] if len(norms) == 1 else reference.grad_norm(norms)


@torch.no_grad()
def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: LambOptions,
    *,
    masters: Sequence[Tensor | None] | None = None,
    norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Implementation = "auto",
    tables: dict | None = None,
    sum_: Sum | None = None,
) -> None:
    """One LAMB step of every tensor, and one more in each of `steps`.

    Args:
        params: the weights. Stepped.
        grads: shaped like params.
        exp_avgs: first moments, shaped like params, at least float32. Stepped.
        exp_avg_sqs: second moments, likewise. Stepped.
        steps: 0-dimensional float32, steps taken so far, on the parameter's device. Counted up.
        options: the group's hyper-parameters.
        masters: the weights in at least float32, of which params are roundings, or None for a parameter that is
            its own; stepped. An element of a parameter written to since the last step counts, not its master's.
        norm: ‖G‖ from `grad_norm` as stored, still scaled, which max_grad_norm bounds; None for that of `grads`.
        grad_scale: what the loss was multiplied by (GradScaler); None if nothing.
        found_inf: where it is not 0, nothing changes.
        impl: "auto" chooses Triton on CUDA and the portable path elsewhere.
        tables: what an implementation keeps from step to step, device tables or scratch; None for nothing.
        sum_: where the tensors are pieces of larger ones, adds up over the processes that hold the others.

    Raises:
        ValueError: a list has another length than params, or a tensor another shape than its parameter.
        TypeError: a parameter is not real floating-point, or its state is not as precise.
        RuntimeError: a gradient is sparse, or the implementation asked for cannot run there.

    References:
        You et al., Large Batch Optimization for Deep Learning, arXiv:1904.00962, algorithm 2.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _step_("lamb_", lists, masters, options, norm, options.max_grad_norm, grad_scale, found_inf, impl, tables, sum_)


@torch.no_grad()
def lars_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    options: LarsOptions,
    *,
    masters: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Implementation = "auto",
    tables: dict | None = None,
    sum_: Sum | None = None,
) -> None:
    """One LARS step of every tensor.

    Args:
        params: the weights. Stepped.
        grads: shaped like params.
        momentum_buffers: shaped like params, at least float32, zeros at first; all None where momentum is 0.
        steps: 0-dimensional float32, steps taken so far; all None where dampening is 0.
        options: the group's hyper-parameters.
        masters: the weights in at least float32, of which params are roundings, or None for a parameter that is
            its own; stepped. An element of a parameter written to since the last step counts, not its master's.
        grad_scale: what the loss was multiplied by (GradScaler); None if nothing.
        found_inf: where it is not 0, nothing changes.
        impl: "auto" chooses Triton on CUDA and the portable path elsewhere.
        tables: what an implementation keeps from step to step, device tables or scratch; None for nothing.
        sum_: where the tensors are pieces of larger ones, adds up over the processes that hold the others.

    Raises:
        ValueError: a list has another length than params, or a tensor another shape than its parameter.
        TypeError: a parameter is not real floating-point, or its state is not as precise.
        RuntimeError: a gradient is sparse, or the implementation asked for cannot run there.

    References:
        You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv:1708.03888, algorithm 1.
    """
    for name, needed, values in (
        ("momentum_buffers", options.momentum != 0, momentum_buffers),
        ("steps", options.momentum != 0 and options.dampening != 0, steps),
    ):
        if sum(map(is_, values, repeat(None))) != (0 if needed else len(values)):
            rule = "hold a tensor a parameter" if needed else "hold None for every parameter"
            raise ValueError(f"{name} must {rule} with momentum {options.momentum}, dampening {options.dampening}")
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "steps": steps}
    _step_("lars_", lists, masters, options, None, None, grad_scale, found_inf, impl, tables, sum_)
