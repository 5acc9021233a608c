"""The table of `fastlocal bench`."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fastlocal.bench.cases import Case, named
from fastlocal.bench.run import BenchPlan, Measurement, ahead, append, host_bound, run
from fastlocal.train.errors import RunError
from fastlocal.train.tables import print_whole


def bench(plan: BenchPlan, out: Path | None, console: Console) -> None:
    """Measure the plan, print one table a case, and append the rows to `out`.

    Raises:
        RunError: they cannot be written.
    """

    def show(case: Case, rows: list[Measurement]) -> None:
        print_whole(console, _table(case, rows))
        if case.missing:
            console.print(f"not installed, so not compared: {', '.join(case.missing)}", highlight=False)
        if out is not None:
            try:
                append(rows, out)
            except OSError as error:
                raise RunError(f"{out} cannot be written: {error.strerror}") from error

    with console.status("measuring"):
        rows = run(plan, show, lambda text: console.print(text, highlight=False))
    for said in ahead(rows) + host_bound(rows):
        console.print(said, highlight=False, soft_wrap=True)
    if rows:
        last = rows[-1]
        console.print(
            f"{last.device}, {last.threads} threads, torch {last.versions['torch']}; medians of interleaved turns, "
            "20th to 80th percentile; of a blocked fastlocal operation the bytes are those that have to move",
            highlight=False,
        )


def _table(case: Case, rows: list[Measurement]) -> Table:
    resident = "in the cache" if rows[0].rotated_bytes < rows[0].cache_bytes else "from memory"
    name = named(case.operation, case.size, case.workers)
    title = f"{name}: {case.tensors} tensors, {case.parameters:,} parameters, {resident}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    for column in ("ms", "p20", "p80", "× ours", "B/param", "calls", "% copy"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.contender,
            f"{row.seconds_p50 * 1e3:.3f}",
            f"{row.seconds_p20 * 1e3:.3f}",
            f"{row.seconds_p80 * 1e3:.3f}",
            f"{row.ratio:.2f}",
            f"{row.bytes_a_parameter:.0f}",
            "—" if row.launches is None else str(row.launches),
            f"{100 * row.share_of_copy:.0f}",
        )
    return table
