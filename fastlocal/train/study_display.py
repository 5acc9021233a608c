"""What a person sees while a study goes on: a bar for the study and one for each running cell."""

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastlocal.train.cells import Place, State


class StudyDisplay:
    """Shows the cells of a study on a console; use it as a context manager around the study.

    Args:
        console: where to write.
        places: the cells; `update()` looks at them again.
    """

    def __init__(self, console: Console, places: Sequence[Place]) -> None:
        self.console, self.places = console, places
        self._shown: dict[str, State] = {place.cell.name: place.state for place in places}
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
        self._total = self._bars.add_task("all cells", total=sum(place.config.epochs for place in places))
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
            name = place.cell.name
            epochs = place.config.epochs if place.state in ("finished", "diverged") else place.epochs_done()
            done += epochs
            if place.state == "running":
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=place.config.epochs)
                self._bars.update(self._tasks[name], completed=epochs)
            elif name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            if self._shown[name] != place.state:
                self._shown[name] = place.state
                self.note(f"{name}: {place.state}" + (f": {place.message}" if place.message else ""))
        self._bars.update(self._total, completed=done)

    def note(self, text: str) -> None:
        """One line of what is going on."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def plan(self) -> None:
        """The cells and where they stand."""
        table = Table("cell", "state", "epochs", box=None, pad_edge=False)
        for place in self.places:
            table.add_row(Text(place.cell.name), place.state, f"{place.epochs_done()}/{place.config.epochs}")
        self.console.print(table, highlight=False)

    def counts(self) -> None:
        """How many cells stand where."""
        counts = Counter(place.state for place in self.places)
        self.note(f"{len(self.places)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
