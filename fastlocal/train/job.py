"""One run in a process of its own: `python -m fastlocal.train.job`, started by a study.

The config comes as JSON in the first argument. Standard input is a pipe that the study holds open: when it
closes, the study is gone, and so is this process, whatever ended the study.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console

from fastlocal.train import run_files
from fastlocal.train.display import Display
from fastlocal.train.errors import RunDivergedError, RunError, UsageError, of_the_machine
from fastlocal.train.run import run
from fastlocal.train.tables import print_whatever_comes
from fastlocal.train.values import config_from

FAILED = "failed.json"
"""In the folder of a run that diverged: its message."""

_ERROR = "error: "


def _leave_with_the_study() -> None:
    os.read(0, 1)  # not sys.stdin: its lock would be held when the interpreter shuts down
    os._exit(1)


def log_of(folder: Path) -> Path:
    """Where the processes of the run that is kept in `folder` print to."""
    return folder.with_name(f"{folder.name}.log")


def last_error(log: Path) -> str | None:
    """What a run's last process ended with; None where it went well, was stopped, or left no log.

    Args:
        log: what the run's processes printed, one after another.
    """
    if not log.is_file():
        return None
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.removeprefix(_ERROR) if last.startswith(_ERROR) else None


def note_error(log: Path, message: str) -> None:
    """Write down what a process ended with that could not say so itself."""
    with contextlib.suppress(OSError), log.open("a") as file:
        file.write(f"\n{_ERROR}{message}\n")


def main() -> int:
    """Run it; returns 0 when finished, 1 when it diverged, 2 for anything else that went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches it too, and ends the study
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    print_whatever_comes()
    try:
        config = config_from(json.loads(sys.argv[1]))
        try:
            with Display(Console(width=160)) as display:
                run(config, display)
        except RunDivergedError as error:
            # The run has let go of its folder; the study has not of its own.
            run_files.write_json(config.folder / FAILED, {"message": str(error), "config": config.as_dict()})
            _say(error)
            return 1
    except (UsageError, RunError) as error:
        _say(error)
        return 2
    except (OSError, MemoryError, RuntimeError) as error:
        known = of_the_machine(error)
        if known is None:
            raise
        _say(known)
        return 2
    return 0


def _say(error: Exception) -> None:
    print(_ERROR + " ".join(str(error).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
