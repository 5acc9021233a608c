"""A study file: which runs it asks for, and where each is kept. Runs nothing."""

import fnmatch
import itertools
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastlocal.train.config import NOT_PART_OF_A_RUN, Config, Precision
from fastlocal.train.errors import UsageError
from fastlocal.train.values import NOT_IN_A_FILE, config_from, field_value

FIGURES = {"test_accuracy": 100, "best_val_accuracy": 100, "communication_reduction": 1}
"""What an original study may have reported, from 0 to this: two in percent, one as a fraction."""

_LONGEST_NAME = 240
"""Bytes of a folder's name, with room for an ending."""
_KEYS = {"name", "title", "seeds", "base", "grid", "cells", "original"}
_SHORT = {
    "workers": "k",
    "interval": "j",
    "batch_size": "b",
    "lr": "lr",
    "weight_decay": "wd",
    "momentum": "m",
    "overlap_steps": "overlap",
}
SQRT_RATE = "lr_at_batch_64"
"""A key that is no field: the rate at a batch of 64, which grows with the square root of the batch."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str  # of its folder
    group: str  # the name without the seed: what is averaged over
    config: Config
    file_epochs: int  # the file's own, which the original's figures are of
    original: dict[str, float]  # what the original study reported; some of FIGURES
    note: str = ""  # what must be known of the original's figures


@dataclass(frozen=True)
class Study:
    """A study file, read."""

    name: str
    title: str
    epochs: int | None  # what --epochs replaced the file's own with
    precision: Precision | None  # likewise --precision
    cells: tuple[Cell, ...]


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        UsageError: it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        # No UTF-8, no TOML, or a number or a nesting beyond Python's limits.
        raise UsageError(f"{path} is no TOML file: {error}") from None


def load(
    path: Path, *, epochs: int | None = None, precision: Precision | None = None, only: Sequence[str] = ("*",)
) -> Study:
    """Read a study file and build every cell's Config.

    Args:
        path: the TOML file.
        epochs: instead of the epochs in the file, for all cells.
        precision: instead of the file's, likewise.
        only: the names of the cells that are wanted, as patterns with * and ?. Of the others those are left out that
            are no valid run, or another's, with these epochs and this precision.

    Raises:
        UsageError: it cannot be read, or a cell is no valid run; names the file and the cell.
    """
    content = read_toml(path)
    try:
        return _study(content, path.stem, epochs, precision, only)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def folder_of(name: str, epochs: int | None, precision: Precision | None) -> str:
    """A folder of its own for each thing that was replaced: "headline-20-epochs-fp32"."""
    return name + (f"-{epochs}-epochs" if epochs is not None else "") + (f"-{precision}" if precision else "")


def is_wanted(cell: Cell, only: Sequence[str]) -> bool:
    """Whether its name fits one of the patterns, with * and ?."""
    return any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in only)


def _study(
    content: dict[str, Any], stem: str, epochs: int | None, precision: Precision | None, only: Sequence[str]
) -> Study:
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        raise UsageError(f"there is no key {unknown[0]}; the keys are {', '.join(sorted(_KEYS))}")
    name, title = plain_name("name", content.get("name", stem)), content.get("title", "")
    if not isinstance(title, str):
        raise UsageError(f"title must be a string, got {title!r}")
    seeds = content.get("seeds", [0])
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)) or len(set(seeds)) < len(
        seeds
    ):
        raise UsageError(f"seeds must be a list of different whole numbers, got {seeds!r}")
    base = base_table(content)
    cells: list[Cell] = []
    for group, overrides, where in _combinations(content):
        for seed in seeds:
            cell_name = f"{group}-s{seed}"
            try:
                config = config_from(with_rate(base | overrides) | {"seed": seed})
                cells.append(Cell(cell_name, group, config, config.epochs, {}))
            except UsageError as error:
                raise UsageError(f"{where} ({group}): {error}") from None
    if not cells:
        raise UsageError("it has no cells: add a [grid] or [[cells]]")
    _require_names([cell.name for cell in cells])
    _require_different(cells, "")
    cells = _with_original(cells, content.get("original", []))
    given = [f"--{key} {value}" for key, value in (("epochs", epochs), ("precision", precision)) if value is not None]
    if given:
        cells = _replaced(cells, epochs, precision, only)
        _require_different(cells, f" at {' '.join(given)}")
    return Study(name, title, epochs, precision, tuple(cells))


def _require_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two cells have the name {name}")
        try:
            size = len(os.fsencode(name))
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise UsageError(f"a cell's name must be one that files can have here ({encoding}), got {name}") from None
        if size > _LONGEST_NAME:
            raise UsageError(f"a cell's name must have at most {_LONGEST_NAME} bytes, got {name}")


def _require_different(cells: Sequence[Cell], at: str) -> None:
    made: dict[frozenset[tuple[str, Any]], str] = {}
    for cell in cells:
        other = made.setdefault(_comes_to(cell.config), cell.name)
        if other != cell.name:
            raise UsageError(f"the cells {other} and {cell.name} are the same run{at}: leave one of them out")


def _replaced(
    cells: Sequence[Cell], epochs: int | None, precision: Precision | None, only: Sequence[str]
) -> list[Cell]:
    """The cells with these epochs and this precision, but for those not wanted that are no run then, or another's."""
    by_name: dict[str, Cell] = {}
    made: set[frozenset[tuple[str, Any]]] = set()
    wanted = {cell.name for cell in cells if is_wanted(cell, only)}
    for cell in sorted(cells, key=lambda cell: cell.name not in wanted):
        try:
            config = replace(
                cell.config,
                epochs=cell.file_epochs if epochs is None else epochs,
                precision=precision or cell.config.precision,
            )
        except UsageError as error:
            if cell.name in wanted:
                raise UsageError(f"{cell.name}: {error}") from None
            continue
        run = _comes_to(config)
        if cell.name in wanted or run not in made:
            by_name[cell.name] = replace(cell, config=config)
            made.add(run)
    return [by_name[cell.name] for cell in cells if cell.name in by_name]


