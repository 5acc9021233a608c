"""How fast is a sync? Each operation beside the copy bandwidth of the same machine, and beside plain PyTorch.

    python bench/averaging.py [--device cuda] [--out bench/results/averaging-DEVICE.jsonl]

Operations take turns within one process; the buffers of a turn are not those of the turn before, and together
larger than any cache. A row is a median with the 20th and 80th percentile, the bytes counted from the formula,
and the share of the copy bandwidth.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastlocal
from fastlocal.ops import averaging as ops

SIZES = {"lenet": 815_344, "resnet18": 11_220_160, "124M": 124_000_000}
WORKERS = (1, 2, 4, 8, 16)
DECAY = 0.5


class Buffers:
    """One set of everything that an operation reads and writes."""

    def __init__(self, k: int, n: int, device: str) -> None:
        self.rows = torch.randn(k, n, device=device)
        self.anchor = torch.randn(n, device=device)
        self.slow = torch.zeros(n, device=device)
        self.weights = torch.ones(k, device=device)
        self.parts = torch.empty(k, ops.num_drift_parts(n), device=device)


def plain_average(b: Buffers) -> None:
    """The mean and its write-back as anybody would write them."""
    b.rows.copy_(b.rows.mean(dim=0).expand_as(b.rows))


def plain_slowmo(b: Buffers) -> None:
    """The outer step in the fewest PyTorch operations we know."""
    delta = b.anchor - b.rows.mean(dim=0)
    b.slow.mul_(DECAY).add_(delta)
    b.anchor.sub_(b.slow)
    b.rows.copy_(b.anchor.expand_as(b.rows))


def operations(k: int) -> dict[str, tuple[Callable[[Buffers], object], int]]:
    """Name -> (call, bytes a parameter). The plain ones neither weigh rows nor measure drift."""
    return {
        "finite_rows": (lambda b: ops.finite_rows(b.rows), 4 * k),
        "average_": (lambda b: ops.average_(b.rows, b.weights, b.parts), 8 * k),
        "plain average": (plain_average, 8 * k),
        "outer_step_": (
            lambda b: ops.outer_step_(
                b.rows, b.anchor, b.slow, b.weights, b.parts, direct=0.0, momentum=1.0, decay=DECAY, gain=1.0
            ),
            8 * k + 16,
        ),
        "plain slowmo": (plain_slowmo, 8 * k + 16),
        "copy": (lambda b: b.anchor.copy_(b.rows[0]), 8),
    }


def measure(device: str, k: int, n: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each operation in each turn."""
    num_sets = max(2, 1 + 300_000_000 // (4 * n * (k + 2)))
    sets = [Buffers(k, n, device) for _ in range(num_sets)]
    table = operations(k)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(turns + 2):  # two to warm up
        for index, (name, (call, _)) in enumerate(table.items()):
            buffers = sets[(turn + index) % num_sets]
            if device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call(buffers)
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end) / 1e3
            else:
                started = time.perf_counter()
                call(buffers)
                elapsed = time.perf_counter() - started
            if turn >= 2:
                seconds[name].append(elapsed)
    return seconds


def main() -> None:
    """Print a table, and append rows to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    described = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout
    rows = []
    for size in arguments.sizes:
        for k in WORKERS:
            n = SIZES[size]
            seconds = measure(arguments.device, k, n, arguments.turns)
            copy_rate = 8 * n / statistics.median(seconds["copy"])
            for name, (_, bytes_per_parameter) in operations(k).items():
                p20, *_, p80 = statistics.quantiles(seconds[name], n=5)
                p50 = statistics.median(seconds[name])
                rate = bytes_per_parameter * n / p50
                print(
                    f"{size:9} K={k:2}  {name:14} {p50 * 1e3:9.3f} ms  {bytes_per_parameter:3d} B/param  "
                    f"{rate / 1e9:8.1f} GB/s  {100 * rate / copy_rate:6.1f} % of copy",
                    flush=True,
                )
                rows.append(
                    {
                        "operation": name,
                        "size": size,
                        "parameters": n,
                        "workers": k,
                        "dtype": "float32",
                        "seconds_p20": p20,
                        "seconds_p50": p50,
                        "seconds_p80": p80,
                        "bytes_per_parameter": bytes_per_parameter,
                        "share_of_copy": rate / copy_rate,
                        "device": described,
                        "torch": torch.__version__,
                        "fastlocal": fastlocal.__version__,
                        "commit": commit.strip(),
                    }
                )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
