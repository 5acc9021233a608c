"""LARS and LAMB without a compiler: fast on CPUs, correct on every device.

On a CPU each step is a few calls of PyTorch's own vectorised kernels, one tensor after the other, so that the
later passes over a tensor find it in the cache. What those kernels cannot express goes through the reference.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.reference import trust_ratio as reference
from fastlocal.reference.trust_ratio import LambOptions, LarsOptions

# 2 MiB of float32: long enough that a call's few microseconds vanish, and short enough that a sum of
# squares in float32 keeps six digits (torch.linalg.vector_norm of 2.4M elements keeps four).
_CHUNK = 512 * 1024

# β^t is 0 long before: torch's Adam kernel, told this many steps, corrects no bias.
_NO_CORRECTION = 1e30


def _flat(*tensors: Tensor) -> list[Tensor] | None:
    """The tensors as vectors in memory order; None unless they are float32 on a CPU and laid out alike."""
    first = tensors[0]
    if any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        return None
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    stride = first.stride()
    if any(t.stride() != stride for t in tensors) or not torch.ops.aten.is_non_overlapping_and_dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _stage(param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter in float32, and the gradient in float32 with the parameter's strides."""
    if param.dtype == torch.float64:
        return param, grad
    w = param.to(torch.float32)
    if grad.dtype == torch.float32 and grad.stride() == w.stride():
        return w, grad
    return w, torch.empty_like(w).copy_(grad)


def _sum_of_squares(flat: Tensor) -> float:
    if flat.numel() <= _CHUNK:
        return torch.dot(flat, flat).item()
    return sum(torch.dot(part, part).item() for part in flat.split(_CHUNK))


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """‖G‖ of all gradients together."""
    flats = [_flat(_stage(g, g)[0]) for g in grads]
    if torch.compiler.is_compiling() or any(flat is None for flat in flats):
        return reference.grad_norm(grads)
    total = sum(_sum_of_squares(flat[0]) for flat in flats if flat is not None)
    return torch.tensor(math.sqrt(total), dtype=torch.float64)


def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: LambOptions,
    multiplier: float | Tensor,
    scratch: dict,
) -> None:
    """One LAMB step of every tensor; `steps` already counts it.

    scratch: keeps room for the longest tensor's update from step to step.
    """
    compiling = torch.compiler.is_compiling()
    cpu = None if compiling else _LambOnCpu(params, options, multiplier, scratch)
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        if cpu is None or not cpu.step_(param, grad, exp_avg, exp_avg_sq, step):
            reference.lamb_(param, grad, exp_avg, exp_avg_sq, step, options, multiplier)


