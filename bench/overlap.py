"""Seconds of a local step where syncs overlap with the next ones: python bench/overlap.py [--out FILE] (as root).

Gloo processes behind links of 100 Mb/s, laid as in plan_check.py, train LeNet-5 on made-up images: LocalSGD with and
without `overlap_steps`, in float32 and with a wire_dtype of bfloat16, each with a model of its own, in turn. Rounds
are timed from barrier to barrier, from a step where nothing is under way to the same step of a later round. Beside
them stand the seconds of steps that never sync, and what `fastlocal plan` predicts from those. One JSON line a
setting is appended to the file.
"""

import os
import statistics
from collections.abc import Iterator

import torch
import torch.distributed as dist
from plan_check import PAYLOAD_SHARE, RATE_GBPS, barrier_and_latency, measure_and_record, seconds
from torch import nn

from fastlocal import LocalSGD
from fastlocal.bench import machine
from fastlocal.train.model import build
from fastlocal.train.plan import Link, Plan, WireDtype, estimate

INTERVAL, ROUNDS, TURNS, BATCH = 16, 3, 7, 16
SETTINGS: tuple[tuple[WireDtype, int], ...] = (("fp32", 0), ("fp32", 8), ("fp32", 15), ("bf16", 0), ("bf16", 8))
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def work(workers: int) -> dict:
    """What one process measures."""
    torch.manual_seed(dist.get_rank())
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))

    def trained(wire: WireDtype, overlap: int, interval: int = INTERVAL) -> tuple[nn.Module, LocalSGD]:
        model = build("lenet")
        inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return model, LocalSGD(inner, model, interval, wire_dtype=DTYPES[wire], overlap_steps=overlap)

    def steps(model: nn.Module, optimizer: LocalSGD, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    kinds = [trained(*setting) for setting in SETTINGS] + [trained("fp32", 0, interval=10**9)]
    for kind in kinds:
        steps(*kind, INTERVAL + max(overlap for _, overlap in SETTINGS))  # the first sync has come
    _, latency = barrier_and_latency(workers)
    turns = [[seconds(steps, *kind, ROUNDS * INTERVAL) / (ROUNDS * INTERVAL) for kind in kinds] for _ in range(TURNS)]
    return {
        "latency_seconds": latency,
        "parameters": sum(p.numel() for p in kinds[0][0].parameters()),
        "turns": turns,
        "seconds_in_sync": [k[1].stats.seconds_in_sync / max(k[1].stats.rounds, 1) for k in kinds],
    }


def lines(workers: int, measured: dict) -> Iterator[tuple[dict, str]]:
    """One record a setting, and what to say of it."""
    link = Link(RATE_GBPS, measured["latency_seconds"], PAYLOAD_SHARE)
    *columns, alone = zip(*measured["turns"], strict=True)
    step = statistics.median(alone)
    for (wire, overlap), column, in_sync in zip(SETTINGS, columns, measured["seconds_in_sync"][:-1], strict=True):
        plan = Plan(
            measured["parameters"], workers, step, link, interval=INTERVAL, wire_dtype=wire, overlap_steps=overlap
        )
        taken, predicted = statistics.median(column), estimate(plan).step_seconds
        record = {
            **machine.origin("cpu"),
            "threads": 1,
            "cores": os.cpu_count(),
            "link": f"tc tbf {RATE_GBPS} Gb/s; gloo",
            "workers": workers,
            "parameters": measured["parameters"],
            "batch": BATCH,
            "interval": INTERVAL,
            "wire_dtype": wire,
            "overlap_steps": overlap,
            "step_seconds": round(taken, 5),
            "step_seconds_without_syncs": round(step, 5),
            "step_seconds_predicted": round(predicted, 5),
            "seconds_in_sync_a_round": round(in_sync, 4),
            "turns": [round(value, 5) for value in column],
        }
        yield (
            record,
            f"{workers} workers, {wire}, overlap_steps={overlap:2d}: {1e3 * taken:.1f} ms a step, predicted "
            f"{1e3 * predicted:.1f}; without syncs {1e3 * step:.1f}",
        )


if __name__ == "__main__":
    measure_and_record(__doc__, __file__, [2, 4], work, lines)
