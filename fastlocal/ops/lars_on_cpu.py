"""LARS on a CPU from two norms and torch's fused SGD kernel.

The kernel computes buffer ← μ·buffer + (1 − dampening)·d, so a tensor's trust ratio goes in through its dampening. A
ratio so small that 1 − (1 − ratio) loses its digits is not for this kernel. Short tensors are stepped together: one
call for all of them, with directions that are scaled before.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal.ops.cpu_memory import as_vectors, in_float32, short_in_batches, sum_of_squares
from fastlocal.reference.trust_ratio import LarsOptions

_LEAST_SCALE = 1e-7  # which float64 then has to nine digits, more than float32 can tell

Entry = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A parameter with its gradient, its momentum buffer and its count of steps."""


def step_(entries: Sequence[Entry], options: LarsOptions, multiplier: float) -> list[Entry]:
    """Steps every tensor it can, and returns the others."""
    batches, others = short_in_batches(entries)
    for batch in batches:
        _step_short_(batch, options, multiplier)
    return [entry for entry in others if not _step_one_(*entry, options, multiplier)]


def _step_short_(entries: list[Entry], options: LarsOptions, multiplier: float) -> None:
    weights = [entry[0] for entry in entries]
    grads: Any = [entry[1] for entry in entries]
    if multiplier != 1:
        grads = torch._foreach_mul(grads, multiplier)  # pyright: ignore[reportPrivateImportUsage]
    buffers = [entry[2] for entry in entries if entry[2] is not None]
    adapted = [options.adapts(weight) for weight in weights]
    scaled = any(adapted) or options.dampening != 0 or options.momentum_form == "lr_in_buffer"
    directions = _scaled(weights, grads, [entry[3] for entry in entries], adapted, options) if scaled else grads
    _fused_(weights, directions, buffers, options, 0.0 if scaled else options.weight_decay, 1.0)


def _scaled(
    weights: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor | None],
    adapted: list[bool],
    options: LarsOptions,
) -> Any:
    """What the buffers take up, but for the sign, which `maximize` turns in the kernel."""
    directions: Any = grads
    if options.weight_decay:
        alpha = _signed_decay(options)
        directions = torch._foreach_add(grads, weights, alpha=alpha)  # pyright: ignore[reportPrivateImportUsage]
    ratios = [1.0] * len(weights)
    if any(adapted):
        measured = grads if options.norm == "sum" else directions
        found = (*torch._foreach_norm(weights), *torch._foreach_norm(measured))  # pyright: ignore[reportPrivateImportUsage]
        norms = torch.stack(found).tolist()
        each = zip(adapted, norms[: len(weights)], norms[len(weights) :], strict=True)
        ratios = [_ratio(weight_norm, norm, options) if adapts else 1.0 for adapts, weight_norm, norm in each]
    scales = [_scale(ratio, step, options) for ratio, step in zip(ratios, steps, strict=True)]
    return torch._foreach_mul(directions, scales)  # pyright: ignore[reportPrivateImportUsage]


def _step_one_(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    step: Tensor | None,
    options: LarsOptions,
    multiplier: float,
) -> bool:
    """Steps one tensor, or returns False where this way cannot."""
    if not param.is_cpu:
        return False
    weight, grad = in_float32(param, grad)
    flat = as_vectors(weight, grad) if buffer is None else as_vectors(weight, grad, buffer)
    if flat is None:
        return False
    w, g = flat[0], flat[1]
    if multiplier != 1:
        g = g * multiplier

    scale = _scale(_measured_ratio(w, g, options) if options.adapts(param) else 1.0, step, options)
    if buffer is not None and 0 < scale < _LEAST_SCALE:
        return False
    _fused_([w], [g], flat[2:], options, options.weight_decay, scale)
    if weight is not param:
        param.copy_(weight)
    return True


def _fused_(
    weights: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    options: LarsOptions,
    weight_decay: float,
    scale: float,
) -> None:
    lr = 1.0 if options.momentum_form == "lr_in_buffer" else float(options.lr)
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        weights,
        directions,
        buffers,
        weight_decay=weight_decay,
        momentum=options.momentum,
        lr=lr if buffers else lr * scale,
        dampening=1 - scale,
        nesterov=False,
        maximize=options.maximize,
        is_first_step=False,
    )


def _scale(ratio: float, step: Tensor | None, options: LarsOptions) -> float:
    """What a direction is multiplied by on its way into the buffer."""
    scale = ratio * float(options.lr) if options.momentum_form == "lr_in_buffer" else ratio
    return scale if step is None or step.item() == 1 else scale * (1 - options.dampening)


def _signed_decay(options: LarsOptions) -> float:
    return -options.weight_decay if options.maximize else options.weight_decay


def _measured_ratio(w: Tensor, g: Tensor, options: LarsOptions) -> float:
    measured = g if options.norm == "sum" else torch.add(g, w, alpha=_signed_decay(options))
    return _ratio(math.sqrt(sum_of_squares(w)), math.sqrt(sum_of_squares(measured)), options)


def _ratio(weight_norm: float, norm: float, options: LarsOptions) -> float:
    decay = options.weight_decay * weight_norm if options.norm == "sum" else 0.0
    denominator = norm + decay + options.eps
    ratio = options.trust_coefficient * weight_norm / denominator if weight_norm > 0 and norm > 0 else 1.0
    if options.trust_clip:
        lr = float(options.lr)
        if ratio >= lr:
            return 1.0
        return ratio / lr if lr else math.nan  # of weights that are not finite
    return ratio
