"""`fastlocal report`: one HTML page of all runs below a folder, which asks nothing of the network."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastlocal.train.checkpoint import write_bytes
from fastlocal.train.collect import Collection, collect
from fastlocal.train.config import NOT_PART_OF_A_RUN, has_use
from fastlocal.train.display import megabytes, percent_saved
from fastlocal.train.errors import UsageError
from fastlocal.train.groups import Group, Run, Spread
from fastlocal.train.plots import draw_all
from fastlocal.train.tuned import RateSearch, chosen, rate, searches


@dataclass(frozen=True)
class TableRow:
    """A group in the tables, as text."""

    name: str
    seeds: int
    epochs: int
    test: str
    original: str
    note: str  # its number, or nothing
    difference: str
    best: str
    saved: str
    original_saved: str
    sent: str
    seconds: str


def write(root: Path) -> Path:
    """Read the runs below a folder and write its report/; returns the page.

    Raises:
        UsageError: there is no run, or the folder cannot be used.
        RunError: a file cannot be written.
    """
    collection = collect(root)
    folder = root / "report"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
    plots = draw_all(collection.groups) if collection.groups else {}
    for name, (_, png) in plots.items():
        write_bytes(folder / name, png)
    page = folder / "index.html"
    write_bytes(page, _render(collection, plots).encode())
    return page


def _render(collection: Collection, plots: dict[str, tuple[str, bytes]]) -> str:
    environment = Environment(
        loader=PackageLoader("fastlocal.train", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = collection.groups
    tried = searches(groups)
    tested = any(group.spread("test_accuracy") for search in tried for group in search.groups)
    searched = "test_accuracy" if tested else "best_val_accuracy"  # a search never looks at the test images
    some_diverged = any(group.diverged for search in tried for group in search.groups)
    runs = [run for group in groups for run in group.runs]
    notes = list(dict.fromkeys(group.note for group in groups if group.note))
    return environment.get_template("report.html").render(
        title=collection.title,
        datasets=sorted({group.images for group in groups}),
        budgets=sorted({run.config["epochs"] for run in runs}),
        num_runs=len(runs),
        seeds=sorted({len(group.runs) for group in groups}),
        rows=[_row(group, notes) for group in groups],
        has_original=any(group.original for group in groups),
        other_budget=any(_other_budget(group) for group in groups),
        notes=notes,
        rates=sorted({rate(group) for search in tried for group in search.groups}),
        searches=[(search.name, _by_rate(search, searched)) for search in tried],
        some_diverged=some_diverged,
        searched={"test_accuracy": "test accuracy", "best_val_accuracy": "best validation accuracy"}[searched],
        plots=[(title, base64.b64encode(png).decode()) for title, png in plots.values()],
        unfinished=collection.unfinished,
        common=_common(groups),
        details=[(group.name, _own(group, groups)) for group in groups],
        versions=sorted({f"{key} {value}" for run in runs for key, value in run.summary["versions"].items()}),
    )


def _other_budget(group: Group) -> bool:
    """Whether the original's figures are of another number of epochs, or may be."""
    return bool(group.original) and group.original_epochs != group.config["epochs"]


def _row(group: Group, notes: list[str]) -> TableRow:
    test, original = group.spread("test_accuracy"), group.original.get("test_accuracy")
    saved, original_saved = group.spread("communication_reduction"), group.original.get("communication_reduction")
    sent, seconds = group.spread("bytes_on_wire"), group.spread("train_seconds")
    assert sent
    assert seconds
    elsewhere = f" at {group.original_epochs or 'other'} epochs" if _other_budget(group) else ""
    return TableRow(
        name=group.name,
        seeds=len(group.runs),
        epochs=group.config["epochs"],
        test=percent(test),
        original="" if original is None else f"{original:.2f}{elsewhere}",
        note=str(1 + notes.index(group.note)) if group.note else "",
        difference=_difference(test, original) if not elsewhere else "",
        best=percent(group.spread("best_val_accuracy")),
        saved=_saved(saved),
        original_saved="" if original_saved is None else f"{100 * original_saved:.1f}{elsewhere}",
        sent=_sent(sent),
        seconds=duration(seconds.mean),
    )


def _by_rate(search: RateSearch, figure: str) -> dict[float, tuple[str, bool]]:
    """The figure by rate, and whether validation chooses that rate; of two groups of one rate the better one's."""
    found: dict[float, tuple[str, bool]] = {}
    for value in {rate(group) for group in search.groups}:
        group = chosen([group for group in search.groups if rate(group) == value])
        ended = len(group.runs)
        some = f" ({ended} of {ended + len(group.diverged)} seeds)" if group.diverged else ""
        found[value] = percent(group.spread(figure)) + some, rate(search.chosen) == value
    return found


def percent(spread: Spread | None) -> str:
    """A figure in percent: mean ± standard deviation, or the one value."""
    if spread is None:
        return "–"
    return f"{spread.mean:.2f}" if spread.std is None else f"{spread.mean:.2f} ± {spread.std:.2f}"


def _saved(spread: Spread | None) -> str:
    """Percent; a deviation only where the seeds differ, as they do under an adaptive policy."""
    if spread is None:
        return "–"
    return percent_saved(spread.mean) + (f" ± {100 * spread.std:.1f}" if spread.std else "")


def _sent(spread: Spread) -> str:
    """Megabytes, likewise."""
    if spread.std:
        return f"{spread.mean / 1e6:,.1f} ± {megabytes(round(spread.std))}"
    return megabytes(round(spread.mean)) if spread.mean else "–"


def duration(seconds: float) -> str:
    """A time as people say it: "59 s", "12 min", "2 h 27 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _difference(test: Spread | None, original: float | None) -> str:
    return "" if original is None or test is None else f"{test.mean - original:+.2f}".replace("-", "−")


def _settings(run: Run) -> dict[str, Any]:
    """What a run was made with, defaults resolved as the run itself recorded them."""
    hidden = (*NOT_PART_OF_A_RUN, "seed")
    used = {key: value for key, value in run.config.items() if key not in hidden and has_use(key, run.config)}
    if "resolved" not in run.summary:
        for key in ("lr", "weight_decay"):
            used[key] = "default (its value was not recorded)" if used.get(key) is None else used[key]
    return {key: value for key, value in (used | run.summary.get("resolved", {})).items() if value is not None}


def _common(groups: list[Group]) -> list[tuple[str, Any]]:
    """Settings that all groups share."""
    if not groups:
        return []
    first, *others = [_settings(group.runs[0]) for group in groups]
    return [(key, value) for key, value in first.items() if all(other.get(key) == value for other in others)]


def _own(group: Group, groups: list[Group]) -> str:
    """Settings of a group that not all share."""
    common = dict(_common(groups))
    own = [f"{key} {value}" for key, value in _settings(group.runs[0]).items() if key not in common]
    return ", ".join(own) or "no other settings"
