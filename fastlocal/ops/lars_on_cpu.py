"""LARS on a CPU from two sums of squares and one call of torch's fused SGD kernel.

The kernel computes buffer ← μ·buffer + (1 − dampening)·d, so the trust ratio goes in through its dampening. A ratio
so small that 1 − (1 − ratio) loses its digits is not for this kernel.
"""

import math

import torch
from torch import Tensor

from fastlocal.ops.cpu_memory import as_vectors, in_float32, sum_of_squares
from fastlocal.reference.trust_ratio import LarsOptions

_LEAST_SCALE = 1e-7  # which float64 then has to nine digits, more than float32 can tell


def step_(
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

    lr = float(options.lr)
    scale = _ratio(w, g, options, lr) if options.adapts(param) else 1.0
    if options.momentum_form == "lr_in_buffer":
        scale, lr = scale * lr, 1.0
    if step is not None and step.item() != 1:
        scale *= 1 - options.dampening
    if buffer is not None and 0 < scale < _LEAST_SCALE:
        return False
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        [w],
        [g],
        [] if buffer is None else [flat[2]],
        weight_decay=options.weight_decay,
        momentum=0.0 if buffer is None else options.momentum,
        lr=lr if buffer is not None else lr * scale,
        dampening=1 - scale,
        nesterov=False,
        maximize=options.maximize,
        is_first_step=False,
    )
    if weight is not param:
        param.copy_(weight)
    return True


def _ratio(w: Tensor, g: Tensor, options: LarsOptions, lr: float) -> float:
    weight_norm = math.sqrt(sum_of_squares(w))
    if options.norm == "sum":
        norm = math.sqrt(sum_of_squares(g))
        denominator = norm + options.weight_decay * weight_norm + options.eps
    else:
        sign = -1.0 if options.maximize else 1.0
        norm = math.sqrt(sum_of_squares(torch.add(g, w, alpha=sign * options.weight_decay)))
        denominator = norm + options.eps
    ratio = options.trust_coefficient * weight_norm / denominator if weight_norm > 0 and norm > 0 else 1.0
    if options.trust_clip:
        ratio = 1.0 if ratio >= lr else ratio / lr
    return ratio
