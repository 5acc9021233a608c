"""The plots of a report, as PNG bytes. Readable at the width of a phone: few ticks, large type."""

import io
import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from math import ceil
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter, StrMethodFormatter

from fastlocal.train.figures import plain_style
from fastlocal.train.groups import Group, Run, alike_but_for
from fastlocal.train.tuned import chosen, rate

_MARKERS = "osD^vPX*<>"
_DASHES = (
    *("-", "--", ":", "-."),
    *((0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (4, 5)), (0, (8, 2, 2, 2)), (0, (2, 1))),
)
_LEGEND_LETTERS = 42  # a line, so that the widest names stay within the figure
_FEW_POINTS = 20  # a line of one point is none, and one of few does not show where it was measured


@plain_style()
def draw_all(groups: Sequence[Group]) -> dict[str, tuple[str, bytes]]:
    """Every plot that the groups have data for: file name -> (what it shows, PNG)."""
    plots: dict[str, tuple[str, bytes]] = {}
    tested = [group for group in groups if group.spread("test_accuracy")]
    local = [group for group in tested if group.config["method"] != "sync"]
    if tested:
        plots["accuracy-bytes.png"] = ("Test accuracy over megabytes sent by a worker", _pareto(tested))
    for x, lines, shown, title in (
        ("workers", "interval", tested, "Test accuracy over the workers K"),
        ("interval", "workers", local, "Test accuracy over the interval J"),
        ("batch_size", "optimizer", tested, "Test accuracy over the batch"),
    ):
        families = _that_vary(x, _by_rate(x, _families(x, lines, shown)))
        if families:
            plots[f"accuracy-{x.removesuffix('_size')}.png"] = (title, _against(x, families))
    adaptive = [group for group in groups if len(group.runs[0].summary["interval_trace"]) > 1]
    if adaptive:
        plots["interval.png"] = ("Interval over time", _curves(adaptive, "interval (local steps)", _intervals))
    plots["accuracy.png"] = (
        "Validation accuracy over the epochs",
        _curves(groups, "validation accuracy (%)", _column("val_accuracy")),
    )
    plots["val-loss.png"] = (
        "Validation loss over the epochs",
        _curves(groups, "cross-entropy (nats)", _column("val_loss")),
    )
    plots["train-loss.png"] = (
        "Training loss over the epochs",
        _curves(groups, "cross-entropy (nats)", _column("train_loss")),
    )
    return plots


def _label(name: str) -> str:
    """A name in a legend, which takes dollars for mathematics and leaves out what begins with an underscore."""
    lines = textwrap.wrap(" " + name if name.startswith("_") else name, _LEGEND_LETTERS)
    return "\n".join(lines).replace("$", r"\$")


def _figure(names: Collection[str]) -> tuple[Figure, Axes]:
    """A figure with room for its legend below the axes."""
    labels = [_label(name) for name in names]
    lines = sum(1 + label.count("\n") for label in labels)
    with matplotlib.rc_context({"font.size": 12}):
        figure = Figure(figsize=(5.0, 3.9 + 0.25 * ceil(lines / _columns(labels))), layout="constrained")
        axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _columns(labels: Collection[str]) -> int:
    """Of a legend: two of short labels where one would be taller than the axes."""
    return 2 if len(labels) > 10 and max(map(len, labels)) <= 20 else 1


