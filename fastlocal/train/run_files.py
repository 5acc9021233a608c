"""What a run leaves behind: config.json, records.jsonl, summary.json. Never sees the model."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastlocal
from fastlocal.bench.machine import device_name
from fastlocal.train.checkpoint import write_bytes
from fastlocal.train.config import Config
from fastlocal.train.errors import UsageError
from fastlocal.train.kinds import wrong
from fastlocal.train.record import Record


def versions(device: torch.device) -> dict[str, str]:
    """What a figure depends on beside its config."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else f"{device_name('cpu')}, {os.cpu_count()} processors"
    return {
        "fastlocal": fastlocal.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
    }


def summarise(
    config: Config,
    records: Sequence[Record],
    *,
    test_loss: float | None,
    test_accuracy: float | None,
    train_samples: int,
    interval_trace: list[list[int]],
    images: dict[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """One run in figures. Accuracies are percent, bytes are one worker's.

    Args:
        config: the run.
        records: all its epochs.
        test_loss: cross-entropy on the test images; None where they were not looked at.
        test_accuracy: percent, or None.
        train_samples: images trained on, all workers together.
        interval_trace: [local step, interval] wherever the interval changed.
        images: where they come from, and the SHA-256 over all of them.
        device: where it ran.
    """
    last = records[-1]
    synchronous = last.bytes_synchronous
    accuracies = [record.val_accuracy for record in records if record.val_accuracy is not None]
    return {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "best_val_accuracy": max(accuracies),
        "val_accuracy": accuracies[-1],
        "train_samples": train_samples,
        "local_steps": last.local_steps,
        "rounds": last.rounds,
        "bytes_on_wire": last.bytes_on_wire,
        "bytes_synchronous": synchronous,
        "communication_reduction": 1 - last.bytes_on_wire / synchronous if synchronous else None,
        "excluded": last.excluded,
        "sync_seconds": last.sync_seconds,
        "train_seconds": last.train_seconds,
        "samples_per_second": train_samples / last.train_seconds,
        "interval_trace": interval_trace,
        "folder": str(config.folder),
        "config": config.as_dict(),
        "resolved": config.resolved(),
        "images": images,
        "versions": versions(device),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UsageError if the file holds none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return value


def read_summary(folder: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run; UsageError if it cannot be read, or lacks something of a shape in `kinds`."""
    path = folder / "summary.json"
    summary = read_json(path)
    if told := wrong(summary, shape):
        raise UsageError(f"{path} is no summary of a run: {told}; delete it to finish the run again")
    return summary


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; RunError if it cannot be written."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write one JSON object a line; RunError if it cannot be written."""
    write_bytes(path, "".join(json.dumps(asdict(record)) + "\n" for record in records).encode())
