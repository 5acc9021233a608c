"""Plot what `fastlocal bench` wrote, times as long as ours: one panel an operation, one bar a contender.

    python bench/plot_operations.py bench/results/operations-cpu.jsonl FIGURE.png

Needs the extra train. A bar above 1 is slower than fastlocal, one below it faster; the scale is logarithmic. Bars are
medians of ratios taken in turn, in the order of the file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot, ticker
from matplotlib.axes import Axes

PANELS = ("lamb", "lars", "average", "outer-step")


def draw(axes: Axes, operation: str, rows: list[dict[str, Any]]) -> None:
    """A group of bars for each size and number of workers."""
    groups = list(dict.fromkeys((row["size"], row["workers"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        ratios = {(row["size"], row["workers"]): row["ratio"] for row in rows if row["contender"] == name}
        places = [index + (number - (len(names) - 1) / 2) * width for index, g in enumerate(groups) if g in ratios]
        heights = [ratios[group] for group in groups if group in ratios]
        axes.bar(places, [height - 1 for height in heights], width, bottom=1, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    labels = [size if operation in ("lamb", "lars") else f"{size}\nK = {workers}" for size, workers in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set(yscale="log", ylabel="times ours", title=operation)
    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.grid(alpha=0.3, axis="y", which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    """Read the rows, leave out ours and the copy, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="rows of `fastlocal bench`")
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    canvas, panels = pyplot.subplots(len(PANELS), figsize=(11, 12), layout="constrained")
    for axes, operation in zip(panels, PANELS, strict=True):
        own = [row for row in rows if row["operation"] == operation]
        draw(axes, operation, [row for row in own if row["contender"] not in ("fastlocal", "copy")])
    said = rows[-1]
    canvas.suptitle(f"{said['device']}, {said['threads']} threads, torch {said['versions']['torch']}")
    canvas.savefig(arguments.figure, dpi=100)


if __name__ == "__main__":
    main()
