"""What a person sees while a study goes on: a bar for the study and one for each running cell."""

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastlocal.train.pool import Place, State
from fastlocal.train.tables import print_line, print_whole


class StudyDisplay:
    """Shows the runs of a study or a search on a console; use it as a context manager around it.

    Args:
        console: where to write.
        places: the runs; `update()` looks at them again. There may be more of them by then.
        epochs: of all runs together.
    """

    def __init__(self, console: Console, places: Sequence[Place], epochs: int) -> None:
        self.console, self.places, self.epochs = console, places, epochs
        self._shown: dict[str, State] = {place.name: place.state for place in places}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._total = self._bars.add_task("all", total=epochs)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "StudyDisplay":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self) -> None:
        """Move the bars, and print a line for each cell that ended."""
        done = 0
        for place in self.places:
            name = place.name
            epochs = place.config.epochs if place.state in ("finished", "diverged") else place.epochs_done()
            done += epochs
            if place.state == "running":
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=place.config.epochs)
                self._bars.update(self._tasks[name], completed=epochs)
            elif name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            if self._shown.get(name, "new") != place.state:
                self._shown[name] = place.state
                self.note(f"{name}: {place.state}" + (f": {place.message}" if place.message else ""))
        self._bars.update(self._total, completed=done)

    def note(self, text: str) -> None:
        """One line of what is going on."""
        print_line(self.console, text)

    def plan(self) -> None:
        """The cells and where they stand, their number and their epochs."""
        told = any(place.message for place in self.places)
        table = Table("cell", "state", "epochs", *["because"] * told, box=None, pad_edge=False)
        done = [place.epochs_done() for place in self.places]
        for place, epochs in zip(self.places, done, strict=True):
            table.add_row(
                Text(place.name), place.state, f"{epochs}/{place.config.epochs}", *[Text(place.message)] * told
            )
        print_whole(self.console, table)
        self.counts()
        self.note(f"{sum(done):,} of {self.epochs:,} epochs are done")

    def counts(self) -> None:
        """How many cells stand where."""
        counts = Counter(place.state for place in self.places)
        cells = "1 cell" if len(self.places) == 1 else f"{len(self.places)} cells"
        self.note(f"{cells}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
