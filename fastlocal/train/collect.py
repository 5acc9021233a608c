"""Find the runs below a folder and group them by their seeds. Reads only; draws nothing."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlocal.train.cells import STUDY
from fastlocal.train.errors import UsageError
from fastlocal.train.groups import Group, Run, grouped
from fastlocal.train.job import FAILED, last_error, log_of
from fastlocal.train.kinds import CELL, CONFIG, RECORD, STUDY_FILE, SUMMARY, wrong
from fastlocal.train.run_files import read_json, read_summary


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
    groups = grouped(runs, asked, diverged)
    return Collection(
        ", ".join(dict.fromkeys(titles)) or root.resolve().name, groups, unfinished + _left_out(runs, groups)
    )


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
    """A study's title, and what was replaced of the file."""
    title = study["title"] or study["name"]
    if study["epochs"] is not None:
        instead = sorted({cell["file_epochs"] for cell in study["cells"] if "file_epochs" in cell})
        title += f" ({study['epochs']} epochs instead of {', '.join(map(str, instead)) or 'its own'})"
    return title + (f" ({study['precision']})" if study.get("precision") else "")


def _with_budget(cell: dict[str, Any], study: dict[str, Any]) -> dict[str, Any]:
    """A cell of study.json, with the fields that older ones lack."""
    file_epochs = cell["config"]["epochs"] if study["epochs"] is None else None
    return {"file_epochs": file_epochs, "note": ""} | cell
