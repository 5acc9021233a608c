"""The wrappers' arguments: what is accepted, and the error for what is not."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from fastlocal.policy import FixedInterval, Policy, decides_alike, require_interval
from fastlocal.workers import Workers


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_steps(name: str, steps: object) -> None:
    """Raise TypeError or ValueError unless it is a whole number of at least 0."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"{name} must be an int, got {steps!r}")
    if steps < 0:
        raise ValueError(f"{name} must be at least 0, got {steps}")


def check_late_drift(policy: Policy, overlap_steps: int) -> None:
    """Raise ValueError unless a policy's class says that it does not read the drift, which is not known by then."""
    if overlap_steps and getattr(type(policy), "reads_drift", True) and not decides_alike(policy):
        raise ValueError(
            f"{type(policy).__name__} may decide from the drift of the last sync, which is not known yet with "
            f"overlap_steps={overlap_steps}: set that to 0, or reads_drift = False on a policy that does not read it"
        )


def check_model(model: object) -> None:
    """Raise TypeError unless it is a module or workers."""
    if not isinstance(model, (nn.Module, Workers)):
        raise TypeError(f"model must be an nn.Module or Workers, got {type(model).__name__}")


def check_wire_dtype(wire_dtype: object) -> None:
    """Raise TypeError or ValueError unless it is None, bfloat16 or float8_e4m3fn: float16 makes small steps 0."""
    if wire_dtype not in (None, torch.bfloat16, torch.float8_e4m3fn):
        kind = ValueError if isinstance(wire_dtype, torch.dtype) else TypeError
        raise kind(f"wire_dtype must be None, torch.bfloat16 or torch.float8_e4m3fn, got {wire_dtype!r}")


def checked_slow_lr(slow_lr: object) -> float:
    """The slow rate as a float, or TypeError or ValueError unless it is a positive, finite number."""
    value = as_float("slow_lr", slow_lr)
    if not 0 < value < math.inf:
        raise ValueError(f"slow_lr must be positive and finite, got {slow_lr}")
    return value


def checked_slow_momentum(slow_momentum: object) -> float:
    """The slow momentum as a float, or TypeError or ValueError unless it is a number in [0, 1)."""
    value = as_float("slow_momentum", slow_momentum)
    if not 0 <= value < 1:
        raise ValueError(f"slow_momentum must be in [0, 1), got {slow_momentum}")
    return value


def as_float(name: str, value: object) -> float:
    """The value as a float, or TypeError unless it is a number or a tensor of one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def policy_of(interval: int | Policy) -> Policy:
    """The policy that an interval stands for.

    Raises:
        TypeError: it is neither an int nor a whole policy.
        ValueError: it is below 1.
    """
    if isinstance(interval, type):
        raise TypeError(f"interval must be a policy, not its class: {interval.__name__}(...)")
    methods = ("next_interval", "state_dict", "load_state_dict")
    missing = [name for name in methods if not hasattr(interval, name)]
    if 0 < len(missing) < len(methods):
        raise TypeError(f"interval is a {type(interval).__name__} that lacks {' and '.join(missing)}")
    return interval if isinstance(interval, Policy) else FixedInterval(require_interval("interval", interval))


def plain_settings(policy: Policy) -> dict[str, Any]:
    """The numbers and strings among a policy's public attributes, under names that tell whose they are."""
    return {
        f"{type(policy).__name__}.{name}": value
        for name, value in getattr(policy, "__dict__", {}).items()
        if isinstance(value, (int, float, str)) and not name.startswith("_")
    }


def checked_weights(weights: Sequence[float], num_rows: int) -> tuple[float, ...]:
    """The weights, or TypeError or ValueError unless they are numbers, positive, finite and one a row."""
    if not hasattr(weights, "__len__"):
        raise TypeError(f"weights must be a sequence of numbers, one a worker, got {weights!r}")
    if len(weights) != num_rows:
        raise ValueError(f"weights must be one for each of {num_rows} workers, got {len(weights)}")
    values = tuple(as_float("each of weights", weight) for weight in weights)
    if not all(weight > 0 and math.isfinite(weight) for weight in values):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")
    return values
