"""Find the runs below a folder and group them by their seeds. Reads only; draws nothing."""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastlocal.train.cells import STUDY
from fastlocal.train.config import NOT_PART_OF_A_RUN, Config
from fastlocal.train.errors import UsageError
from fastlocal.train.job import FAILED, last_error, log_of
from fastlocal.train.kinds import CELL, CONFIG, RECORD, STUDY_FILE, SUMMARY, wrong
from fastlocal.train.run_files import read_json, read_summary

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
    folders = list(_folders(root))
    found = {folder: _study(folder / STUDY) for folder in folders if (folder / STUDY).exists()}
    studies = {folder: study for folder, study in found.items() if study is not None}
    runs, unfinished, diverged = [], [], []
    for folder in folders:
        path = folder / "config.json"
        if not path.exists():
            continue
        name = _readable(folder.relative_to(root) if folder != root else folder.resolve().name)
        if (folder / "summary.json").exists():
            try:
                runs.append(_run(name, folder))
            except UsageError:
                if _config(path) is not None:  # else another tool's, as below
                    raise
        elif (config := _config(path)) is None:
            continue  # another tool's
        elif (folder / FAILED).exists():
            unfinished.append(Unfinished(name, "diverged", str(read_json(folder / FAILED).get("message", ""))))
            diverged.append(config)
        else:
            done = f"{len(_records(folder))} of {config['epochs']} epochs"
            broke = last_error(log_of(folder))
            state, message = ("started", done) if broke is None else ("broken", f"{done}: {broke}")
            unfinished.append(Unfinished(name, state, message))
    unfinished += [
        _never_begun(folder / cell["name"], root)
        for folder, study in studies.items()
        for cell in study["cells"]
        if not (folder / cell["name"] / "config.json").exists()
    ]
    asked = [_with_budget(cell, study) for study in studies.values() for cell in study["cells"]]
    if not runs and not unfinished:
        raise UsageError(f"there is no run below {root}")
    titles = [_title(study) for study in studies.values()]
    groups = _grouped(runs, asked, diverged)
    return Collection(", ".join(titles) or root.resolve().name, groups, unfinished + _left_out(runs, groups))


def _folders(root: Path) -> Iterator[Path]:
    """A folder and all below it, in order; links are followed, and none is entered twice."""

    def unless_below(error: OSError) -> None:
        if error.filename == str(root):
            raise UsageError(f"{root} cannot be read: {error.strerror}")

    seen = set()
    for folder, inner, _ in os.walk(root, onerror=unless_below, followlinks=True):
        inner.sort()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield Path(folder)


def _left_out(runs: list[Run], groups: list[Group]) -> list[Unfinished]:
    """Runs that do not count, as one of the same settings, images and seed does, and came to another result."""
    counted = [run for group in groups for run in group.runs]
    results = [_result(run) for run in counted]
    return [
        Unfinished(run.name, "left out", "another run of the same settings and seed counts, with another result")
        for run in runs
        if all(run is not other for other in counted) and _result(run) not in results
    ]


def _result(run: Run) -> list[Any]:
    return [
        run.summary[figure] for figure in ("test_accuracy", "best_val_accuracy", "bytes_on_wire", "interval_trace")
    ]


def _never_begun(folder: Path, root: Path) -> Unfinished:
    broke = last_error(log_of(folder))
    state, message = ("missing", "never started") if broke is None else ("broken", broke)
    return Unfinished(_readable(folder.relative_to(root)), state, message)


def _readable(path: Path | str) -> str:
    """A folder's name as a page can show it: bytes that are no UTF-8 replaced."""
    return str(path).encode(errors="replace").decode()


def _run(name: str, folder: Path) -> Run:
    summary = read_summary(folder, SUMMARY)
    return Run(name, summary["config"], summary, _records(folder))


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "records.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    for number, record in enumerate(records, start=1):
        if told := wrong(record, RECORD):
            raise UsageError(f"{path}, line {number}, is no record of an epoch: {told}")
    return records


def _config(path: Path) -> dict[str, Any] | None:
    """What a run's config.json holds; None if it is not a run's: other tools have files of that name."""
    try:
        content = read_json(path)
    except UsageError:
        if any((path.parent / name).exists() for name in (".lock", "checkpoint.pt", "records.jsonl")):
            raise
        return None
    if not {"method", "epochs", "policy"} <= content.keys():
        return None
    if told := wrong(content, CONFIG):
        raise UsageError(f"{path} is no config of a run: {told}")
    return content


def _study(path: Path) -> dict[str, Any] | None:
    """What a study.json holds; None if it is another tool's."""
    held = (path.parent / ".lock").exists()  # whoever makes one of ours holds its folder
    try:
        study = read_json(path)
    except UsageError:
        if held:
            raise
        return None
    if not held and not {"title", "cells"} & study.keys():
        return None
    told = wrong(study, STUDY_FILE)
    for number, cell in enumerate([] if told else study["cells"], start=1):
        told = told or wrong(cell, CELL, f"cell {number}")
    if told:
        raise UsageError(f"{path} is no study's: {told}")
    return study


def _title(study: dict[str, Any]) -> str:
    """A study's title, and its budget if that is not the file's."""
    title = study["title"] or study["name"]
    if study["epochs"] is None:
        return title
    instead = sorted({cell["file_epochs"] for cell in study["cells"] if "file_epochs" in cell})
    return f"{title} ({study['epochs']} epochs instead of {', '.join(map(str, instead)) or 'its own'})"


def _with_budget(cell: dict[str, Any], study: dict[str, Any]) -> dict[str, Any]:
    """A cell of study.json, with the fields that older ones lack."""
    file_epochs = cell["config"]["epochs"] if study["epochs"] is None else None
    return {"file_epochs": file_epochs, "note": ""} | cell


def _grouped(runs: list[Run], asked: list[dict[str, Any]], diverged: list[dict[str, Any]]) -> list[Group]:
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
