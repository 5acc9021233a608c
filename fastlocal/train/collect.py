"""Find the runs below a folder and group them by their seeds. Reads only; draws nothing."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlocal.train.cells import STUDY
from fastlocal.train.config import NOT_PART_OF_A_RUN
from fastlocal.train.errors import UsageError
from fastlocal.train.job import FAILED
from fastlocal.train.report import read_json


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
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]
    original: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Of the first run; all have the same but for the seed."""
        return self.runs[0].config

    def spread(self, figure: str) -> Spread | None:
        """A figure of the summaries; None where no run has it."""
        values = [run.summary[figure] for run in self.runs if run.summary.get(figure) is not None]
        return Spread.of(values) if values else None


@dataclass(frozen=True)
class Unfinished:
    """A cell without a result."""

    name: str
    state: str
    message: str


@dataclass(frozen=True)
class Collection:
    """All that lies below a folder."""

    title: str
    groups: list[Group]
    unfinished: list[Unfinished]


def collect(root: Path) -> Collection:
    """Read every run below a folder, and what its studies asked for.

    Raises:
        UsageError: there is no run, or a file cannot be read.
    """
    studies = {path.parent: read_json(path) for path in sorted(root.rglob(STUDY))}
    runs, unfinished = [], []
    for path in sorted(root.rglob("config.json")):
        folder = path.parent
        name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
        if (folder / "summary.json").exists():
            runs.append(_run(name, folder))
        elif (folder / FAILED).exists():
            unfinished.append(Unfinished(name, "diverged", str(read_json(folder / FAILED).get("message", ""))))
        else:
            epochs = read_json(path).get("epochs")
            unfinished.append(Unfinished(name, "started", f"{len(_records(folder))} of {epochs} epochs"))
    unfinished += [
        Unfinished(str((folder / cell["name"]).relative_to(root)), "missing", "never started")
        for folder, study in studies.items()
        for cell in study["cells"]
        if not (folder / cell["name"] / "config.json").exists()
    ]
    asked = [cell for study in studies.values() for cell in study["cells"]]
    if not runs and not unfinished:
        raise UsageError(f"there is no run below {root}")
    titles = [study["title"] or study["name"] for study in studies.values()]
    return Collection(", ".join(titles) or root.resolve().name, _grouped(runs, asked), unfinished)


def _run(name: str, folder: Path) -> Run:
    summary = read_json(folder / "summary.json")
    if "config" not in summary or "communication_reduction" not in summary:
        raise UsageError(f"{folder / 'summary.json'} is no summary of a run")
    return Run(name, summary["config"], summary, _records(folder))


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "records.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _grouped(runs: list[Run], asked: list[dict[str, Any]]) -> list[Group]:
    """Runs of one config but for the seed, in the order of the studies, then of the folders."""
    cells = {_key(cell["config"]): cell for cell in reversed(asked)}
    groups: dict[str, Group] = {}
    for run in runs:
        key = _key(run.config)
        if key not in groups:
            cell = cells.get(key)
            bare = run.name.removesuffix(f"-s{run.config['seed']}")
            groups[key] = Group(cell["group"] if cell else bare, [], cell["original"] if cell else {})
        # Two studies may have made the same run: it counts once.
        if all(run.config["seed"] != other.config["seed"] for other in groups[key].runs):
            groups[key].runs.append(run)
    order = {key: position for position, key in enumerate(dict.fromkeys(_key(cell["config"]) for cell in asked))}
    return [groups[key] for key in sorted(groups, key=lambda key: order.get(key, len(order)))]


def _key(config: dict[str, Any]) -> str:
    """What two runs share that differ in their seed alone."""
    rest = {name: value for name, value in config.items() if name not in (*NOT_PART_OF_A_RUN, "seed")}
    return json.dumps({"test": True} | rest, sort_keys=True)
