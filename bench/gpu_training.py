"""How long does a training run take on a GPU? LeNet, seconds and accuracy, for one worker and for several.

    python bench/gpu_training.py [--workers 1 8] [--epochs 150] [--data-dir data] [--out training.jsonl]

Needs torch, triton and numpy, and no package of the command line. Trains on CIFAR-100 where DIR/cifar-100-python
is, else on as many synthetic images. One JSON line a run; a run that reaches --seconds stops after its epoch and
says how many it has done.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastlocal.bench import machine
from fastlocal.train import data
from fastlocal.train.config import Config
from fastlocal.train.loop import Training
from fastlocal.train.processes import Processes


class Unsaved(Training):
    """A checkpoint after each epoch would take as long as an epoch of eight workers does on a GPU."""

    def save(self) -> None:
        """Nobody resumes this run."""


def rate(training: Training) -> float:
    """Images a second, without the first epoch, in which kernels are compiled and the graph is captured."""
    first, last = training.records[0], training.records[-1]
    if first is last:
        return training.train_samples / last.train_seconds
    return training.train_samples * (1 - 1 / last.epoch) / (last.train_seconds - first.train_seconds)


def train(config: Config, device: torch.device, limit: float) -> dict[str, Any]:
    """One run."""
    began = time.perf_counter()
    splits = data.load(config)
    with tempfile.TemporaryDirectory() as folder:
        training = Unsaved(config, splits, Path(folder) / "checkpoint.pt", device, Processes())
        loaded = time.perf_counter()
        for record in training.epochs():
            if record.epoch % 10 == 0:
                print(
                    f"epoch {record.epoch:3} {record.train_seconds:7.1f} s  val {record.val_accuracy} %", flush=True
                )
            if time.perf_counter() - began > limit:
                break
        last = training.records[-1]
        test_loss, test_accuracy = training.test()
    return {
        **machine.origin(device.type),
        "dataset": config.dataset,
        "workers": config.workers,
        "precision": config.precision,
        "epochs": last.epoch,
        "of_epochs": config.epochs,
        "load_seconds": loaded - began,
        "train_seconds": last.train_seconds,
        "all_seconds": time.perf_counter() - began,
        "images_per_second": rate(training),
        "graph": training.gradients.graph is not None,
        "rounds": last.rounds,
        "sync_seconds": last.sync_seconds,
        "excluded": last.excluded,
        "val_accuracy": last.val_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--images", type=int, default=50_000, help="of the synthetic set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each run")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    real = (given.data_dir / "cifar-100-python" / "train").exists()
    for workers in given.workers:
        images: dict[str, Any] = {"dataset": "cifar100"} if real else {"synthetic_images": given.images}
        config = Config(
            **images,
            data_dir=given.data_dir,
            workers=workers,
            epochs=given.epochs,
            policy="val-loss",
            precision=given.precision,
        )
        row = train(config, torch.device(given.device), given.seconds)
        print(json.dumps(row), flush=True)
        machine.append_rows(given.out, row)


if __name__ == "__main__":
    main()
