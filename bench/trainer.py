"""Where does the trainer's time go? Images a second, and the share of each part, over K, J and the network.

    python bench/trainer.py [--threads 2] [--steps 60] [--out trainer.jsonl]

Each row is one short run on the synthetic images. A step is one local step of all K workers, the median over the run,
and its share of a sync. Augmentation and optimizer are timed by themselves afterwards, on the same objects;
"networks" is what is left: forward and backward.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout nobody installed must be measurable

from fastlocal.bench import machine
from fastlocal.train import data
from fastlocal.train.allocator import keep_freed_memory
from fastlocal.train.config import Config
from fastlocal.train.loop import Training
from fastlocal.train.processes import Processes
from fastlocal.train.record import Standing

CPU = torch.device("cpu")
CASES: list[dict[str, Any]] = [
    *({"workers": k, "interval": 16, "precision": "bf16"} for k in (1, 2, 4, 8)),
    *({"workers": 4, "interval": j, "precision": "bf16"} for j in (1, 4, 64)),
    *({"workers": 4, "interval": 16, "precision": "bf16", "method": method} for method in ("slowmo", "sync")),
    {"workers": 4, "interval": 16, "precision": "fp32"},
    {"workers": 2, "interval": 16, "precision": "bf16", "model": "resnet18"},
]


def measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """One row: milliseconds of a step of all workers and of its parts."""
    steps = max(4, steps // 10) if case.get("model") == "resnet18" else steps
    images = 100 * -(-steps * 64 * case["workers"] * 5 // 400)  # four fifths of them are trained on, 100 classes
    config = Config(epochs=1, synthetic_images=images, **case)
    moments: list[float] = []

    def on_step(standing: Standing) -> None:
        moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, data.load(config), Path(folder) / "checkpoint.pt", CPU, Processes(), on_step)
        for _ in training.epochs():
            pass
    stats = training.optimizer.stats
    durations = [after - before for before, after in itertools.pairwise(moments)]
    sync = stats.seconds_in_sync / stats.local_steps
    syncs_always = stats.rounds == stats.local_steps
    step = statistics.median(durations) + (0 if syncs_always else sync)  # the median step does not end a round
    plans = [augmenter.plan(torch.Generator().manual_seed(0)) for augmenter in training.data]
    augment = median(lambda: [a.batch(plan[:, :64]) for a, plan in zip(training.data, plans, strict=True)])
    optimizer = median(training.optimizer.inner.step)
    parts = {"augmentation": augment, "optimizer": optimizer, "sync": sync}
    parts["networks"] = step - sum(parts.values())
    return {
        "case": case,
        "step_ms": 1e3 * step,
        "images_per_second": config.workers * config.batch_size / step,
        **{f"{name}_percent": 100 * seconds / step for name, seconds in parts.items()},
    }


def median(call: Callable[[], object], repeats: int = 30) -> float:
    """Seconds of one call."""
    seconds = []
    for _ in range(repeats + 3):  # three to warm up
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


def gemm_gigaflops() -> float:
    """What the machine reaches on a large bfloat16 matrix product: the ceiling for the convolutions."""
    a, b = torch.randn(2, 2048, 2048).bfloat16()
    return 2 * 2048**3 / median(lambda: a @ b, 15) / 1e9


def main() -> None:
    """Measure every case and append one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    common = {**machine.origin("cpu"), "gemm_bf16_gflops": round(gemm_gigaflops(), 1)}
    for case in CASES:
        row = {
            **common,
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in measure(case, arguments.steps).items()},
        }
        print(json.dumps(row), flush=True)
        machine.append_rows(arguments.out, row)


if __name__ == "__main__":
    main()
