"""A search file: what stays, what is searched and how. Runs nothing."""

import contextlib
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fastlocal.train.config import NOT_PART_OF_A_RUN, Config, Precision
from fastlocal.train.errors import UsageError
from fastlocal.train.study_file import base_table, folder_name, plain_name, read_toml, table
from fastlocal.train.values import config_from, field_value

_KEYS = {"name", "sampler", "objective", "trials", "seed", "base", "space"}
_RANGE_KEYS = {"low", "high", "log"}


@dataclass(frozen=True)
class Search:
    """A search file, read."""

    name: str
    sampler: Literal["tpe", "grid"]
    objective: Literal["best_val_accuracy", "val_accuracy"]
    trials: int
    seed: int
    base: dict[str, Any]  # fields that stay
    example: Config  # a run that it may make, for what is the same in all
    space: dict[str, BaseDistribution]  # fields that are searched


def load(
    path: Path, *, trials: int | None = None, epochs: int | None = None, precision: Precision | None = None
) -> Search:
    """Read a search file.

    Args:
        path: the TOML file.
        trials: instead of the file's.
        epochs: instead of the file's, for each trial.
        precision: likewise.

    Raises:
        UsageError: it cannot be read, or asks for something that cannot be; names the file.
    """
    content = read_toml(path)
    try:
        return _read(content, path.stem, trials, {"epochs": epochs, "precision": precision})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read(content: dict[str, Any], stem: str, trials: int | None, instead: dict[str, Any]) -> Search:
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        raise UsageError(f"there is no key {unknown[0]}; the keys are {', '.join(sorted(_KEYS))}")
    sampler, objective = content.get("sampler", "tpe"), content.get("objective", "best_val_accuracy")
    if sampler not in ("tpe", "grid"):
        raise UsageError(f"sampler must be tpe or grid, got {sampler!r}")
    if objective not in ("best_val_accuracy", "val_accuracy"):
        raise UsageError(f"objective must be best_val_accuracy or val_accuracy, got {objective!r}")
    space = {name: _distribution(name, value) for name, value in table(content, "space").items()}
    if not space:
        raise UsageError("it searches nothing: add a [space]")
    if sampler == "grid" and not all(isinstance(choice, CategoricalDistribution) for choice in space.values()):
        raise UsageError("the grid sampler needs a list for each field of [space]")
    count = content.get("trials", 20) if trials is None else trials
    seed = content.get("seed", 0)
    for name, value, least in (("trials", count, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
    base = base_table(content)
    instead = {name: value for name, value in instead.items() if value is not None}
    for name, value in instead.items():
        if name in space:
            raise UsageError(f"--{name} {value} has no use: [space] has {name}")
    base |= {"seed": seed, "test": False} | instead
    example = _example(base, space)
    name = plain_name("name", content.get("name", stem))
    asked = Search(name, sampler, objective, count, seed, base, example, space)
    names: dict[str, dict[str, Any]] = {}
    for params in grid(asked) if sampler == "grid" else ():
        try:
            config_from(base | params)
        except UsageError as error:
            raise UsageError(f"[space] ({folder_name(params)}): {error}") from None
        if (other := names.setdefault(folder_name(params), params)) != params:
            raise UsageError(f"[space]: {params} and {other} have the same folder: give values that differ sooner")
    return asked


def _example(base: dict[str, Any], space: dict[str, BaseDistribution]) -> Config:
    """[base] alone, where that is a run; else a combination of choices and bounds that is.

    Raises:
        UsageError: none of all, or of a thousand drawn, is one.
    """
    try:
        return config_from(base)
    except UsageError as error:
        why = error
    ends = [
        choice.choices if isinstance(choice, CategoricalDistribution) else (choice.low, choice.high)
        for choice in cast(dict[str, CategoricalDistribution | IntDistribution | FloatDistribution], space).values()
    ]
    if math.prod(map(len, ends)) <= 1000:
        combinations = itertools.product(*ends)
    else:
        draw = random.Random(0)
        combinations = (tuple(map(draw.choice, ends)) for _ in range(1000))
    for combination in combinations:
        with contextlib.suppress(UsageError):
            return config_from(base | dict(zip(space, combination, strict=True)))
    raise UsageError(f"no values of [space] that were tried make [base] a run, which by itself is none: {why}")


def _distribution(name: str, value: Any) -> BaseDistribution:
    """A list is a choice; {low, high, log} a range of the numbers' kind."""
    if name == "test":
        raise UsageError("[space]: test has no place here: a search never looks at the test images")
    if name in NOT_PART_OF_A_RUN:
        raise UsageError(f"[space]: {name} has no place here: it does not change what is trained")
    if isinstance(value, list) and value:
        choices = [field_value(name, choice) for choice in value]
        if len(set(choices)) < len(choices):
            raise UsageError(f"[space]: {name} must be different values, got {value!r}")
        return CategoricalDistribution(choices)
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= _RANGE_KEYS:
        raise UsageError(f"[space]: {name} must be a list or {{low = ..., high = ..., log = true}}, got {value!r}")
    try:
        low, high = field_value(name, value["low"]), field_value(name, value["high"])
    except UsageError as error:
        raise UsageError(f"[space]: low and high of {name}: {error}") from None
    log = value.get("log", False)
    if not (type(log) is bool and type(low) in (int, float) and low < high and high - low < math.inf) or (
        log and low <= 0
    ):
        raise UsageError(f"[space]: {name} must have low < high, finite, and low > 0 with log, got {value!r}")
    if type(low) is int:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def grid(asked: Search) -> list[dict[str, Any]]:
    """Every combination, in the order of the file."""
    choices = [cast(CategoricalDistribution, choice).choices for choice in asked.space.values()]
    return [dict(zip(asked.space, combination, strict=True)) for combination in itertools.product(*choices)]
