"""`fastlocal report`: one HTML page of all runs below a folder, which asks nothing of the network."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastlocal.train.checkpoint import write_bytes
from fastlocal.train.collect import Collection, Group, Spread, collect
from fastlocal.train.config import NOT_PART_OF_A_RUN
from fastlocal.train.display import megabytes
from fastlocal.train.errors import UsageError
from fastlocal.train.plots import draw_all

_DATASETS = {"cifar100": "CIFAR-100, re-split", "synthetic": "Synthetic images"}


@dataclass(frozen=True)
class Row:
    """A group in the tables, as text."""

    name: str
    runs: str
    epochs: str
    test: str
    original: str
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
    runs = [run for group in groups for run in group.runs]
    return environment.get_template("report.html").render(
        title=collection.title,
        datasets=sorted({_DATASETS[run.config["dataset"]] for run in runs}),
        budgets=sorted({run.config["epochs"] for run in runs}),
        num_runs=len(runs),
        seeds=sorted({len(group.runs) for group in groups}),
        rows=[_row(group) for group in groups],
        has_original=any(group.original for group in groups),
        plots=[(title, base64.b64encode(png).decode()) for title, png in plots.values()],
        unfinished=collection.unfinished,
        common=_common(groups),
        details=[(group.name, _own(group, groups)) for group in groups],
        versions=sorted({f"{key} {value}" for run in runs for key, value in run.summary["versions"].items()}),
    )


def _row(group: Group) -> Row:
    test, original = group.spread("test_accuracy"), group.original.get("test_accuracy")
    saved, original_saved = group.spread("communication_reduction"), group.original.get("communication_reduction")
    sent, seconds = group.spread("bytes_on_wire"), group.spread("train_seconds")
    assert sent
    assert seconds
    return Row(
        name=group.name,
        runs="one seed" if len(group.runs) == 1 else f"{len(group.runs)} seeds",
        epochs=str(group.config["epochs"]),
        test=percent(test),
        original="" if original is None else f"{original:.2f}",
        difference="" if original is None or test is None else f"{test.mean - original:+.2f}".replace("-", "−"),
        best=percent(group.spread("best_val_accuracy")),
        saved="–" if saved is None else f"{100 * saved.mean:.1f}",
        original_saved="" if original_saved is None else f"{100 * original_saved:.1f}",
        sent=megabytes(round(sent.mean)),
        seconds=f"{seconds.mean:,.0f} s",
    )


def percent(spread: Spread | None) -> str:
    """A figure in percent: mean ± standard deviation, or the one value."""
    if spread is None:
        return "–"
    return f"{spread.mean:.2f}" if spread.std is None else f"{spread.mean:.2f} ± {spread.std:.2f}"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    hidden = (*NOT_PART_OF_A_RUN, "seed")
    return {key: value for key, value in config.items() if key not in hidden and value is not None}


def _common(groups: list[Group]) -> list[tuple[str, Any]]:
    """Settings that all groups share."""
    if not groups:
        return []
    first, *others = [_settings(group.config) for group in groups]
    return [(key, value) for key, value in first.items() if all(other.get(key) == value for other in others)]


def _own(group: Group, groups: list[Group]) -> str:
    """Settings of a group that not all share."""
    common = dict(_common(groups))
    own = [f"{key} {value}" for key, value in _settings(group.config).items() if key not in common]
    return ", ".join(own) or "no other settings"
