"""Run the cells of a study: some at a time, each in a process of its own, going on where they stand."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastlocal.train import report
from fastlocal.train.config import Config
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.job import FAILED
from fastlocal.train.study import Cell, Study

State = Literal["new", "started", "running", "finished", "diverged", "broken"]
STUDY = "study.json"
"""In a study's folder: the cells it asks for."""
_POLL_SECONDS = 0.1


@dataclass
class Place:
    """A cell and how far it is."""

    cell: Cell
    config: Config  # with the folder, the threads and the images' place
    state: State
    message: str = ""  # why it diverged or broke
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.config.folder

    @property
    def log(self) -> Path:
        """What the run's process printed."""
        return self.folder.parent / f"{self.folder.name}.log"

    def epochs_done(self) -> int:
        """Finished epochs, from the run's own records."""
        try:
            with (self.folder / "records.jsonl").open("rb") as file:
                return sum(1 for _ in file)
        except FileNotFoundError:
            return 0


def places(
    study: Study, root: Path, *, data_dir: Path | None, threads: int | None, device: str | None, retry: bool
) -> list[Place]:
    """Where every cell stands. Writes nothing.

    Raises:
        UsageError: a folder holds another run.
    """
    found = []
    for cell in study.cells:
        config = replace(
            cell.config,
            out=root / cell.name,
            resume=True,
            data_dir=data_dir or cell.config.data_dir,
            threads=threads or cell.config.threads,
            device=device or cell.config.device,
        )
        state, message = _look(config, retry)
        found.append(Place(cell, config, state, message))
    return found


def _look(config: Config, retry: bool) -> tuple[State, str]:
    folder = config.folder
    if not (folder / "config.json").exists():
        return "new", ""
    differences = config.differences(report.read_json(folder / "config.json"))
    if differences:
        raise UsageError(f"{folder} holds another run: {', '.join(differences)}; choose another --out")
    if (folder / "summary.json").exists():
        return "finished", ""
    if (folder / FAILED).exists() and not retry:
        return "diverged", str(report.read_json(folder / FAILED).get("message", ""))
    return "started", ""


def begin(study: Study, root: Path) -> None:
    """Make the study's folder and write down what it asks for.

    Raises:
        UsageError: the folder cannot be used, or holds the study at another number of epochs.
    """
    path = root / STUDY
    if path.exists():
        saved = report.read_json(path)
        now = {"name": study.name, "epochs": study.epochs}
        for what in now:
            if saved.get(what) != now[what]:
                raise UsageError(
                    f"{root} holds the study with {what} {saved.get(what)}, not {now[what]}: choose another --out"
                )
    try:
        root.mkdir(parents=True, exist_ok=True)
        report.write_json(path, as_json(study))
    except OSError as error:
        raise UsageError(f"--out {root} cannot be made: {error.strerror}") from None
    except RunError as error:
        raise UsageError(str(error)) from None


def as_json(study: Study) -> dict[str, Any]:
    """What study.json holds."""
    return {
        "name": study.name,
        "title": study.title,
        "epochs": study.epochs,
        "cells": [
            {"name": cell.name, "group": cell.group, "original": cell.original, "config": cell.config.as_dict()}
            for cell in study.cells
        ],
    }


def run_all(waiting: Sequence[Place], parallel: int, on_change: Callable[[], None]) -> None:
    """Run new and started cells, `parallel` at a time, until each is finished, diverged or broken.

    Args:
        waiting: the cells; their state and message change on the way.
        parallel: processes at a time, at least 1.
        on_change: called some times a second.

    However this ends, no process is left: each ends when this one does, killed or not.
    """
    queue = [place for place in waiting if place.state in ("new", "started")]
    running: list[Place] = []
    try:
        while queue or running:
            while queue and len(running) < parallel:
                running.append(_start(queue.pop(0)))
            time.sleep(_POLL_SECONDS)
            for place in [place for place in running if _ended(place)]:
                running.remove(place)
            on_change()
    finally:
        for place in running:
            _stop(place)


def _start(place: Place) -> Place:
    if (place.folder / FAILED).exists():  # a diverged run tried again: from the beginning
        for name in ("checkpoint.pt", "records.jsonl", FAILED):
            (place.folder / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "fastlocal.train.job", json.dumps(place.config.as_dict())]
    with place.log.open("ab") as log:
        place.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    place.state = "running"
    return place


def _ended(place: Place) -> bool:
    assert place.process
    code = place.process.poll()
    if code is None:
        return False
    assert place.process.stdin
    place.process.stdin.close()
    if (place.folder / FAILED).exists():
        place.state, place.message = "diverged", str(report.read_json(place.folder / FAILED)["message"])
    elif code == 0:
        place.state = "finished"
    else:
        lines = [line for line in place.log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}, see {place.log}"
        place.state, place.message = "broken", lines[-1].removeprefix("error: ") if lines and code == 2 else ended
    return True


def _stop(place: Place) -> None:
    """End a process that is still at work; it goes on from its checkpoint the next time."""
    assert place.process
    place.process.kill()
    place.process.wait()
    assert place.process.stdin
    place.process.stdin.close()
    place.state = "started"
