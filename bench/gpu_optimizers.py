"""LAMB and LARS on a CUDA device beside torch's fused AdamW and SGD, as a share of copy bandwidth.

    python bench/gpu_optimizers.py [--models resnet50 bert-base bert-large tiny] [--rounds 50]

Several sets of tensors are stepped in turn, so that no step finds its tensors in the L2 cache. Times are CUDA
events around one step, which include the host's where that is longer, and the host's time to issue a step.
Bytes are counted, not measured: what a step moves if every phase reads and writes its tensors once. Appends
one JSON line a model to bench/results/gpu_optimizers.jsonl.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from shapes import SHAPES, Shapes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastlocal import LAMB, LARS  # noqa: E402 - a checkout nobody installed must be measurable

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

# Name: how to make it, bytes a float32 parameter.
CONTENDERS: dict[str, tuple[Make, int]] = {
    "LAMB": (lambda p: LAMB(p, weight_decay=0.01, fused=True), 40),
    "LAMB, clipped": (lambda p: LAMB(p, weight_decay=0.01, max_grad_norm=1.0, fused=True), 44),
    "LAMB, portable": (lambda p: LAMB(p, weight_decay=0.01, foreach=True), 40),
    "torch AdamW fused": (lambda p: torch.optim.AdamW(p, fused=True), 28),
    "torch AdamW foreach": (lambda p: torch.optim.AdamW(p, foreach=True), 28),
    "LARS": (lambda p: LARS(p, lr=0.1, weight_decay=1e-4, fused=True), 28),
    "LARS, portable": (lambda p: LARS(p, lr=0.1, weight_decay=1e-4, foreach=True), 28),
    "torch SGD fused": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True), 20),
    "torch SGD foreach": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True), 20),
}


def make_params(shapes: Shapes) -> list[torch.nn.Parameter]:
    """Weights of a trained network's size, with gradients that stay the same."""
    params = [torch.nn.Parameter(0.05 * torch.randn(shape, device="cuda")) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def event_milliseconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds on the device, and until the host had issued everything."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before = time.perf_counter()
    start.record()
    function()
    end.record()
    host = (time.perf_counter() - before) * 1e3
    torch.cuda.synchronize()
    return start.elapsed_time(end), host


def spread(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}


def measure(make: Make, shapes: Shapes, num_bytes: int, copy_rate: float, rounds: int) -> dict[str, Any]:
    """One contender on one model; copy_rate in bytes a millisecond."""
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    num_sets = max(1, min(4, 500_000_000 // (4 * num_parameters)))  # past a 60 MB cache, within the memory
    optimizers = [make(make_params(shapes)) for _ in range(num_sets)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    device, host = [], []
    for number in range(rounds):
        on_device, on_host = event_milliseconds(optimizers[number % num_sets].step)
        device.append(on_device)
        host.append(on_host)
    moved = num_bytes * num_parameters
    median = statistics.median(device)
    return {
        "ms": spread(device),
        "host_ms": spread(host),
        "bytes_a_parameter": num_bytes,
        "share_of_copy_bandwidth": moved / median / copy_rate,
    }


def copy_bytes_a_millisecond() -> float:
    """What one device-to-device copy of a gigabyte moves, reads and writes counted."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    times = [event_milliseconds(lambda: target.copy_(source))[0] for _ in range(20)]
    return 2 * 4 * source.numel() / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["resnet50", "bert-base", "bert-large", "tiny"]
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=models)
    parser.add_argument("--rounds", type=int, default=50)
    results = ROOT / "bench/results/gpu_optimizers.jsonl"
    parser.add_argument("--out", type=Path, default=results)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    copy_rate = copy_bytes_a_millisecond()
    print(f"{torch.cuda.get_device_name()}: copy {copy_rate / 1e9:.2f} TB/s")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        shapes = SHAPES[model]()
        rows = {}
        for name, (make, num_bytes) in CONTENDERS.items():
            row = rows[name] = measure(make, shapes, num_bytes, copy_rate, arguments.rounds)
            share = 100 * row["share_of_copy_bandwidth"]
            times = f"{row['ms']['median']:8.3f} ms, host {row['host_ms']['median']:.3f} ms"
            print(f"{model:12} {name:20} {times}, {share:5.1f} % of copy")
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "model": model,
            "tensors": len(shapes),
            "parameters": sum(torch.Size(shape).numel() for shape in shapes),
            "dtype": "float32",
            "rounds": arguments.rounds,
            "copy_terabytes_a_second": copy_rate / 1e9,
            "rows": rows,
        }
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
