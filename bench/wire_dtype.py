"""Seconds of a sync over a slow link, of parameters and of rounded progress: python bench/wire_dtype.py (as root).

Gloo processes behind links of 100 Mb/s, laid as in plan_check.py. A round without gradients is a sync of LeNet-5's
parameters and nothing else; those with wire_dtype=None and with torch.bfloat16 are timed in turn, from barrier to
barrier. One JSON line a method and number of processes is appended to bench/results/wire_dtype_seconds.jsonl.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from plan_check import RATE_GBPS, ROOT, measure, meet, seconds

from fastlocal import LocalSGD, SlowMo
from fastlocal.bench.machine import device_name
from fastlocal.train.model import build

METHODS, DTYPES, TURNS = {"LocalSGD": LocalSGD, "SlowMo": SlowMo}, (None, torch.bfloat16), 9
RESULTS = ROOT / "bench" / "results" / "wire_dtype_seconds.jsonl"


def work(rank: int, workers: int, out: Path) -> None:
    """One process: measures, and rank 0 writes what it measured."""
    meet(rank, workers)
    measured = {}
    for name, kind in METHODS.items():
        optimizers = []
        for dtype in DTYPES:
            model = build("lenet")
            inner = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizers.append(kind(inner, model, 1, wire_dtype=dtype))
            optimizers[-1].step()
        turns = [[seconds(optimizer.step) for optimizer in optimizers] for _ in range(TURNS)]
        measured[name] = {
            "parameters": sum(p.numel() for p in optimizers[0].param_groups[0]["params"]),
            "bytes": [optimizer.stats.bytes_on_wire // optimizer.stats.rounds for optimizer in optimizers],
            "seconds": turns,
        }
    if rank == 0:
        out.write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Without --rank: set up, start the processes, record. With it: be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rank", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        work(arguments.rank, arguments.workers[0], arguments.out)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go in any case
    if os.geteuid() != 0:
        parser.error("namespaces and traffic shaping need root")
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for workers in arguments.workers:
        for method, found in measure(workers, __file__).items():
            plain, rounded = (statistics.median(column) for column in zip(*found["seconds"], strict=True))
            record = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": head.stdout.strip(),
                "device": device_name("cpu"),
                "cores": os.cpu_count(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "link": f"tc tbf {RATE_GBPS} Gb/s; gloo",
                "method": method,
                "workers": workers,
                "parameters": found["parameters"],
                "bytes_a_sync": found["bytes"],
                "seconds": round(plain, 4),
                "seconds_bfloat16": round(rounded, 4),
                "turns": [[round(value, 4) for value in turn] for turn in found["seconds"]],
            }
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{workers} workers, {method}: {plain:.3f} s a sync, with a bfloat16 wire {rounded:.3f}")


if __name__ == "__main__":
    main()
