"""The command line: parse the flags, run, and turn what went wrong into one line and an exit code."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, Token, convert
from rich.console import Console

import fastlocal
from fastlocal import comm
from fastlocal.bench.cases import Operation
from fastlocal.bench.run import BenchPlan, require_writable
from fastlocal.train import cells, pool, study_file
from fastlocal.train.bench_table import bench as run_bench
from fastlocal.train.config import Config, Precision
from fastlocal.train.display import Display
from fastlocal.train.errors import RunError, UsageError, of_the_machine
from fastlocal.train.lock import hold
from fastlocal.train.plan_report import PlanConfig, answer
from fastlocal.train.ready import require_ready, what_is_missing, what_is_slow
from fastlocal.train.run import run
from fastlocal.train.study_display import StudyDisplay
from fastlocal.train.tables import print_line, print_whatever_comes


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
    _, rank = _launched()
    with Display(Console(quiet=rank != 0)) as display:
        summary = run(config, display)
    display.summary(summary)


@app.command
def study(
    file: Path,
    /,
    *,
    out: Path | None = None,
    epochs: int | None = None,
    precision: Precision | None = None,
    parallel: int = 1,
    only: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = ("*",),
    data_dir: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
) -> None:
    """Run the grid of a TOML file cell by cell; the same command goes on with what is missing.

    Args:
        file: The study: [base], [grid], [[cells]], seeds and what the original reported.
        out: Folder of the study. Default: runs/study/ and its name.
        epochs: Replaces the epochs of all cells: a smaller budget, kept in a folder of its own.
        precision: Replaces the file's precision, in a folder of its own; give fp32 to a processor without bfloat16.
        parallel: Cells at a time, each in its own process.
        only: Names of the cells to run, with * and ?; may be given again for more of them. Default: all.
        data_dir: Replaces the file's folder of the images.
        device: Replaces the file's device.
        threads: CPU threads of each cell. Default: the file's; else with --parallel above 1 the processors that may
            be used, divided by it.
        retry: Run cells that diverged again, from the beginning.
        dry_run: Show the cells and where they stand, and stop.
    """
    share = _shared_threads(threads, parallel, epochs)
    read = study_file.load(file, epochs=epochs, precision=precision, only=only)
    root = out or Path("runs") / "study" / study_file.folder_of(read.name, epochs, precision)

    def chosen_cells() -> list[pool.Place]:
        return cells.places(
            read,
            root,
            only=only,
            data_dir=data_dir,
            threads=threads,
            default_threads=share,
            device=device,
            retry=retry,
        )

    chosen = chosen_cells()  # a wrong request leaves no folder behind
    epochs_of_all = sum(place.config.epochs for place in chosen)
    to_do = [place.config for place in chosen if place.state not in ("finished", "diverged")]
    if dry_run:
        display = StudyDisplay(Console(), chosen, epochs_of_all)
        display.plan()
        if missing := what_is_missing(to_do):
            display.note(f"not ready: {missing}")
        elif slow := what_is_slow(to_do):
            display.note(slow)
        return
    require_ready(to_do)
    with hold(root):
        cells.begin(read, root)
        chosen = chosen_cells()  # another study may have ended since
        display = StudyDisplay(Console(), chosen, epochs_of_all)
        if slow := what_is_slow(to_do):
            display.note(slow)
        with display:
            pool.run_all(chosen, parallel, lambda ended: display.update())
    display.counts()
    broken = [place for place in chosen if place.state == "broken"]
    if broken:
        raise RunError(
            f"{len(broken)} of {len(chosen)} cells did not end ({broken[0].name}: {broken[0].message}); "
            "the same command goes on with them"
        )


def _launched() -> tuple[int, int]:
    """How many processes were started together, and which of them this is."""
    try:
        return comm.launched_processes(), comm.launched_rank()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _shared_threads(threads: int | None, parallel: int, epochs: int | None) -> int | None:
    """Check what study and search have in common; returns the threads of a process for which none are asked for.

    None leaves them to PyTorch.
    """
    if _launched()[0] > 1:
        raise UsageError("a study or a search starts its own processes: run it without torchrun, and use --parallel")
    for name, value in (("--parallel", parallel), ("--threads", threads), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if threads is not None or parallel == 1:
        return threads
    # A container or a batch system may allow fewer processors than the machine has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // parallel)


@app.command
def report(folder: Path, /) -> None:
    """Write FOLDER/report/index.html: tables and plots of all runs below a folder, on one page."""
    from fastlocal.train.report import write  # jinja2 and the drawing are for this command alone

    print_line(Console(), f"written: {write(folder)}")


@app.command
def search(
    file: Path,
    /,
    *,
    out: Path | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    precision: Precision | None = None,
    parallel: int = 1,
    data_dir: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
) -> None:
    """Search hyper-parameters on the validation images with Optuna; the same command goes on.

    Args:
        file: The search: [base], [space], sampler, objective, trials and seed.
        out: Folder of the search. Default: runs/search/ and its name.
        trials: Replaces the file's number of trials; those already made count.
        epochs: Replaces the epochs of each trial; kept in a folder of its own.
        precision: Replaces the file's precision, in a folder of its own; give fp32 to a processor without bfloat16.
        parallel: Trials at a time, each in its own process.
        data_dir: Replaces the file's folder of the images.
        device: Replaces the file's device.
        threads: CPU threads of each trial. Default: the file's; else with --parallel above 1 the processors that may
            be used, divided by it.
        dry_run: Show what is searched and how many trials are made, and stop.
    """
    share = _shared_threads(threads, parallel, epochs)
    try:
        from fastlocal.train import search as searching
        from fastlocal.train import search_file
    except ModuleNotFoundError as error:
        raise UsageError(f"a search needs {error.name}: pip install 'fastlocal[search]'") from None
    read = search_file.load(file, trials=trials, epochs=epochs, precision=precision)
    root = out or Path("runs") / "search" / study_file.folder_of(read.name, epochs, precision)
    if dry_run:
        searching.plan(read, root, Console(), data_dir=data_dir, device=device)
        return
    searching.search(
        read,
        root,
        Console(),
        data_dir=data_dir,
        device=device,
        threads=threads,
        default_threads=share,
        parallel=parallel,
    )


@app.command
def bench(
    *,
    operation: Operation | None = None,
    size: str | None = None,
    quick: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compiled: bool = False,
    out: Path | None = None,
) -> None:
    """Time LAMB, LARS, averaging and the outer step beside other libraries, in one table.

    Args:
        operation: Only this one.
        size: Only the shapes of this model: lenet, resnet18, resnet50, bert-base, bert-large or tiny.
        quick: Small sizes only, a quarter of a minute.
        device: Where; auto is CUDA if there is a GPU.
        compiled: Add torch.compile of a peer's step, which compiles for a minute or more.
        out: File to append the rows to as JSON lines.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        plan = BenchPlan(operation=operation, size=size, quick=quick, device=device, compiled=compiled)
        if out is not None:
            require_writable(out)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    run_bench(plan, out, Console())


