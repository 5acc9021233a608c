"""Launches the LAMB and LARS kernels: every argument that may change lives on the device, and nothing is read
back.

The options are `fastlocal.reference.trust_ratio.LambOptions` and `LarsOptions`, taken by attribute: kernels
import nothing from the rest of the library. No kernel is autotuned, since they write what they read.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal.kernels import lamb, lars
from fastlocal.kernels.device import is_capturing, on_device
from fastlocal.kernels.launch import launch_constants, queue_constants
from fastlocal.kernels.trust_ratio_common import (
    BLOCK,
    CHUNK,
    NUM_WARPS,
    norm_kernel,
    square_kernel,
    tensor_sum_kernel,
)
from fastlocal.kernels.trust_ratio_tables import DTYPES, Bucket, buckets, kept_buckets

# A sum's order, and so its last bit, depends on the warps: those of the kernels that take both phases.
_REDUCTION = {"num_warps": NUM_WARPS}


def _arguments(bucket: Bucket) -> dict[str, Any]:
    """A table of what the kernels take by these names."""
    return {
        "pointers": bucket.pointers,
        "sizes": bucket.sizes,
        "chunks": bucket.chunks,
        "first_chunk": bucket.first_chunk,
        "adapts": bucket.adapts,
        "num_tensors": bucket.num_tensors,
        "P_DTYPE": DTYPES[bucket.dtypes[0]],
        "G_DTYPE": DTYPES[bucket.dtypes[-1]],
        "ALIGNED": bucket.aligned,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
    }


def _step_arguments(
    bucket: Bucket, columns: int, lr: Tensor, options: Any, grad_scale: Tensor | None, found_inf: Tensor | None
) -> dict[str, Any]:
    """The same with what LAMB and LARS both take; `columns` is the width of their coefficient table."""
    return _arguments(bucket) | {
        "coefficients": bucket.float_scratch("coefficients", bucket.num_tensors, columns),
        "partials": bucket.float_scratch("partials", bucket.num_chunks, 2),
        "lr": lr,
        # In the place of what is absent stands some pointer, which is not read.
        "grad_scale": lr if grad_scale is None else grad_scale,
        "found_inf": lr if found_inf is None else found_inf,
        "HAS_SCALE": grad_scale is not None,
        "HAS_FOUND": found_inf is not None,
        "weight_decay": float(options.weight_decay),
        "eps": float(options.eps),
        "MAXIMIZE": options.maximize,
    }


def _size(kernel: str, bucket: Bucket) -> dict[str, int]:
    block, warps = launch_constants(kernel, bucket.pointers.device, bucket.dtypes[0])
    return {"BLOCK": block, "num_warps": warps}


def _launch(kernel: Any, num_programs: int, arguments: dict[str, Any], size: dict[str, int] | None = None) -> None:
    """Launches with those of the arguments that the kernel's parameters name; `size` goes before them."""
    kernel[(num_programs,)](**{name: arguments[name] for name in kernel.arg_names} | (size or {}))


def _in_one_launch(kernel: Any, name: str, bucket: Bucket, arguments: dict[str, Any]) -> bool:
    """Launches both phases together, or returns False where that was not measured to be faster."""
    constants = queue_constants(name, bucket.pointers.device, bucket.dtypes[0])
    if constants is None:
        return False
    block, warps, lag = constants
    queue, counters = bucket.queue(lag)
    counters.zero_()
    arguments = arguments | {"queue": queue, "counters": counters}
    _launch(kernel, 2 * bucket.num_chunks, arguments, {"BLOCK": block, "num_warps": warps})
    return True