def _finish(figure: Figure, axes: Axes) -> bytes:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels), fontsize=11, frameon=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in letters that its font lacks
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _style(index: int) -> dict[str, Any]:
    colours = matplotlib.colormaps["tab10"]
    # Of ten colours and ten markers a hundred pairs, the first ten of which share neither.
    return {"color": colours(index % 10), "marker": _MARKERS[(index + index // 10) % 10]}


def _line_style(index: int) -> dict[str, Any]:
    """Of a curve, which has no markers: of ten colours and ten dash patterns a hundred pairs."""
    return {"color": _style(index)["color"], "linestyle": _DASHES[index // 10 % 10]}


def _pareto(groups: Sequence[Group]) -> bytes:
    figure, axes = _figure([group.name for group in groups])
    for index, group in enumerate(groups):
        accuracy, sent = group.spread("test_accuracy"), group.spread("bytes_on_wire")
        assert accuracy
        assert sent
        axes.errorbar(
            sent.mean / 1e6,
            accuracy.mean,
            xerr=(sent.std or 0.0) / 1e6,
            yerr=accuracy.std or 0.0,
            markersize=9,
            linestyle="none",
            label=_label(group.name),
            **_style(index),
        )
    spreads = [spread for group in groups if (spread := group.spread("bytes_on_wire"))]
    end = 1.3 * max(1, *((spread.mean + (spread.std or 0.0)) / 1e6 for spread in spreads))
    axes.set_xlim(-0.05 * min(end, 20), end)
    if end > 10:
        # One worker alone sends nothing: the scale must have a 0.
        axes.set_xscale("symlog", linthresh=10)
        axes.xaxis.set_major_locator(FixedLocator(_megabyte_ticks(end)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="MB sent by a worker", ylabel="test accuracy (%)")
    return _finish(figure, axes)


def _megabyte_ticks(end: float) -> list[float]:
    """0, 5, 10, 20, 50, 100 ... up to `end` MB; the decades alone where the others would crowd."""
    steps = (1, 2, 5) if end < 700 else (1,)
    ticks = [step * 10.0**decade for decade in range(len(f"{end:.0f}")) for step in steps]
    return [0, *(tick for tick in ticks if (10 if end >= 700 else 5) <= tick <= end)]


def _families(x: str, lines: str, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """What one line connects: the groups of a method that share one field, and all but `x` and their rate besides."""
    several_budgets = len({group.config["epochs"] for group in groups}) > 1
    families: dict[str, list[Group]] = {}
    for group in groups:
        config = group.config
        shown = {"workers": f"K = {config['workers']}", "interval": f"J = {config['interval']}"}
        method = config["method"] if config["policy"] == "fixed" else f"{config['method']}, {config['policy']}"
        detail = "" if config["method"] == "sync" and lines == "interval" else shown.get(lines, config["optimizer"])
        budget = f", {config['epochs']} epochs" if several_budgets else ""
        families.setdefault(f"{method} {detail}".strip() + budget, []).append(group)
    split: dict[str, list[Group]] = {}
    for name, members in families.items():
        alike: dict[str, list[Group]] = {}
        # Over the workers synchronous training is drawn for comparison, whatever else was tried with it.
        together = x == "workers" and members[0].config["method"] == "sync"
        for group in members:
            alike.setdefault("" if together else alike_but_for(group, x, "lr"), []).append(group)
        for own in alike.values():
            split[name if len(alike) == 1 else f"{name}: {own[0].name}"] = own
    return split


def _by_rate(x: str, families: dict[str, list[Group]]) -> dict[str, list[Group]]:
    """Families tried at several rates, split: one for each rate that all points have, and one of the chosen."""
    split: dict[str, list[Group]] = {}
    for name, members in families.items():
        points: dict[Any, list[Group]] = {}
        for group in members:
            points.setdefault(group.config[x], []).append(group)
        alone = all(len({alike_but_for(group, "lr") for group in point}) == 1 for point in points.values())
        if not alone or all(len(point) == 1 for point in points.values()):
            split[name] = members
            continue
        for value in sorted(set.intersection(*({rate(group) for group in point} for point in points.values()))):
            split[f"{name}, rate {value:g}"] = [group for group in members if rate(group) == value]
        split[f"{name}, rate by validation"] = [chosen(point) for point in points.values()]
    return split


def _that_vary(x: str, families: dict[str, list[Group]]) -> dict[str, list[Group]]:
    """The families that make a line over x; over the workers also synchronous training, to compare with."""
    varied = {name for name, members in families.items() if len({group.config[x] for group in members}) > 1}
    beside = {name for name, members in families.items() if x == "workers" and members[0].config["method"] == "sync"}
    return {name: families[name] for name in families if name in varied | beside} if varied else {}


def _against(x: str, families: dict[str, list[Group]]) -> bytes:
    """Test accuracy over one field, a line for each family."""
    words = {
        "workers": "workers, K",
        "interval": "interval, J (local steps)",
        "batch_size": "images a step and worker",
    }
    figure, axes = _figure(families)
    for index, (name, members) in enumerate(families.items()):
        members = sorted(members, key=lambda group: group.config[x])
        spreads = [group.spread("test_accuracy") for group in members]
        axes.errorbar(
            [group.config[x] for group in members],
            [spread.mean for spread in spreads if spread],
            yerr=[spread.std or 0.0 for spread in spreads if spread],
            label=_label(name),
            capsize=3,
            linestyle="-" if len({group.config[x] for group in members}) == len(members) else "none",
            **_style(index),
        )
    values = sorted({group.config[x] for members in families.values() for group in members})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel=words[x], ylabel="test accuracy (%)")
    return _finish(figure, axes)


def _curves(groups: Sequence[Group], ylabel: str, points: Callable[[Run], tuple[list[float], list[float]]]) -> bytes:
    """One line a run; runs of a group, which differ in their seed, have one colour and one entry in the legend."""
    figure, axes = _figure([group.name for group in groups])
    for index, group in enumerate(groups):
        for number, run in enumerate(group.runs):
            xs, ys = points(run)
            axes.plot(
                xs,
                ys,
                **_line_style(index),
                linewidth=1.3,
                marker="." if len(xs) < _FEW_POINTS and points is not _intervals else None,
                markersize=8,
                drawstyle="steps-post" if points is _intervals else "default",
                label=None if number else _label(group.name),
            )
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if points is _intervals:
        axes.set_ylim(bottom=0)
    return _finish(figure, axes)


def _column(name: str) -> Callable[[Run], tuple[list[float], list[float]]]:
    def points(run: Run) -> tuple[list[float], list[float]]:
        kept = [record for record in run.records if record[name] is not None]
        return [record["epoch"] for record in kept], [record[name] for record in kept]

    return points


def _intervals(run: Run) -> tuple[list[float], list[float]]:
    trace, steps = run.summary["interval_trace"], run.summary["local_steps"]
    per_epoch = steps / run.config["epochs"]
    return [step / per_epoch for step, _ in [*trace, [steps, 0]]], [*(j for _, j in trace), trace[-1][1]]
