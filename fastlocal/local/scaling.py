"""A step under torch.amp.GradScaler, which hands a wrapper its scale and whether a gradient overflowed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlocal import comm


class Scaling:
    """What GradScaler has left on an optimizer for the step under way.

    Args:
        optimizer: the wrapper that GradScaler calls.
        agree: makes one flag of those of all processes that hold pieces of one worker: they step together.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, agree: Callable[[Tensor], Tensor]) -> None:
        self.grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self.found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if self.found_inf is not None:
            self.found_inf = agree(self.found_inf)

    def overflowed(self) -> bool:
        """Whether a gradient is not finite; reads from the device, as GradScaler does."""
        return self.found_inf is not None and bool(self.found_inf.item())

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, unless that was done already."""
        if self.grad_scale is None:
            return
        inverse = self.grad_scale.double().reciprocal().float()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = comm.held_here(parameter.grad)
                    gradient.mul_(inverse.to(gradient.device))

    def step(self, inner: torch.optim.Optimizer) -> Any:
        """The inner step, skipped if a gradient overflowed."""
        if self.found_inf is None:
            return inner.step()
        if getattr(inner, "_step_supports_amp_scaling", False):
            scaled: Any = inner
            scaled.grad_scale, scaled.found_inf = self.grad_scale, self.found_inf
            try:
                return inner.step()
            finally:
                del scaled.grad_scale, scaled.found_inf
        if self.overflowed():
            return None
        self.unscale_(inner)
        return inner.step()
