"""Lines and tables on a console of any width and encoding."""

import io
import sys

from rich.console import Console
from rich.segment import Segments
from rich.table import Table


def print_whatever_comes() -> None:
    """Let standard output and error take "×" and any folder's name, where only ASCII may be written too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_line(console: Console, text: str) -> None:
    """Print plain text that is never wrapped, so that a path in it can be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_whole(console: Console, table: Table) -> None:
    """Print a table in which no word is ever cut: where its words need more than the console's width, so do lines."""
    needed = console.measure(table, options=console.options.update(max_width=10_000))
    padding = 2 * len(table.columns)  # rich leaves it out of the minimum
    if needed.minimum + padding <= console.width:
        console.print(table, highlight=False)
        return
    lines = console.render_lines(table, console.options.update(width=needed.maximum), new_lines=True)
    console.print(Segments([segment for line in lines for segment in line]), end="", soft_wrap=True)
