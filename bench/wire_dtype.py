"""Seconds of a sync over a slow link, of parameters and of rounded progress: python bench/wire_dtype.py [--out FILE]
(as root).

Gloo processes behind links of 100 Mb/s, laid as in plan_check.py. A round without gradients is a sync of LeNet-5's
parameters and nothing else; those with wire_dtype=None, bfloat16 and float8_e4m3fn are timed in turn, from barrier to
barrier. One JSON line a method and number of processes is appended to the file.
"""

import os
import statistics
from collections.abc import Iterator

import torch
from plan_check import RATE_GBPS, measure_and_record, seconds

from fastlocal import LocalSGD, SlowMo
from fastlocal.bench import machine
from fastlocal.train.model import build

METHODS, TURNS = {"LocalSGD": LocalSGD, "SlowMo": SlowMo}, 9
DTYPES = (None, torch.bfloat16, torch.float8_e4m3fn)


def work(workers: int) -> dict:
    """What one process measures, by method."""
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
    return measured


def lines(workers: int, measured: dict) -> Iterator[tuple[dict, str]]:
    """One record a method, and what to say of it."""
    for method, found in measured.items():
        plain, halved, quartered = (statistics.median(column) for column in zip(*found["seconds"], strict=True))
        record = {
            **machine.origin("cpu"),
            "threads": 1,
            "cores": os.cpu_count(),
            "link": f"tc tbf {RATE_GBPS} Gb/s; gloo",
            "method": method,
            "workers": workers,
            "parameters": found["parameters"],
            "bytes_a_sync": found["bytes"],
            "seconds": round(plain, 4),
            "seconds_bfloat16": round(halved, 4),
            "seconds_float8": round(quartered, 4),
            "turns": [[round(value, 4) for value in turn] for turn in found["seconds"]],
        }
        said = f"{plain:.3f} s a sync, with a bfloat16 wire {halved:.3f}, with float8 {quartered:.3f}"
        yield record, f"{workers} workers, {method}: {said}"


if __name__ == "__main__":
    measure_and_record(__doc__, __file__, [2, 4], work, lines)
