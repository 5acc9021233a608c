"""LARS and LAMB without a compiler: fast on CPUs, correct on every device.

On a CPU each step is a few calls of PyTorch's own vectorised kernels (`lamb_on_cpu`, `lars_on_cpu`). What those
kernels cannot express goes through the reference, tensor by tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.ops import lars_on_cpu
from fastlocal.ops.cpu_memory import as_vectors, in_float32, sum_of_squares
from fastlocal.ops.lamb_on_cpu import LambOnCpu
from fastlocal.reference import trust_ratio as reference
from fastlocal.reference.trust_ratio import LambOptions, LarsOptions


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """‖G‖ of all gradients together."""
    if torch.compiler.is_compiling():
        return reference.grad_norm(grads)
    total = 0.0
    for grad in grads:
        flat = as_vectors(in_float32(grad, grad)[0])
        if flat is None and not grad.is_cpu:
            return reference.grad_norm(grads)
        total += reference.grad_norm([grad]).item() ** 2 if flat is None else sum_of_squares(flat[0])
    return torch.tensor(math.sqrt(total), dtype=torch.float64, device="cpu")


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
    rest = list(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True))
    if options.grad_averaging and not torch.compiler.is_compiling() and any(p.is_cpu for p in params):
        rest = LambOnCpu(params, options, multiplier, scratch).step_(rest)
    for tensors in rest:
        reference.lamb_(*tensors, options, multiplier)


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
    rest = list(zip(params, grads, momentum_buffers, steps, strict=True))
    if not options.nesterov and not torch.compiler.is_compiling() and any(p.is_cpu for p in params):
        rest = lars_on_cpu.step_(rest, options, float(multiplier))
    for tensors in rest:
        reference.lars_(*tensors, options, multiplier)
