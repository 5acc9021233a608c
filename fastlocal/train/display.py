"""What a person sees while a run goes on: a live bar on a terminal, one line an epoch everywhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastlocal.train.record import Record, Standing
from fastlocal.train.tables import print_line, print_whole


def megabytes(num_bytes: int) -> str:
    """Bytes as MB (10⁶), with a precision that stays readable from 0 to thousands."""
    return f"{num_bytes / 1e6:,.1f} MB"


def percent_saved(share: float) -> str:
    """Of the bytes, with one decimal; what is a little less than nothing, as buffers are not counted, is 0.0."""
    return f"{round(100 * share, 1) + 0.0:.1f}"


class Display:
    """Shows a run on a console; use it as a context manager around the run.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("interval {task.fields[interval]}  sent {task.fields[sent]}  val {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("run", total=None, epoch="", interval="", sent="", accuracy="—")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """One line of what is going on."""
        print_line(self.console, text)

    def step(self, standing: Standing) -> None:
        """Move the bar."""
        self._bar.update(
            self._task,
            completed=(standing.epoch - 1) * standing.steps + standing.step,
            total=standing.epochs * standing.steps,
            epoch=f"{standing.epoch}/{standing.epochs}",
            interval=standing.interval,
            sent=megabytes(standing.bytes_on_wire),
        )

    def epoch(self, record: Record, epochs: int, samples: int) -> None:
        """One line for a finished epoch; `samples` were trained on so far."""
        validated = "not evaluated"
        if record.val_accuracy is not None:
            validated = f"val loss {record.val_loss:.3f}  val {record.val_accuracy:5.2f} %"
            self._bar.update(self._task, accuracy=f"{record.val_accuracy:.2f} %")
        self.note(
            f"epoch {record.epoch:3d}/{epochs}  train loss {record.train_loss:.3f}  {validated}  "
            f"interval {record.interval:3d}  rounds {record.rounds:4d}  sent {megabytes(record.bytes_on_wire)}  "
            f"{samples / record.train_seconds:,.0f} images/s"
        )

    def summary(self, summary: dict[str, Any]) -> None:
        """The table at the end."""
        table = Table(show_header=False, box=None, pad_edge=False)
        reduction, tested = summary["communication_reduction"], summary["test_accuracy"]
        saved = "one worker sends nothing" if reduction is None else f"{percent_saved(reduction)} %"
        in_syncs = "messages overlapped"
        if summary["sync_seconds"] is not None:
            in_syncs = f"{summary['sync_seconds']:.2f} s of it in syncs"
        for name, value in (
            ("test accuracy", "not looked at" if tested is None else f"{tested:.2f} %"),
            ("best validation accuracy", f"{summary['best_val_accuracy']:.2f} %"),
            ("rounds", f"{summary['rounds']:,} in {summary['local_steps']:,} local steps"),
            ("bytes sent by a worker", megabytes(summary["bytes_on_wire"])),
            ("synchronous training sends", megabytes(summary["bytes_synchronous"])),
            ("communication saved", saved),
            ("training time", f"{summary['train_seconds']:.1f} s, {in_syncs}"),
            ("images a second", f"{summary['samples_per_second']:,.0f}"),
            ("kept in", summary["folder"]),
        ):
            table.add_row(name, Text(value))
        print_whole(self.console, table)