def _comes_to(config: Config) -> frozenset[tuple[str, Any]]:
    """What makes a run another run, defaults resolved; the folder of its images too, for they may be others."""
    values = vars(config) | config.resolved()
    return frozenset(
        (name, value) for name, value in values.items() if name == "data_dir" or name not in NOT_PART_OF_A_RUN
    )


def _combinations(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each cell's name, what it sets beyond the base, and its table: the grid's product, then the cells'."""
    grid = table(content, "grid")
    if grid:
        for key, value in grid.items():
            if not isinstance(value, list):
                raise UsageError(f"[grid]: {key} must be a list, got {value!r}; put single values in [base]")
        yield from ((folder_name(overrides), overrides, "[grid]") for overrides in _product(grid, "[grid]"))
    cells = content.get("cells", [])
    if not (isinstance(cells, list) and all(isinstance(cell, dict) for cell in cells)):
        raise UsageError("cells must be tables: [[cells]]")
    for index, cell in enumerate(cells):
        where = f"cell {index + 1}"
        _refuse(cell, where)
        values = {key: value for key, value in cell.items() if key != "name"}
        for overrides in _product(values, where):
            if "name" not in cell:
                yield folder_name(overrides), overrides, where
                continue
            plain_name(f"{where}: name", cell["name"])
            varied = {key: value for key, value in overrides.items() if isinstance(cell[key], list)}
            yield folder_name({"name": cell["name"]} | varied), overrides, where


def _product(values: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    choices = [value if isinstance(value, list) else [value] for value in values.values()]
    for key, choice in zip(values, choices, strict=True):
        if not choice:
            raise UsageError(f"{where}: {key} is an empty list")
    for combination in itertools.product(*choices):
        yield dict(zip(values, combination, strict=True))


def plain_name(what: str, value: Any) -> str:
    """The value, if it can be a folder's name; UsageError if not."""
    if not (isinstance(value, str) and value.isprintable() and value.strip(" .") and "/" not in value):
        raise UsageError(f"{what} must be a string that can be a folder's name, got {value!r}")
    return value


def table(content: dict[str, Any], key: str) -> dict[str, Any]:
    """A table of fields; UsageError if it is none, or holds what a file may not say."""
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{key} must be a table: [{key}]")
    _refuse(value, f"[{key}]")
    return value


def base_table(content: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a file share; UsageError if there is no such field or a value is not of its kind."""
    base = table(content, "base")
    for key, value in base.items():
        try:
            if key != SQRT_RATE:
                field_value(key, value)
        except UsageError as error:
            raise UsageError(f"[base]: {error}") from None
    return base


def _refuse(values: dict[str, Any], where: str) -> None:
    for key in values:
        if key in NOT_IN_A_FILE:
            raise UsageError(f"{where}: {key} has no place here: {NOT_IN_A_FILE[key]}")


def with_rate(values: dict[str, Any]) -> dict[str, Any]:
    """The values, `lr_at_batch_64` turned into the rate: lr = it · √(batch_size / 64)."""
    if SQRT_RATE not in values:
        return values
    rest = {key: value for key, value in values.items() if key != SQRT_RATE}
    if "lr" in rest:
        raise UsageError(f"lr and {SQRT_RATE} say the same thing: give one of them")
    rate = values[SQRT_RATE]
    if type(rate) not in (int, float) or not 0 < rate <= sys.float_info.max:
        raise UsageError(f"{SQRT_RATE} must be a positive and finite number, got {rate!r}")
    config = config_from(rest)  # refuses a wrong batch first
    return rest | {"lr": rate * (config.batch_size / 64) ** 0.5}


def folder_name(overrides: dict[str, Any]) -> str:
    """A readable name of what a cell sets, in the order of the file: "slowmo-k2-j32"."""
    parts = []
    for key, value in overrides.items():
        if isinstance(value, str):
            parts.append(value)
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{_SHORT.get(key, key.replace('_', '-') + '-')}{text}")
    name = "-".join(parts) or "base"
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)


def _with_original(cells: list[Cell], tables: Any) -> list[Cell]:
    """The cells with what the original study reported for them."""
    if not (isinstance(tables, list) and all(isinstance(entry, dict) for entry in tables)):
        raise UsageError(f"original must be tables, [[original]], got {tables!r}")
    for index, entry in enumerate(tables):
        try:
            cells = _reported(cells, entry)
        except UsageError as error:
            raise UsageError(f"original {index + 1}: {error}") from None
    return cells


def _reported(cells: list[Cell], entry: dict[str, Any]) -> list[Cell]:
    """The cells, one table of the original's figures added to those that it is about."""
    where, note = entry.get("where", {}), entry.get("note", "")
    if not isinstance(where, dict):
        raise UsageError(f"where must be a table of fields, {{ workers = 2 }}, got {where!r}")
    if not isinstance(note, str):
        raise UsageError(f"note must be a string, got {note!r}")
    figures = {key: value for key, value in entry.items() if key not in ("where", "note")}
    for key, value in figures.items():
        if key not in FIGURES:
            raise UsageError(f"{key} = {value!r}: it may hold where, note and the numbers {', '.join(FIGURES)}")
        if type(value) not in (int, float) or not 0 <= value <= FIGURES[key]:
            raise UsageError(f"{key} must be a number from 0 to {FIGURES[key]}, got {value!r}")
    if not figures:
        raise UsageError(f"it has no figure: give one of {', '.join(FIGURES)}")
    for key in where:
        if key == "seed" or key in NOT_PART_OF_A_RUN:
            raise UsageError(f"where: {key} has no place here: the figures are of a setting, whatever its {key}")
    wanted = {key: field_value(key, value) for key, value in where.items()}
    found = [cell for cell in cells if wanted.items() <= (vars(cell.config) | cell.config.resolved()).items()]
    if not found:
        raise UsageError(f"no cell is {where}")
    return [
        replace(cell, original=cell.original | figures, note=f"{cell.note} {note}".strip()) if cell in found else cell
        for cell in cells
    ]