@app.command
def plan(config: Annotated[PlanConfig, Parameter(name="*")]) -> None:
    """Estimate on paper: seconds a step, bytes and speed-up for any model, number of workers and link."""
    answer(config, Console())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for a wrong request, 1 for a failure on the way."""
    print_whatever_comes()
    errors = Console(stderr=True)
    try:
        app(sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False, error_console=errors)
        sys.stdout.flush()  # at exit nothing could be said of it
    except MissingArgumentError as error:
        _say(errors, _without_a_value(error))
        return 2
    except (CycloptsError, UsageError) as error:
        _say(errors, error)
        return 2
    except RunError as error:
        _say(errors, error)
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        known = of_the_machine(error)
        if known is None:
            raise
        _say(errors, known)
        _drop_output()
        return 1
    except KeyboardInterrupt:
        arguments = sys.argv[1:] if argv is None else argv
        goes_on = {"train": "with --resume goes on", "bench": "begins anew"}.get(arguments[0], "goes on")
        errors.print(f"stopped; the same command {goes_on}")
        return 130
    return 0


def _drop_output() -> None:
    """Where standard output cannot be written, what is left of it must not be tried again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _without_a_value(error: MissingArgumentError) -> CycloptsError | UsageError:
    """A parameter that was not given at all is missing; only one that was given lacks its value."""
    if error.argument is None or error.keyword is not None or error.argument.tokens:
        return error
    return UsageError(f"{error.argument.name} is missing: see fastlocal {' '.join(error.command_chain or ())} --help")


def _say(errors: Console, error: Exception) -> None:
    line = " ".join(str(error).split())
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # some clusters number jobs that are no group
    rank = "" if alone or "RANK" not in os.environ else f" on rank {os.environ['RANK']}"
    print_line(errors, f"error{rank}: {line}")