class _LambOnCpu:
    """LAMB from one call of torch's fused AdamW kernel, two dot products and one addition a tensor.

    AdamW with learning rate 1 and weight decay 1 + λ turns a copy of the weights into −(m̂/(√v̂ + ε) + λw),
    and updates both moments in the same pass over memory.
    """

    def __init__(self, params: Sequence[Tensor], options: LambOptions, multiplier: float | Tensor, scratch: dict):
        self.options = options
        self.usable = options.grad_averaging and any(p.is_cpu for p in params)
        if not self.usable:
            return
        self.multiplier, self.lr = float(multiplier), float(options.lr)
        self.uncorrected = torch.tensor(_NO_CORRECTION)
        largest = max(p.numel() for p in params if p.is_cpu)
        # Fresh memory would cost a page fault every 4 KiB, at every step.
        if "update" not in scratch or scratch["update"].numel() < largest:
            scratch["update"] = torch.empty(largest, dtype=torch.float32)
            scratch["gradient"] = torch.empty(min(largest, _CHUNK), dtype=torch.float32)
        self.update, self.gradient = scratch["update"], scratch["gradient"]

    def step_(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> bool:
        """Steps one tensor, or returns False where this way cannot."""
        if not self.usable or not param.is_cpu:
            return False
        weight, grad = _stage(param, grad)
        flat = _flat(weight, grad, exp_avg, exp_avg_sq)
        if flat is None:
            return False
        self._step_flat(flat, step, self.options.adapts(param))
        if weight is not param:
            param.copy_(weight)
        return True

    def _step_flat(self, flat: list[Tensor], step: Tensor, adapts: bool) -> None:
        options = self.options
        weight = flat[0]
        update = self.update[: weight.numel()]
        if options.decay == "decoupled" and options.weight_decay:
            weight.mul_(1 - self.lr * options.weight_decay)

        weight_square = update_square = 0.0
        chunks = [[t] for t in (*flat, update)]
        if weight.numel() > _CHUNK:
            chunks = [t.split(_CHUNK) for t in (*flat, update)]
        for w, g, m, v, u in zip(*chunks, strict=True):
            self._negative_update_(u, w, g, m, v, step)
            if adapts:
                weight_square += torch.dot(w, w).item()
                update_square += torch.dot(u, u).item()

        step_size = self.lr
        if options.bias_correction == "step":
            beta1, beta2 = options.betas
            t = step.item()
            step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        if weight_square > 0 and update_square > 0:
            ratio = math.sqrt(weight_square / update_square)
            if options.trust_clip is not None:
                low, high = options.trust_clip
                ratio = min(max(ratio, low), high)
            step_size *= ratio
        weight.add_(update, alpha=step_size)

    def _negative_update_(self, u: Tensor, w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor) -> None:
        options = self.options
        decayed = options.decay == "update" and options.weight_decay != 0
        if decayed:
            u.copy_(w)
        else:
            u.zero_()
        own = self.gradient[: g.numel()]
        if self.multiplier != 1:
            g = torch.mul(g, self.multiplier, out=own)
        if options.decay == "l2" and options.weight_decay != 0:
            sign = -1.0 if options.maximize else 1.0
            g = torch.add(g, w, alpha=sign * options.weight_decay, out=own)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [u],
            [g],
            [m],
            [v],
            [],
            [step if options.bias_correction is True else self.uncorrected],
            lr=1.0,
            beta1=options.betas[0],
            beta2=options.betas[1],
            weight_decay=1 + options.weight_decay if decayed else 0.0,
            eps=options.eps,
            amsgrad=False,
            maximize=options.maximize,
        )


def lars_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    options: LarsOptions,
    multiplier: float | Tensor,
    scratch: dict,
) -> None:
    """One LARS step of every tensor; `steps` already counts it. Needs no scratch."""
    on_cpu = not torch.compiler.is_compiling() and not options.nesterov
    for param, grad, buffer, step in zip(params, grads, momentum_buffers, steps, strict=True):
        if not on_cpu or not param.is_cpu or not _lars_on_cpu_(param, grad, buffer, step, options, float(multiplier)):
            reference.lars_(param, grad, buffer, step, options, multiplier)


def _lars_on_cpu_(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    step: Tensor | None,
    options: LarsOptions,
    multiplier: float,
) -> bool:
    """LARS from two dot products and one call of torch's fused SGD kernel; False where this way cannot.

    The kernel computes buffer ← μ·buffer + (1 − dampening)·d, so the trust ratio goes in through its
    dampening.
    """
    weight, grad = _stage(param, grad)
    flat = _flat(weight, grad) if buffer is None else _flat(weight, grad, buffer)
    if flat is None:
        return False
    w, g = flat[0], flat[1]
    if multiplier != 1:
        g = g * multiplier

    lr = float(options.lr)
    scale = 1.0
    if options.adapts(param):
        scale = _lars_ratio(w, g, options, lr)
    if options.momentum_form == "lr_in_buffer":
        scale, lr = scale * lr, 1.0
    if step is not None and step.item() != 1:
        scale *= 1 - options.dampening
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


def _lars_ratio(w: Tensor, g: Tensor, options: LarsOptions, lr: float) -> float:
    weight_norm = math.sqrt(_sum_of_squares(w))
    if options.norm == "sum":
        norm = math.sqrt(_sum_of_squares(g))
        denominator = norm + options.weight_decay * weight_norm + options.eps
    else:
        sign = -1.0 if options.maximize else 1.0
        norm = math.sqrt(_sum_of_squares(torch.add(g, w, alpha=sign * options.weight_decay)))
        denominator = norm + options.eps
    ratio = options.trust_coefficient * weight_norm / denominator if weight_norm > 0 and norm > 0 else 1.0
    if options.trust_clip:
        ratio = 1.0 if ratio >= lr else ratio / lr
    return ratio
