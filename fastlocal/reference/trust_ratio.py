"""LAMB and LARS for one tensor in plain PyTorch: what "correct" means for every faster implementation.

Both scale the step of each tensor by a trust ratio, the norm of the weights over the norm of their update.
Nothing here is optimised, nothing reads a value back to the host, and no gradient is written to.
State is kept in at least float32, and all arithmetic is done in the dtype of the state.

References:
    LARS: You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv:1708.03888,
        algorithm 1.
    LAMB: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
        arXiv:1904.00962, algorithm 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Adapt = Literal["decayed", "all", "matrices"]


def _adapts(adapt: Adapt, weight_decay: float, param: Tensor) -> bool:
    if adapt == "decayed":
        return weight_decay != 0
    return adapt == "all" or param.dim() > 1


@dataclass(frozen=True, slots=True)
class LambOptions:
    """Everything a LAMB step of one parameter group is told; `fastlocal.LAMB` documents each of them."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    bias_correction: bool | Literal["step"]
    grad_averaging: bool
    max_grad_norm: float | None
    trust_clip: tuple[float, float] | None
    decay: Literal["update", "l2", "decoupled"]
    adapt: Adapt
    maximize: bool

    def adapts(self, param: Tensor) -> bool:
        """Whether this tensor's step is scaled by its trust ratio."""
        return _adapts(self.adapt, self.weight_decay, param)


@dataclass(frozen=True, slots=True)
class LarsOptions:
    """Everything a LARS step of one parameter group is told; `fastlocal.LARS` documents each of them."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    trust_coefficient: float
    eps: float
    trust_clip: bool
    norm: Literal["sum", "joint"]
    momentum_form: Literal["torch", "lr_in_buffer"]
    adapt: Adapt
    maximize: bool

    def adapts(self, param: Tensor) -> bool:
        """Whether this tensor's step is scaled by its trust ratio."""
        return _adapts(self.adapt, self.weight_decay, param)


_ROW = 1024


def norm_of(tensor: Tensor) -> Tensor:
    """‖tensor‖, a 0-dimensional tensor.

    On a CPU row by row: over 25 million float32 elements at once, torch's sum of squares there keeps three digits.
    """
    if tensor.device.type != "cpu" or tensor.numel() <= _ROW:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(torch.cat(row_norms(tensor.reshape(-1))))


def row_norms(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of a vector's rows of 1,024 elements, and the elements that fill no row."""
    rows = flat[: flat.numel() // _ROW * _ROW].view(-1, _ROW)
    return torch.linalg.vector_norm(rows, dim=1), flat[rows.numel() :]


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """‖G‖ of all gradients together, a 0-dimensional tensor on the first one's device."""
    norms = [norm_of(g.to(torch.promote_types(g.dtype, torch.float32))) for g in grads]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))


def grad_multiplier(norm: Tensor | None, max_grad_norm: float | None, grad_scale: Tensor | None) -> float | Tensor:
    """What each gradient is multiplied by: 1/s to undo the loss scale s, and 1/c, c = max(1,
    ‖G/s‖/max_grad_norm).

    norm: ‖G‖ of the gradients as they are stored, still scaled.
    """
    unscale = 1.0 if grad_scale is None else 1.0 / grad_scale
    if norm is None or max_grad_norm is None:
        return unscale
    return unscale / (norm * unscale / max_grad_norm).clamp(min=1.0)


def adopt_(master: Tensor, param: Tensor) -> None:
    """Gives each element of the master that no longer rounds to its parameter the parameter's value.

    Whoever writes to a parameter between steps, an average or a checkpoint, so writes to its master too.
    """
    master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(master.dtype)))


def _ratio(numerator: Tensor, denominator: Tensor, trusted: Tensor) -> Tensor:
    """numerator / denominator where both norms are positive, else 1: a zero tensor still learns."""
    return torch.where(trusted, numerator / torch.where(trusted, denominator, 1.0), 1.0)


def lamb_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    options: LambOptions,
    multiplier: float | Tensor = 1.0,
) -> None:
    """One LAMB step of one tensor, in place.

    Args:
        param: the weights, of any shape; stepped.
        grad: shaped like param.
        exp_avg: the first moment, shaped like param, at least float32; stepped.
        exp_avg_sq: the second moment, likewise.
        step: 0-dimensional, how many steps this tensor has taken, this one included.
        options: the group's hyper-parameters.
        multiplier: what the gradient is multiplied by first (see `grad_multiplier`).
    """
    w, update, lr = lamb_update_(param, grad, exp_avg, exp_avg_sq, step, options, multiplier)
    # x ← x − η r u,  r = ‖x‖/‖u‖
    if options.adapts(param):
        update = update * lamb_ratio(norm_of(w), norm_of(update), options)
    param.copy_(w - lr * update)


