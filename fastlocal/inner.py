"""What the inner optimizer holds for each worker: gradients, and state such as momentum.

Parameters of the k workers that belong together are passed as one tuple, worker by worker.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

InnerState = Literal["keep", "reset", "average"]
"""What a sync does to the inner optimizer's state: leave it, zero it, or average it over the workers."""

Twins = tuple[nn.Parameter, ...]
"""One parameter of the model, in each worker."""


@torch.no_grad()
def average_gradients_(twins: Iterable[Twins]) -> None:
    """Give every worker the mean gradient. A worker without one counts as zero, unless nobody has one."""
    for parameters in twins:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            continue
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise RuntimeError("sparse gradients cannot be averaged: use dense ones, or warmup_steps=0")
        mean = gradients[0].clone()
        for gradient in gradients[1:]:
            mean.add_(gradient)
        mean.div_(len(parameters))
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = mean.clone()
            else:
                parameter.grad.copy_(mean)


@torch.no_grad()
def reset_state_(state: defaultdict[Tensor, dict], parameters: Iterable[Tensor]) -> None:
    """Zero the state of these parameters in place, step counts too: they start like new ones."""
    for parameter in parameters:
        own = state.get(parameter, {})
        for key, value in own.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                own[key] = type(value)(0)


@torch.no_grad()
def average_state_(state: defaultdict[Tensor, dict], twins: Iterable[Twins], included: Sequence[bool]) -> None:
    """Average the parameter-shaped state over the included workers; all workers take the mean.

    Scalars (step counts) are left alone. A tensor that not every included worker has is left alone too:
    there is no mean of what does not exist yet.
    """
    for parameters in twins:
        states = [state.get(p, {}) for p in parameters]
        donors = [own for own, counts in zip(states, included, strict=True) if counts]
        for key, first in donors[0].items():
            if not (isinstance(first, Tensor) and first.is_floating_point() and first.shape == parameters[0].shape):
                continue
            values = [own[key] for own in donors if isinstance(own.get(key), Tensor)]
            if len(values) < len(donors):
                continue
            mean = torch.stack(values).mean(dim=0)
            for own in states:
                if isinstance(own.get(key), Tensor):
                    own[key].copy_(mean)


def state_num_bytes(state: defaultdict[Tensor, dict], parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameter-shaped state that average_state_ averages, for one worker's parameters."""
    return sum(
        value.nbytes
        for parameter in parameters
        if parameter in state
        for value in state[parameter].values()
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
    )
