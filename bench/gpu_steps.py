"""A step of LARS and LAMB on a GPU beside torch's fused optimizers: what the device takes, and what the host takes.

    python bench/gpu_steps.py [--out steps.jsonl]

"device" is the time between two events with everything issued before the first; "graph" is a replay of the captured
step; "host" is the time until `step()` returns while the device is busy; "eager" is a step and the wait for it,
from an idle device. Gradients stay where they are, or move to other addresses at every step ("moved").
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastlocal import LAMB, LARS
from fastlocal.bench import machine
from fastlocal.bench.measure import event_seconds
from fastlocal.bench.shapes import SHAPES, num_parameters
from fastlocal.kernels.launch import queue_constants

TURNS = 30
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
CONTENDERS: dict[str, dict[str, Make]] = {
    "lamb": {
        "fastlocal LAMB": lambda p: LAMB(p, weight_decay=0.01, capturable=True),
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, capturable=True),
    },
    "lars": {
        "fastlocal LARS": lambda p: LARS(p, lr=0.1, weight_decay=1e-4, capturable=True),
        "torch SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    },
}
FLOAT32 = (torch.device("cuda"), torch.float32)
FLOORS = {"fastlocal LAMB": 40, "fastlocal LARS": 28, "torch AdamW fused": 28, "torch SGD fused": 20}


def host_seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def eager_seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def graph_of(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def measure(make: Make, shapes: Any) -> dict[str, float]:
    """Median microseconds of each kind."""
    params = [torch.nn.Parameter(0.05 * torch.randn(shape, device="cuda")) for shape in shapes]
    grads = [[0.01 * torch.randn_like(p) for p in params] for _ in range(2)]
    optimizer, turn = make(params), 0

    def give(which: int) -> None:
        for p, g in zip(params, grads[which], strict=True):
            p.grad = g

    def median(clock: Callable[[Callable[[], object]], float], call: Callable[[], object], moves: bool) -> float:
        nonlocal turn
        times = []
        for _ in range(TURNS):
            turn += moves
            give(turn % 2)
            times.append(clock(call))
        return 1e6 * statistics.median(times)

    give(0)
    for _ in range(3):
        optimizer.step()
    found = {}
    for name, moves in (("", False), (" moved", True)):
        found[f"device{name}"] = median(event_seconds, optimizer.step, moves)
        found[f"host{name}"] = median(host_seconds, optimizer.step, moves)
        found[f"eager{name}"] = median(eager_seconds, optimizer.step, moves)
    give(0)
    found["graph"] = median(event_seconds, graph_of(optimizer.step).replay, False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SHAPES), default=["lenet", "resnet50", "bert-base"])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    for size in given.sizes:
        shapes = SHAPES[size]()
        parameters = num_parameters(shapes)
        source, target = torch.zeros(2, parameters, device="cuda").unbind()
        copy = statistics.median(event_seconds(lambda s=source, t=target: t.copy_(s)) for _ in range(TURNS))
        for kind, contenders in CONTENDERS.items():
            for name, make in contenders.items():
                found = measure(make, shapes)
                row = {"size": size, "tensors": len(shapes), "parameters": parameters, "contender": name}
                share = None
                if 8 * parameters > 2 * machine.cache_bytes("cuda"):  # else the copy may come from the cache
                    share = FLOORS[name] * parameters / found["device"] * 1e6 / (8 * parameters / copy)
                # (block, warps, lag) where a step is one launch, which may move less than FLOORS says.
                one_launch = queue_constants(f"{kind}_step", *FLOAT32) if name.startswith("fastlocal") else None
                row |= {"share_of_copy": share, "one_launch": one_launch}
                row |= {f"{what} us".replace(" ", "_"): us for what, us in found.items()}
                times = "  ".join(f"{what} {us:.0f}" for what, us in found.items())
                shown = "copy in the cache" if share is None else f"{100 * share:5.1f} % of copy"
                print(f"{size:9} {name:18} {shown}; us: {times}", flush=True)
                machine.append_rows(given.out, {**machine.origin("cuda"), **row})


if __name__ == "__main__":
    main()
