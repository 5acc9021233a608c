"""A Config from the values of a file: names and kinds are checked here, ranges by Config itself."""

import difflib
import unicodedata
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastlocal.train.config import Config
from fastlocal.train.errors import UsageError

NOT_IN_A_FILE = {
    "seed": "give a study its `seeds`, and a search its `seed`, at the top of the file",
    "out": "the study names the folders",
    "resume": "a study always goes on",
    "download": "fetch the images with `fastlocal train --dataset cifar100 --download` first",
}
"""Fields that a file may not set, and what to do instead."""

_HINTS = get_type_hints(Config)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}


def config_from(values: Mapping[str, Any]) -> Config:
    """A Config of these fields; an absent one, or None where that is allowed, has its default.

    Raises:
        UsageError: no such field, not its kind, or out of range.
    """
    return Config(**{name: field_value(name, value) for name, value in values.items()})


def field_value(name: str, value: Any) -> Any:
    """The value as the field's own type.

    Raises:
        UsageError: there is no such field, or the value is not of its kind.
    """
    if name not in _HINTS:
        known = sorted({field.name for field in fields(Config)} - set(NOT_IN_A_FILE))
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        told = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}"
        raise UsageError(f"there is no field {name}; {told}")
    hint = _HINTS[name]
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif get_origin(option) is Literal:
            if value in get_args(option):
                return value
        elif type(value) is int and abs(value) >= 2**63:
            raise UsageError(f"--{name.replace('_', '-')} must be a number below 2^63, got {value}")
        elif option is float and type(value) in (int, float):
            return float(value)
        elif (
            option is Path
            and isinstance(value, str)
            and not any(unicodedata.category(letter) == "Cc" for letter in value)
        ):
            return Path(value)
        elif type(value) is option:
            return value
    wanted = " or ".join(_kind(option) for option in options if option is not type(None))
    raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, got {value!r}")


def _kind(option: Any) -> str:
    return ", ".join(get_args(option)) if get_origin(option) is Literal else _KINDS[option]
