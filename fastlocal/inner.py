"""What the inner optimizer holds for each worker: gradients, and state such as momentum.

Parameters of the k workers that belong together are passed as one tuple, worker by worker.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

InnerState = Literal["keep", "reset", "average"]
"""What a sync does to the inner optimizer's state: leave it, forget it, or average it over the workers."""

Twins = tuple[nn.Parameter, ...]
"""One parameter of the model, in each worker."""


_SCALARS = {"step", "mu_product", "mu", "eta"}
"""What torch's optimizers keep of a parameter as a whole: that of a 0-dimensional one is shaped like it."""


def is_averaged(parameter: Tensor, key: str, value: object) -> bool:
    """Whether this piece of a parameter's state is what a sync averages, such as a moment."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or key in _SCALARS:
        return False
    if value.shape == parameter.shape:
        return True
    # Of rows and columns, as Adafactor's: one dimension is 1, or left out.
    shape = list(parameter.shape)
    factors = [[*shape[:i], *kept, *shape[i + 1 :]] for i in range(len(shape)) for kept in ([1], [])]
    return len(shape) > 1 and list(value.shape) in factors


def require_dense(gradient: Tensor) -> None:
    """Raises RuntimeError for a gradient that cannot be averaged."""
    if gradient.layout != torch.strided:
        raise RuntimeError("sparse gradients cannot be averaged: use dense ones, or warmup_steps=0")


@torch.no_grad()
def average_gradients_(twins: Iterable[Twins], weights: Sequence[float]) -> None:
    """Give every worker the weighted mean gradient. A worker without one counts as zero, unless nobody has one.

    Args:
        twins: the parameters.
        weights: of each worker; float32 must hold them.
    """
    for parameters in twins:
        gradients = [parameter.grad for parameter in parameters]
        first = next((gradient for gradient in gradients if gradient is not None), None)
        if first is None:
            continue
        mean = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        for gradient, weight in zip(gradients, weights, strict=True):
            if gradient is None:
                continue
            require_dense(gradient)
            mean.add_(gradient, alpha=weight)
        mean.div_(math.fsum(weights))
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(first)
            parameter.grad.copy_(mean)


@torch.no_grad()
def reset_state_(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], everybodys: bool) -> None:
    """Forget the state of these parameters: the optimizer's next step begins it anew.

    Args:
        optimizer: whose state it is.
        parameters: of one worker.
        everybodys: whether that of all its other parameters is forgotten too.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter in parameters:
        if parameter not in optimizer.state:
            continue
        own, group = optimizer.state[parameter], group_of[id(parameter)]
        if isinstance(optimizer, torch.optim.Adagrad):  # it makes its state in its constructor alone
            own["sum"].fill_(group["initial_accumulator_value"])
            own["step"].zero_()
        elif isinstance(optimizer, torch.optim.SGD) and group["fused"] and not everybodys:
            # Fused SGD fails when only some parameters have a buffer; without dampening zeros are as good as none.
            if own.get("momentum_buffer") is not None:
                own["momentum_buffer"].zero_()
        else:
            del optimizer.state[parameter]


@torch.no_grad()
def average_state_(state: defaultdict[Tensor, dict], twins: Iterable[Twins], included: Sequence[bool]) -> int:
    """Average the tensors in the state over the included workers; the excluded ones take theirs over whole.

    Scalars (step counts) are left alone. A tensor that not every included worker has is left alone too:
    there is no mean of what does not exist yet.

    Returns:
        The bytes of one worker's state that were averaged.
    """
    num_bytes = 0
    for parameters in twins:
        donors = [state.get(p, {}) for p, counts in zip(parameters, included, strict=True) if counts]
        for key, first in donors[0].items():
            if not is_averaged(parameters[0], key, first):
                continue
            values = [v for v in (own.get(key) for own in donors) if isinstance(v, Tensor) and v.shape == first.shape]
            if len(values) == len(donors):
                mean = torch.stack(values).mean(dim=0)
                for value in values:
                    value.copy_(mean)
                num_bytes += first.nbytes
        for parameter, counts in zip(parameters, included, strict=True):
            if not counts and parameter in state:
                state[parameter] = copy.deepcopy(donors[0])
    return num_bytes
