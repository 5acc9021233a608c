"""The command line: parse the flags, run, and turn what went wrong into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token, convert
from rich.console import Console

import fastlocal
from fastlocal.train.config import Config
from fastlocal.train.display import Display
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.plan_report import PlanConfig, answer
from fastlocal.train.run import run


def _convert(kind: Any, tokens: Sequence[Token]) -> Any:
    """As cyclopts does, but 1.5 workers are an error and not 2."""
    if kind in (int, int | None):
        for token in tokens:
            try:
                int(token.value)
            except ValueError:
                raise ValueError(f"it must be a whole number, got {token.value!r}") from None
    return convert(kind, tokens)


app = App(
    name="fastlocal",
    default_parameter=Parameter(converter=_convert),
    help=fastlocal.__doc__,
    version=fastlocal.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # main() says how to go on
)


@app.command
def train(config: Annotated[Config, Parameter(name="*")] = Config()) -> None:  # noqa: B008  (frozen)
    """Train on CIFAR-100 or the synthetic set, and report accuracy beside bytes sent."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("the trainer runs in one process: start it without torchrun, and choose --workers")
    with Display(Console()) as display:
        summary = run(config, display)
    display.summary(summary)


@app.command
def plan(config: Annotated[PlanConfig, Parameter(name="*")]) -> None:
    """Estimate on paper: seconds a step, bytes and speed-up for any model, number of workers and link."""
    answer(config, Console())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for a wrong request, 1 for a failure on the way."""
    errors = Console(stderr=True)
    try:
        app(sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False, error_console=errors)
    except (CycloptsError, UsageError) as error:
        _say(errors, error)
        return 2
    except RunError as error:
        _say(errors, error)
        return 1
    except KeyboardInterrupt:
        errors.print("stopped; the same command with --resume goes on")
        return 130
    return 0


def _say(errors: Console, error: Exception) -> None:
    line = " ".join(str(error).split())
    errors.print(f"error: {line}", highlight=False, markup=False, soft_wrap=True)
