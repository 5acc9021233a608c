"""LARS and LAMB of tensors cut in pieces over processes: local sums of squares, added up in one exchange a call.

In plain PyTorch, from the parts of the reference. How sums are added up is passed in: nothing here communicates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlocal.reference import trust_ratio as reference
from fastlocal.reference.trust_ratio import LambOptions, LarsOptions

Sum = Callable[[Tensor], None]
"""Adds up the rows of an (n, k) float64 tensor in place, row i over the processes that hold pieces of tensor i."""


def _norms(columns: Sequence[Sequence[Tensor]], sum_: Sum) -> Tensor:
    """The norms of whole tensors from their pieces: row i, column k is that of columns[k][i]."""
    norms = [torch.stack([reference.norm_of(t).double() for t in column]) for column in columns]
    squares = torch.stack(norms, dim=1).square()
    sum_(squares)
    return squares.sqrt()


def grad_norm(grads: Sequence[Tensor], sum_: Sum) -> Tensor:
    """‖G‖ of all whole gradients together."""
    return torch.linalg.vector_norm(_norms([[g.float() if g.itemsize < 4 else g for g in grads]], sum_))


def found_anywhere(found_inf: Tensor | None, num_tensors: int, sum_: Sum) -> bool:
    """Whether a process that holds a piece has found an infinity: all must step, or none."""
    if found_inf is None:
        return False
    found = found_inf.double().reshape(1, 1).repeat(num_tensors, 1)
    sum_(found)
    return bool(found.any())


def lamb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: LambOptions,
    multiplier: float | Tensor,
    sum_: Sum,
) -> None:
    """One LAMB step of every piece; `steps` already counts it."""
    pieces = list(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True))
    ready = [reference.lamb_update_(*piece, options, multiplier) for piece in pieces]
    norms = None
    if any(options.adapts(p) for p in params):
        norms = _norms([[w for w, _, _ in ready], [u for _, u, _ in ready]], sum_)
    for i, (param, (w, update, lr)) in enumerate(zip(params, ready, strict=True)):
        if norms is not None and options.adapts(param):
            update = update * reference.lamb_ratio(norms[i, 0], norms[i, 1], options)
        param.copy_(w - lr * update)


def lars_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    options: LarsOptions,
    multiplier: float | Tensor,
    sum_: Sum,
) -> None:
    """One LARS step of every piece; `steps` already counts it."""
    pairs = zip(params, grads, strict=True)
    ready = [reference.lars_direction(param, grad, options, multiplier) for param, grad in pairs]
    norms = None
    if any(options.adapts(p) for p in params):
        norms = _norms([[w for w, _, _ in ready], [measured for _, _, measured in ready]], sum_)
    for i, (param, (w, d, _)) in enumerate(zip(params, ready, strict=True)):
        if norms is not None and options.adapts(param):
            d = d * reference.lars_ratio(norms[i, 0], norms[i, 1], options)
        reference.lars_apply_(param, w, d, momentum_buffers[i], steps[i], options)
