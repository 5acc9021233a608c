"""Plot recorded runs: python bench/plot.py FIGURE.png RESULTS.jsonl ... [--only PATTERN ...]; needs the extra train.

Left, validation accuracy over the epochs; right, over what a worker had sent by then. A worker alone sends nothing:
on the right its best accuracy is a dashed line. Where all runs come to more than 20 points, the first of them, which
all pass in a few epochs, are cut off.
"""

import argparse
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure


def label(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The run's name; its budget too, if not all have the same."""
    budgets = {other["config"]["epochs"] for other in runs}
    return run["run"] if len(budgets) == 1 else f"{run['run']}, {run['config']['epochs']} epochs"


def points(run: dict[str, Any]) -> tuple[list[int], list[float], list[float]]:
    """The epochs that were evaluated, the megabytes sent by then, and the validation accuracies in percent."""
    epochs = run["epochs"]
    at = [index for index, accuracy in enumerate(epochs["val_accuracy"]) if accuracy is not None]
    sent = [epochs["bytes_on_wire"][index] / 1e6 for index in at]
    return [index + 1 for index in at], sent, [epochs["val_accuracy"][index] for index in at]


def draw(runs: Sequence[dict[str, Any]]) -> Figure:
    """Both plots, with one legend."""
    figure = Figure(figsize=(9, 3.9 + 0.2 * ((len(runs) + 1) // 2)), layout="constrained")
    by_epoch, by_bytes = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["tab10"]
    curves = [points(run) for run in runs]
    best = [max(accuracies) for _, _, accuracies in curves]
    lowest = max(0.0, min(best) - 20)
    for index, (run, (epochs, sent, accuracies)) in enumerate(zip(runs, curves, strict=True)):
        colour, marker = colours(index % 10), "." if len(epochs) <= 30 else ""
        by_epoch.plot(epochs, accuracies, color=colour, marker=marker, linewidth=1.3, label=label(run, runs))
        if sent[-1]:
            by_bytes.plot(sent, accuracies, color=colour, marker=marker, linewidth=1.3)
        else:
            by_bytes.axhline(max(accuracies), color=colour, linestyle="--", linewidth=1.3)
    by_epoch.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(lowest, max(best) + 1))
    by_bytes.set(xlabel="MB sent by a worker")
    if any(run["bytes_on_wire"] for run in runs):
        shown = [
            mb for _, sent, accuracies in curves for mb, a in zip(sent, accuracies, strict=True) if mb and a >= lowest
        ]
        by_bytes.set(xscale="log", xlim=(0.9 * min(shown), 1.1 * max(shown)))
        by_bytes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        by_bytes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        by_bytes.xaxis.set_minor_formatter(ticker.NullFormatter())
    for axes in (by_epoch, by_bytes):
        axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    """Read the runs, draw those asked for, in the order of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="names of the runs to draw, with * and ?"
    )
    arguments = parser.parse_args()
    runs = [json.loads(line) for path in arguments.results for line in path.read_text().splitlines()]
    chosen = [run for run in runs if any(fnmatch.fnmatchcase(run["run"], pattern) for pattern in arguments.only)]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)} is none of {', '.join(run['run'] for run in runs)}")
    draw(chosen).savefig(arguments.figure, dpi=110)


if __name__ == "__main__":
    main()
