"""Whether a saved state has the form of the present one: said before anything of it is taken."""

from typing import Any

from torch import Tensor


def require_form(saved: Any, present: Any, where: str) -> None:
    """Raise ValueError, naming the place, unless `saved` could stand where `present` stands.

    Dicts have the same keys, tensors the same shape, lists members of one kind; a number stands for a number, and
    for None where a figure is not known yet.

    Args:
        saved: from a state dict.
        present: what state_dict() gives now.
        where: the path to both, for the error.
    """
    if isinstance(present, dict):
        _require(isinstance(saved, dict), saved, where, "a dict")
        for key in present.keys() ^ saved.keys():
            raise ValueError(f"state_dict: {where} {'lacks' if key in present else 'has the unknown'} {key!r}")
        for key, value in present.items():
            require_form(saved[key], value, f"{where}[{key!r}]")
    elif isinstance(present, Tensor):
        fits = isinstance(saved, Tensor) and saved.shape == present.shape
        _require(fits, saved, where, f"a tensor of shape {tuple(present.shape)}")
    elif isinstance(present, list):
        _require(isinstance(saved, list), saved, where, "a list")
        if any(isinstance(value, dict) for value in present):
            _require(len(saved) == len(present), saved, where, f"a list of {len(present)}")
            for index, (theirs, own) in enumerate(zip(saved, present, strict=True)):
                require_form(theirs, own, f"{where}[{index}]")
        else:
            _require(all(map(_is_number, saved)), saved, where, "a list of numbers")
    elif isinstance(present, str):
        _require(isinstance(saved, str), saved, where, "a string")
    elif isinstance(present, bool):
        _require(isinstance(saved, bool), saved, where, "True or False")
    elif present is None:
        _require(saved is None or _is_number(saved), saved, where, "a number or None")
    else:
        _require(_is_number(saved), saved, where, "a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(holds: bool, saved: Any, where: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"state_dict: {where} must be {rule}, got {str(saved)[:60]}")
