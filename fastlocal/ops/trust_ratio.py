"""The door to LARS and LAMB: check the arguments, choose an implementation, call it.

Every step works in place on lists of tensors, returns None, and leaves the gradients alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor

from fastlocal.ops import trust_ratio_portable as portable
from fastlocal.ops.implementation import Implementation, choose
from fastlocal.reference import trust_ratio as reference
from fastlocal.reference.trust_ratio import Adapt as Adapt
from fastlocal.reference.trust_ratio import LambOptions as LambOptions
from fastlocal.reference.trust_ratio import LarsOptions as LarsOptions


def _split(
    impl: Implementation, params: Sequence[Tensor]
) -> Iterator[tuple[Implementation, torch.device, Sequence[int]]]:
    """Which implementation steps which of the tensors, one device at a time."""
    kinds = [(p.device, p.dtype) for p in params]
    choices: dict[Any, tuple[Implementation, torch.device]] = {
        kind: (choose(impl, *kind), kind[0]) for kind in dict.fromkeys(kinds)
    }
    for chosen, device in dict.fromkeys(choices.values()):
        yield chosen, device, [i for i, kind in enumerate(kinds) if choices[kind] == (chosen, device)]


def _check(lists: Mapping[str, Sequence[Any]]) -> None:
    num_tensors = len(next(iter(lists.values())))
    for name, values in lists.items():
        if len(values) != num_tensors:
            raise ValueError(f"{name} must hold one entry a parameter, {num_tensors}, got {len(values)}")
    for grad in lists["grads"]:
        if grad.layout is not torch.strided:
            raise RuntimeError(f"LARS and LAMB do not support sparse gradients, got one of layout {grad.layout}")


def _take(values: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    return values if len(indices) == len(values) else [values[i] for i in indices]


def _to(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


def _may_repeat(impl: Implementation, tables: dict | None) -> bool:
    """Whether the kernels stepped everything last time, so that they may find every check done."""
    return tables is not None and tables.get("kernels alone") == impl and not torch.compiler.is_compiling()


def _parts(
    impl: Implementation, tensors: Sequence[Tensor], tables: dict | None
) -> list[tuple[Implementation, torch.device, Sequence[int]]]:
    parts = list(_split(impl, tensors))
    if tables is not None:
        tables["kernels alone"] = impl if [chosen for chosen, _, _ in parts] == ["triton"] else None
    return parts


def _step_(
    kind: Literal["lamb_", "lars_"],
    lists: Mapping[str, Sequence[Tensor | None]],
    options: LambOptions | LarsOptions,
    norm: Tensor | None,
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    impl: Implementation,
    tables: dict | None,
) -> None:
    params: Any = lists["params"]
    if params and _may_repeat(impl, tables):
        from fastlocal.kernels import trust_ratio as kernels

        scalars = [_to(scalar, params[0].device) for scalar in (norm, grad_scale, found_inf)]
        if getattr(kernels, kind)(*lists.values(), options, *scalars, tables, again=True):
            torch.autograd.graph.increment_version(params)
            return
    _check(lists)
    for chosen, device, indices in _parts(impl, params, tables):
        part = [_take(values, indices) for values in lists.values()]
        norm, grad_scale, found_inf = _to(norm, device), _to(grad_scale, device), _to(found_inf, device)
        if chosen == "triton":
            from fastlocal.kernels import trust_ratio as kernels

            getattr(kernels, kind)(*part, options, norm, grad_scale, found_inf, {} if tables is None else tables)
        else:
            if found_inf is not None and found_inf.item():
                continue
            counters = [s for s in part[-1] if s is not None]
            if counters:
                torch._foreach_add_(counters, 1.0)  # pyright: ignore[reportPrivateImportUsage]
            multiplier = reference.grad_multiplier(norm, max_grad_norm, grad_scale)
            if chosen == "portable":
                getattr(portable, kind)(*part, options, multiplier, {} if tables is None else tables)
            else:
                step = getattr(reference, kind)
                for tensors in zip(*part, strict=True):
                    step(*tensors, options, multiplier)
        if not torch.compiler.is_compiling():
            # Neither Triton nor torch's fused CPU kernels tell autograd what they wrote.
            torch.autograd.graph.increment_version(part[0])


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, impl: Implementation = "auto", tables: dict | None = None) -> Tensor:
    """‖G‖ of all gradients together: a 0-dimensional tensor, not read back from its device.

    tables: where the Triton implementation keeps its device tables between calls; None builds them anew.
    """
    if not grads:
        raise ValueError("grads must hold at least one tensor, got none")
    if _may_repeat(impl, tables):
        from fastlocal.kernels import trust_ratio as kernels

        norm = kernels.grad_norm(grads, {} if tables is None else tables, again=True)
        if norm is not None:
            return norm
    _check({"grads": grads})
    norms = []
    for chosen, _, indices in _parts(impl, grads, tables):
        part = _take(grads, indices)
        if chosen == "triton":
            from fastlocal.kernels import trust_ratio as kernels

            norms.append(kernels.grad_norm(part, {} if tables is None else tables))
        else:
            norms.append(portable.grad_norm(part) if chosen == "portable" else reference.grad_norm(part))
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
    norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Implementation = "auto",
    tables: dict | None = None,
) -> None:
    """One LAMB step of every tensor, and one more in each of `steps`.

    Args:
        params: the weights. Stepped.
        grads: shaped like params.
        exp_avgs: first moments, shaped like params, at least float32. Stepped.
        exp_avg_sqs: second moments, likewise. Stepped.
        steps: 0-dimensional float32, steps taken so far, on the parameter's device. Counted up.
        options: the group's hyper-parameters.
        norm: ‖G‖ from `grad_norm` as stored, still scaled; needed where options.max_grad_norm is set.
        grad_scale: what the loss was multiplied by (GradScaler); None if nothing.
        found_inf: where it is not 0, nothing changes.
        impl: "auto" chooses Triton on CUDA and the portable path elsewhere.
        tables: what an implementation keeps from step to step, device tables or scratch; None for nothing.
    """
    if options.max_grad_norm is not None and norm is None and params:
        raise ValueError(f"norm must be given where max_grad_norm is set ({options.max_grad_norm}), got None")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    _step_("lamb_", lists, options, norm, options.max_grad_norm, grad_scale, found_inf, impl, tables)


@torch.no_grad()
def lars_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    options: LarsOptions,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Implementation = "auto",
    tables: dict | None = None,
) -> None:
    """One LARS step of every tensor.

    Args:
        params: the weights. Stepped.
        grads: shaped like params.
        momentum_buffers: shaped like params, at least float32, zeros at first; all None where momentum is 0.
        steps: 0-dimensional float32, steps taken so far; all None where dampening is 0.
        options: the group's hyper-parameters.
        grad_scale: what the loss was multiplied by (GradScaler); None if nothing.
        found_inf: where it is not 0, nothing changes.
        impl: "auto" chooses Triton on CUDA and the portable path elsewhere.
        tables: what an implementation keeps from step to step, device tables or scratch; None for nothing.
    """
    for name, needed, values in (
        ("momentum_buffers", options.momentum != 0, momentum_buffers),
        ("steps", options.momentum != 0 and options.dampening != 0, steps),
    ):
        if sum(map(is_, values, repeat(None))) != (0 if needed else len(values)):
            rule = "hold a tensor a parameter" if needed else "hold None for every parameter"
            raise ValueError(f"{name} must {rule} with momentum {options.momentum}, dampening {options.dampening}")
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "steps": steps}
    _step_("lars_", lists, options, None, None, grad_scale, found_inf, impl, tables)
