"""The plot that a run leaves behind: curves.png."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastlocal.train.checkpoint import write_bytes
from fastlocal.train.figures import plain_style
from fastlocal.train.record import Record


@plain_style()
def write_curves(path: Path, records: Sequence[Record], interval_trace: list[list[int]]) -> None:
    """Plot losses and accuracy by epoch, accuracy by bytes, and the interval by step; RunError if it cannot."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    ((losses, accuracy), (pareto, intervals)) = figure.subplots(2, 2)
    epochs = [record.epoch for record in records]
    evaluated = [record for record in records if record.val_accuracy is not None]
    losses.plot(epochs, [record.train_loss for record in records], marker=".", label="training")
    losses.plot([r.epoch for r in evaluated], [r.val_loss for r in evaluated], marker=".", label="validation")
    losses.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    losses.legend()
    accuracy.plot([r.epoch for r in evaluated], [r.val_accuracy for r in evaluated], marker=".")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    sent = numpy.array([r.bytes_on_wire for r in evaluated]) / 1e6
    pareto.plot(sent, [r.val_accuracy for r in evaluated], marker=".")
    pareto.set(xlabel="MB sent by a worker", ylabel="validation accuracy (%)")
    steps = [step for step, _ in interval_trace] + [records[-1].local_steps]
    values = [interval for _, interval in interval_trace]
    intervals.step(steps, [*values, values[-1]], where="post")
    intervals.set(xlabel="local step", ylabel="interval (local steps)", ylim=(0, None))
    for axes in (losses, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (losses, accuracy, pareto, intervals):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