def _on_device(cache: dict, name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A float32 scalar on the device; a host value is written only when it has changed.

    A graph has a scalar of its own, which its replays write, so that neither they nor other steps see each other's.
    """
    if isinstance(value, Tensor) and value.device == device:
        return value if value.dtype == torch.float32 else value.to(torch.float32)
    value = float(value)
    if is_capturing(device):
        return torch.full((), value, dtype=torch.float32, device=device)
    kept = cache.get((name, device))
    if kept is None:
        kept = cache[name, device] = (torch.full((), value, dtype=torch.float32, device=device), [value])
    elif kept[1][0] != value:
        kept[0].fill_(value)
        kept[1][0] = value
    return kept[0]


def _float32(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype == torch.float32 else value.to(torch.float32)


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _bound(
    cache: dict,
    name: str,
    rows: Sequence[Sequence[Tensor]],
    written: Sequence[int],
    options: Any,
    steps: Sequence[Tensor] | None,
    again: bool,
) -> list[Bucket] | None:
    """The buckets of a step; with `again`, None unless they are those of the step before."""
    flags = (options.adapt, options.weight_decay != 0)
    if again:
        return kept_buckets(cache, name, rows, flags, steps)
    return buckets(cache, name, rows, written, flags, options.adapts, steps)


def grad_norm(grads: Sequence[Tensor], cache: dict, again: bool = False) -> Tensor | None:
    """‖G‖ of all gradients together, a 0-dimensional float32 tensor. Reads each gradient once.

    again: return None, having done nothing, unless the tensors are those of the call before.
    """
    device = grads[0].device
    with on_device(device):
        found = kept_buckets(cache, "norm", [grads], None)
        if found is None:
            if again:
                return None
            found = buckets(cache, "norm", [grads], (), None, lambda _: True)
        for bucket in found:
            _copy(bucket.copies_in)
        return _norm(found, 0, cache)


def _norm(found: list[Bucket], row: int, cache: dict) -> Tensor:
    """‖·‖ of what the tables have in this row."""
    device = found[0].pointers.device
    num_tensors = sum(bucket.num_tensors for bucket in found)
    sums, norm = _norm_buffers(cache, num_tensors, device)
    start = 0
    for bucket in found:
        sums_here = sums[start : start + bucket.num_tensors]
        partials = bucket.float_scratch("squares", bucket.num_chunks)
        arguments = _arguments(bucket) | {"partials": partials, "sums": sums_here, "ROW": row}
        _launch(square_kernel, bucket.num_chunks, arguments, _size("square", bucket))
        _launch(tensor_sum_kernel, bucket.num_tensors, arguments, _REDUCTION)
        start += bucket.num_tensors
    _launch(norm_kernel, 1, {"sums": sums, "num_sums": num_tensors, "norm": norm, "BLOCK": BLOCK})
    return norm


def _norm_buffers(cache: dict, num_tensors: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Σ of squares of each tensor and the norm of all, the same at every step; a graph has its own."""
    kept = cache.get("norm buffers")
    if kept is None or kept[0].numel() != num_tensors or kept[0].device != device or is_capturing(device):
        kept = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in ((num_tensors,), ()))
        if not is_capturing(device):
            cache["norm buffers"] = kept
    return kept


def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: Any,
    cache: dict,
    masters: Sequence[Tensor] | None = None,
    *,
    norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    again: bool = False,
) -> bool:
    """One LAMB step of every tensor, and one more in each of `steps`.

    norm: what options.max_grad_norm bounds, ‖G‖; None for that of `grads`.
    masters: the weights in float32, of which the parameters are roundings; None where they are their own.
    again: return False, having done nothing, unless the tensors are those of the step before.
    """
    device = params[0].device
    rows = (params, grads, exp_avgs, exp_avg_sqs, *([] if masters is None else [masters]))
    name = "lamb" if masters is None else "lamb with masters"
    with on_device(device):
        found = _bound(cache, name, rows, (0, 2, 3, 4), options, steps, again)
        if found is None:
            return False
        lr = _on_device(cache, "lr", options.lr, device)
        for bucket in found:
            _copy(bucket.copies_in)
        if norm is None and options.max_grad_norm is not None:
            norm = _norm(found, lamb.G.value, cache)
        for bucket in found:
            scalars = _float32(norm), _float32(grad_scale), _float32(found_inf)
            _lamb_bucket(bucket, lr, options, masters is not None, *scalars)
            _copy(bucket.copies_out)
    return True


