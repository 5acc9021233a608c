"""The learning rate as a function of the step: nothing to keep in a checkpoint."""

import math

from fastlocal.train.config import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, total_steps: int, warmup_steps: int) -> float:
    """The rate of step 0 … total_steps − 1.

    Args:
        schedule: which curve.
        peak: the highest rate.
        step: completed steps.
        total_steps: of the whole run.
        warmup_steps: steps of linear rise in "warmup-cosine", fewer than total_steps; the first one is already
            positive.
    """
    if schedule == "constant":
        return peak
    if schedule == "warmup-cosine":
        if step < warmup_steps:
            return peak * (step + 1) / (warmup_steps + 1)
        step, total_steps = step - warmup_steps, total_steps - warmup_steps
    return 0.5 * peak * (1 + math.cos(math.pi * step / total_steps))
