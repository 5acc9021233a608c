"""One run in a process of its own: `python -m fastlocal.train.job`, started by a study.

The config comes as JSON in the first argument. Standard input is a pipe that the study holds open: when it
closes, the study is gone, and so is this process, whatever ended the study.
"""

import json
import os
import sys
import threading

from rich.console import Console

from fastlocal.train import report
from fastlocal.train.display import Display
from fastlocal.train.errors import RunDivergedError, RunError, UsageError
from fastlocal.train.lock import hold
from fastlocal.train.run import run
from fastlocal.train.values import config_from

FAILED = "failed.json"
"""In the folder of a run that diverged: its message."""


def _leave_with_the_study() -> None:
    os.read(0, 1)  # not sys.stdin: its lock would be held when the interpreter shuts down
    os._exit(1)


def main() -> int:
    """Run it; returns 0 when finished, 1 when it diverged, 2 for anything else that went wrong."""
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    try:
        config = config_from(json.loads(sys.argv[1]))
        try:
            # The job of a study that was killed may still be on its way out.
            with hold(config.folder, patience_seconds=10), Display(Console(width=160)) as display:
                run(config, display)
        except RunDivergedError as error:
            report.write_json(config.folder / FAILED, {"message": str(error), "config": config.as_dict()})
            print(f"error: {error}", file=sys.stderr)
            return 1
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
