"""Runs that differ in their seed alone, and what a figure of theirs is over the seeds."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastlocal.train.config import NOT_PART_OF_A_RUN, Config
from fastlocal.train.errors import UsageError

_SPLITS = {
    "official": "CIFAR-100, official split",
    "re-split": "CIFAR-100, re-split",
    "other": "CIFAR-100, not the official files",
    None: "CIFAR-100, split not recorded",
}


@dataclass(frozen=True)
class Run:
    """A finished run, as its files tell it."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds: mean and sample standard deviation (None for one seed)."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]
    original: dict[str, float] = field(default_factory=dict)
    original_epochs: int | None = None  # that its figures are of; None where that was not recorded
    note: str = ""  # what must be known of them
    diverged: set[int] = field(default_factory=set)  # seeds that left no run

    @property
    def config(self) -> dict[str, Any]:
        """Of the first run; all have the same but for the seed."""
        return self.runs[0].config

    @property
    def images(self) -> str:
        """What the runs trained on, as a reader must know it."""
        if self.config["dataset"] == "synthetic":
            return "synthetic images"
        source = self.runs[0].summary.get("images", {}).get("source")
        return _SPLITS.get(source, f"CIFAR-100, {source}")

    def spread(self, figure: str) -> Spread | None:
        """A figure of the summaries; None where no run has it."""
        values = [run.summary[figure] for run in self.runs if run.summary.get(figure) is not None]
        return Spread.of(values) if values else None


def grouped(runs: list[Run], asked: list[dict[str, Any]], diverged: list[dict[str, Any]]) -> list[Group]:
    """Runs of one config but for the seed, of the same images, in the order of the studies, then of the folders.

    One that diverged did not record its images: it counts beside all groups of its config.
    """
    cells: dict[str, dict[str, Any]] = {}
    for cell in asked:  # of those that are one run, the first that has the original's figures
        given = cell["config"]
        for values in (given, given | _defaults(given)):  # older runs did not record the second
            key = _key(values)
            if key not in cells or (cell["original"] and not cells[key]["original"]):
                cells[key] = cell
    order = {key: position for position, key in enumerate(cells)}
    groups: dict[tuple[str, str], Group] = {}
    for run in runs:
        key = _key(_values(run))
        group = groups.setdefault((key, str(run.summary.get("images"))), _new_group(run, cells.get(key)))
        # Two studies may have made the same run: it counts once.
        if all(run.config["seed"] != other.config["seed"] for other in group.runs):
            group.runs.append(run)
    for config in diverged:
        keys = {_key(config), _key(config | _defaults(config))}  # older runs did not record the second
        for (key, _), group in groups.items():
            if key in keys and all(config["seed"] != run.config["seed"] for run in group.runs):
                group.diverged.add(config["seed"])
    ordered = [groups[key] for key in sorted(groups, key=lambda key: order.get(key[0], len(order)))]
    for alike in _by_name(ordered):
        _tell_apart(alike)
    return ordered


def _new_group(run: Run, cell: dict[str, Any] | None) -> Group:
    if cell is None:
        return Group(run.name.removesuffix(f"-s{run.config['seed']}"), [])
    return Group(cell["group"], [], cell["original"], cell["file_epochs"], cell["note"])


def _by_name(groups: list[Group]) -> list[list[Group]]:
    return [[group for group in groups if group.name == name] for name in {group.name for group in groups}]


def _tell_apart(groups: list[Group]) -> None:
    """Groups of the same name, as one study at two budgets has them, get what sets them apart into their names."""
    settings = [json.loads(_key(_values(group.runs[0]))) for group in groups]
    differing = [name for name in settings[0] if len({repr(own.get(name)) for own in settings}) > 1]
    several_images = len({group.images for group in groups}) > 1
    for group, own in zip(groups, settings, strict=True):
        parts = [f"{name} {own.get(name)}" for name in differing] + [group.images] * several_images
        group.name = ", ".join([group.name, *parts])


def _values(run: Run) -> dict[str, Any]:
    """What a run was given, and what its defaults came to where it recorded that."""
    return run.config | run.summary.get("resolved", {})


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the defaults of a cell come to today."""
    known = {field.name: config.get(field.name, field.default) for field in fields(Config)}
    try:
        return Config(**known).resolved()
    except (UsageError, TypeError, KeyError):  # of a version that took other values
        return {}


def alike_but_for(group: Group, *names: str) -> str:
    """What groups share that differ in these settings alone; a default is what it comes to, but for those that
    follow the rate."""
    resolved = {name: value for name, value in _values(group.runs[0]).items() if name not in ("lr", "qsr_alpha")}
    return _key(group.config | resolved, *names) + group.images


def _key(config: dict[str, Any], *but: str) -> str:
    """What two runs share that differ in their seed, and perhaps in some settings, alone."""
    whole = Config().as_dict() | config  # a field younger than the run had its default
    rest = {name: value for name, value in whole.items() if name not in (*NOT_PART_OF_A_RUN, "seed", *but)}
    return json.dumps(rest, sort_keys=True)