def lamb_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    options: LambOptions,
    multiplier: float | Tensor,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Steps the moments; returns the weights in their dtype, u, and what u is multiplied by besides r."""
    beta1, beta2 = options.betas
    w = param.to(exp_avg.dtype)
    g = grad.to(exp_avg.dtype) * multiplier
    if options.maximize:
        g = -g
    if options.decay == "l2":
        g = g + options.weight_decay * w

    # m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²
    exp_avg.mul_(beta1).add_(g, alpha=1 - beta1 if options.grad_averaging else 1.0)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)

    correction1, correction2 = (_bias_correction(beta, step.to(exp_avg.dtype)) for beta in options.betas)
    lr = options.lr
    if options.bias_correction is True:
        # m̂/(√v̂ + ε)
        update = (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + options.eps)
    else:
        update = exp_avg / (exp_avg_sq.sqrt() + options.eps)
        if options.bias_correction == "step":
            lr = lr * correction2.sqrt() / correction1

    if options.decay == "decoupled":
        w = w - options.lr * (options.weight_decay * w)
    elif options.decay == "update":
        update = update + options.weight_decay * w
    return w, update, lr


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 − β^t. As a difference it would lose four digits in float32, which not every device has more than."""
    if beta == 0:
        return torch.ones_like(step)
    correction = -torch.expm1(step * math.log(beta))
    if torch.compiler.is_compiling() and step.is_cpu:
        # A compiler takes it anew for every element of the tensor; what a scan returns it keeps.
        return correction.reshape(1).cumsum(0)[0]
    return correction


def lamb_ratio(weight_norm: Tensor, update_norm: Tensor, options: LambOptions) -> Tensor:
    """r = ‖x‖/‖u‖ within its bounds."""
    trusted = (weight_norm > 0) & (update_norm > 0)
    ratio = _ratio(weight_norm, update_norm, trusted)
    if options.trust_clip is not None:
        ratio = torch.where(trusted, ratio.clamp(*options.trust_clip), 1.0)
    return ratio


def lars_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    step: Tensor | None,
    options: LarsOptions,
    multiplier: float | Tensor = 1.0,
) -> None:
    """One LARS step of one tensor, in place.

    Args:
        param: the weights, of any shape; stepped.
        grad: shaped like param.
        momentum_buffer: shaped like param, at least float32, zeros before the first step; stepped. None where
            momentum is 0.
        step: 0-dimensional, steps taken, this one included; None where dampening is 0, which needs no count.
        options: the group's hyper-parameters.
        multiplier: what the gradient is multiplied by first (see `grad_multiplier`).
    """
    w, d, measured = lars_direction(param, grad, options, multiplier)
    if options.adapts(param):
        d = d * lars_ratio(norm_of(w), norm_of(measured), options)
    lars_apply_(param, w, d, momentum_buffer, step, options)


def lars_direction(
    param: Tensor, grad: Tensor, options: LarsOptions, multiplier: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights in at least float32, d = g + λx, and what the ratio divides by the norm of: g or d."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    w = param.to(dtype)
    g = grad.to(dtype) * multiplier
    if options.maximize:
        g = -g
    d = g + options.weight_decay * w
    return w, d, g if options.norm == "sum" else d


def lars_ratio(weight_norm: Tensor, norm: Tensor, options: LarsOptions) -> Tensor:
    """r = η‖x‖/(‖g‖ + λ‖x‖ + ε), or η‖x‖/(‖g + λx‖ + ε)."""
    denominator = norm + options.eps
    if options.norm == "sum":
        denominator = norm + options.weight_decay * weight_norm + options.eps
    ratio = _ratio(options.trust_coefficient * weight_norm, denominator, (weight_norm > 0) & (norm > 0))
    if options.trust_clip:
        # LARC: the whole step lr·r is at most lr. Where lr is 0 the quotient is not chosen.
        ratio = torch.where(ratio >= options.lr, 1.0, ratio / options.lr)
    return ratio


def lars_apply_(
    param: Tensor,
    w: Tensor,
    d: Tensor,
    momentum_buffer: Tensor | None,
    step: Tensor | None,
    options: LarsOptions,
) -> None:
    """Steps the buffer and the parameter by the scaled direction d."""
    # The paper keeps the learning rate inside the buffer; torch.optim.SGD applies it to the buffer.
    lr = options.lr
    if options.momentum_form == "lr_in_buffer":
        d, lr = lr * d, 1.0
    if momentum_buffer is not None:
        kept = (1 - options.dampening) * d
        if step is not None:
            kept = torch.where(step == 1, d, kept)  # as in torch.optim.SGD, the first gradient is not dampened
        momentum_buffer.mul_(options.momentum).add_(kept)
        d = d + options.momentum * momentum_buffer if options.nesterov else momentum_buffer
    param.copy_(w - lr * d)
