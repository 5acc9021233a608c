"""Runs in processes of their own, some at a time: started, watched, and never left behind."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fastlocal.train import run_files
from fastlocal.train.config import Config
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.job import FAILED, last_error, log_of, note_error

State = Literal["new", "started", "running", "finished", "diverged", "broken"]
_POLL_SECONDS = 0.1
_PACKAGES = str(Path(__file__).parents[2])
"""Where fastlocal was imported from, a checkout or an installation."""


@dataclass
class Place:
    """A run, where it is kept, and how far it is."""

    config: Config  # with the folder, the threads and the images' place
    state: State
    message: str = ""  # why it diverged or broke
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.config.folder

    @property
    def log(self) -> Path:
        """What the run's process printed."""
        return log_of(self.folder)

    def epochs_done(self) -> int:
        """Finished epochs, from the run's own records."""
        try:
            with (self.folder / "records.jsonl").open("rb") as file:
                return sum(1 for _ in file)
        except FileNotFoundError:
            return 0


def placed(
    config: Config, data_dir: Path | None, device: str | None, threads: int | None, default_threads: int | None = None
) -> Config:
    """The same run, where the command line wants it to be made; `default_threads` where neither says how many."""
    return replace(
        config,
        data_dir=data_dir or config.data_dir,
        device=device or config.device,
        threads=threads or config.threads or default_threads,
    )


def find(config: Config, *, retry: bool = False) -> Place:
    """Where a run stands. Writes nothing.

    Args:
        config: the run, with its folder.
        retry: a run that diverged is to be started again.

    Raises:
        UsageError: the folder holds another run, or cannot be read.
    """
    folder = config.folder
    if folder.parent.is_file():
        raise UsageError(f"{folder.parent} cannot be used: it is a file")
    try:
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise UsageError(f"{folder} cannot be used: {error.strerror}") from None
    broke = last_error(log_of(folder))
    if "config.json" not in present:
        return Place(config, "new") if broke is None else Place(config, "broken", broke)
    differences = config.differences(run_files.read_json(folder / "config.json"))
    if differences:
        raise UsageError(f"{folder} holds another run: {', '.join(differences)}; choose another --out")
    if "summary.json" in present:
        return Place(config, "finished")
    if FAILED in present:
        message = str(run_files.read_json(folder / FAILED).get("message", ""))
        return Place(config, "started") if retry else Place(config, "diverged", message)
    return Place(config, "started") if broke is None else Place(config, "broken", broke)


def run_all(waiting: Iterable[Place], parallel: int, on_change: Callable[[list[Place]], None]) -> None:
    """Run new, started and broken places, `parallel` at a time, until each is finished, diverged or broken.

    Args:
        waiting: the places; the next is asked for when a process is free. Their state and message change on the way.
        parallel: processes at a time, at least 1.
        on_change: called some times a second with the places that ended since, before the next is asked for.

    However this ends, no process is left: each ends when this one does, killed or not.
    """
    queue = (place for place in waiting if place.state in ("new", "started", "broken"))
    running: list[Place] = []
    try:
        while True:
            for place in itertools.islice(queue, parallel - len(running)):
                running.append(_start(place))
            if not running:
                return
            time.sleep(_POLL_SECONDS)
            ended = [place for place in running if _ended(place)]
            for place in ended:
                running.remove(place)
            on_change(ended)
    finally:
        for place in running:
            _stop(place)


def _start(place: Place) -> Place:
    if (place.folder / FAILED).exists():  # a diverged run tried again: from the beginning
        for name in ("checkpoint.pt", "records.jsonl", FAILED):
            (place.folder / name).unlink(missing_ok=True)
    # Not the current folder's modules: only what this process itself was imported from.
    command = [sys.executable, "-P", "-m", "fastlocal.train.job", json.dumps(place.config.as_dict())]
    path = os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    try:
        log = place.log.open("ab", buffering=0)
        log.write(b"process started\n")  # an error above it is of an earlier one
    except OSError as error:
        raise RunError(f"{place.log} cannot be written: {error.strerror}") from None
    with log:
        place.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
    place.state, place.message = "running", ""
    return place


def _ended(place: Place) -> bool:
    assert place.process
    code = place.process.poll()
    if code is None:
        return False
    assert place.process.stdin
    place.process.stdin.close()
    if (place.folder / FAILED).exists():
        place.state, place.message = "diverged", str(run_files.read_json(place.folder / FAILED)["message"])
    elif code == 0:
        place.state = "finished"
    else:
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}, see {place.log}"
        said = last_error(place.log)
        if said is None:
            note_error(place.log, ended)
        place.state, place.message = "broken", (code == 2 and said) or ended
    return True


def _stop(place: Place) -> None:
    """End a process that is still at work; it goes on from its checkpoint the next time."""
    assert place.process
    place.process.kill()
    place.process.wait()
    assert place.process.stdin
    place.process.stdin.close()
    place.state = "started"