def _lamb_bucket(
    bucket: Bucket,
    lr: Tensor,
    options: Any,
    mastered: bool,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = options.betas
    low, high = options.trust_clip or (0.0, math.inf)
    arguments = _step_arguments(bucket, lamb.COLUMNS, lr, options, grad_scale, found_inf) | {
        "norm": lr if norm is None else norm,
        "max_norm": float(options.max_grad_norm or 1.0),
        "log_beta1": _log(beta1),
        "log_beta2": _log(beta2),
        "beta1": beta1,
        "beta2": beta2,
        "beta3": 1 - beta1 if options.grad_averaging else 1.0,
        "beta4": 1 - beta2,
        "l2_decay": float(options.weight_decay) if options.decay == "l2" else 0.0,
        "update_decay": float(options.weight_decay) if options.decay == "update" else 0.0,
        "low": float(low),
        "high": float(high),
        "HAS_NORM": norm is not None and options.max_grad_norm is not None,
        "HAS_CLIP": options.trust_clip is not None,
        "HAS_MASTER": mastered,
        "CORRECTION": {True: "moments", False: "none", "step": "step"}[options.bias_correction],
        "DECOUPLED": options.decay == "decoupled",
        "TENSORS": lamb.TENSORS,
    }
    _launch(lamb.prepare_kernel, -(-bucket.num_tensors // lamb.TENSORS), arguments)
    if not _in_one_launch(lamb.step_kernel, "lamb_step", bucket, arguments):
        _launch(lamb.moments_kernel, bucket.num_chunks, arguments, _size("lamb_moments", bucket))
        _launch(lamb.ratio_kernel, bucket.num_tensors, arguments, _REDUCTION)
        _launch(lamb.weights_kernel, bucket.num_chunks, arguments, _size("lamb_weights", bucket))


def lars_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    options: Any,
    cache: dict,
    masters: Sequence[Tensor] | None = None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    again: bool = False,
) -> bool:
    """One LARS step of every tensor, and one more in each of `steps`.

    masters: the weights in float32, of which the parameters are roundings; None where they are their own.
    again: return False, having done nothing, unless the tensors are those of the step before.
    """
    device = params[0].device
    counted = [s for s in steps if s is not None]
    buffers = [b for b in momentum_buffers if b is not None]
    rows = [row for row in (params, grads, buffers, masters) if row]
    master_row = 0 if masters is None else len(rows) - 1
    name = "lars" if masters is None else "lars with masters"
    with on_device(device):
        found = _bound(cache, name, rows, (0, 2, 3), options, counted or None, again)
        if found is None:
            return False
        lr = _on_device(cache, "lr", options.lr, device)
        for bucket in found:
            _copy(bucket.copies_in)
            scalars = _float32(grad_scale), _float32(found_inf)
            _lars_bucket(bucket, lr, options, bool(counted), master_row, len(rows), *scalars)
            _copy(bucket.copies_out)
    return True


def _lars_bucket(
    bucket: Bucket,
    lr: Tensor,
    options: Any,
    counted: bool,
    master_row: int,
    step_row: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    arguments = _step_arguments(bucket, lars.COLUMNS, lr, options, grad_scale, found_inf) | {
        "momentum": float(options.momentum),
        "trust_coefficient": float(options.trust_coefficient),
        "kept": 1.0 - options.dampening,
        "HAS_BUFFER": options.momentum != 0,
        "NESTEROV": options.nesterov,
        "COUNTED": counted,
        "STEP": step_row,
        "MASTER": master_row,
        "JOINT": options.norm == "joint",
        "CLIP": options.trust_clip,
        "LR_IN_BUFFER": options.momentum_form == "lr_in_buffer",
    }
    if options.adapt != "decayed" or options.weight_decay != 0:
        if _in_one_launch(lars.step_kernel, "lars_step", bucket, arguments):
            return
        _launch(lars.norms_kernel, bucket.num_chunks, arguments, _size("lars_norms", bucket))
    _launch(lars.prepare_kernel, bucket.num_tensors, arguments, _REDUCTION)
    _launch(lars.weights_kernel, bucket.num_chunks, arguments, _size("lars_weights", bucket))
