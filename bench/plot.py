"""Plot recorded runs, accuracy by bytes: python bench/plot.py RESULTS.jsonl FIGURE.png (needs the extra train)."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot


def main() -> None:
    """One line a run: validation accuracy after each epoch over what a worker had sent by then."""
    results, figure = map(Path, sys.argv[1:])
    canvas, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for line in results.read_text().splitlines():
        run = json.loads(line)
        sent = [num_bytes / 1e6 for num_bytes in run["epochs"]["bytes_on_wire"]]
        axes.plot(sent, run["epochs"]["val_accuracy"], marker=".", label=run["run"])
    axes.set(xscale="log", xlabel="MB sent by a worker", ylabel="validation accuracy (%)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    canvas.savefig(figure, dpi=110)


if __name__ == "__main__":
    main()
