"""How long a LAMB and a LARS step take on this CPU, beside timm, pytorch_optimizer and torch's fused steps.

    python bench/optimizers_cpu.py [--model resnet50] [--threads 2] [--rounds 15] [--compiled] [--out FILE]

Every contender steps its own copy of the model's tensors once a round, in turn, in one process, so that a
noisy neighbour hits all of them; ratios are taken within a round. timm and pytorch_optimizer are measured
where installed. Prints a table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastlocal import LAMB, LARS  # noqa: E402 - a checkout nobody installed must be measurable
from fastlocal.bench import machine  # noqa: E402
from fastlocal.bench.installed import installed_optimizers  # noqa: E402
from fastlocal.bench.shapes import SHAPES  # noqa: E402

Make = Callable[[list[torch.nn.Parameter]], Any]


class Compiled:
    """An optimizer whose step is compiled: its first takes as long as that does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step = torch.compile(optimizer.step)


def contenders(compiled: bool) -> dict[str, dict[str, Make]]:
    """By algorithm, by name, the constructors; equal options, ours first, and if asked for, ours compiled."""
    lamb: dict[str, Make] = {"fastlocal": lambda p: LAMB(p, weight_decay=0.01)}
    clip: dict[str, Make] = {"fastlocal": lambda p: LAMB(p, weight_decay=0.01, max_grad_norm=1.0)}
    lars: dict[str, Make] = {"fastlocal": lambda p: LARS(p, lr=0.1, weight_decay=1e-4)}
    peers, _ = installed_optimizers()
    if "timm" in peers:
        timm_lamb, timm_lars = peers["timm"]
        lamb["timm"] = lambda p: timm_lamb(p, weight_decay=0.01, max_grad_norm=None)
        clip["timm"] = lambda p: timm_lamb(p, weight_decay=0.01, max_grad_norm=1.0)
        lars["timm"] = lambda p: timm_lars(p, lr=0.1, momentum=0.9, weight_decay=1e-4)
    if "pytorch_optimizer" in peers:
        peer_lamb, peer_lars = peers["pytorch_optimizer"]
        lamb["pytorch_optimizer"] = lambda p: peer_lamb(p, weight_decay=0.01, weight_decouple=False)
        clip["pytorch_optimizer"] = lambda p: peer_lamb(p, weight_decay=0.01, weight_decouple=False, pre_norm=True)
        lars["pytorch_optimizer"] = lambda p: peer_lars(p, lr=0.1, momentum=0.9, weight_decay=1e-4)
    lamb["torch AdamW fused"] = lambda p: torch.optim.AdamW(p, fused=True)
    lars["torch SGD fused"] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)
    found = {"LAMB": lamb, "LAMB, clipped": clip, "LARS": lars}
    if compiled:
        for makers in found.values():
            makers["fastlocal compiled"] = lambda p, make=makers["fastlocal"]: Compiled(make(p))
    return found


def make_params(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Weights of a trained network's size, with gradients that stay the same."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.05 * torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def measure(makers: dict[str, Make], shapes: list[tuple[int, ...]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step of each contender, and how many of ours fit into it."""
    optimizers = {name: make(make_params(shapes)) for name, make in makers.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in optimizers}
    first = {}
    for number in range(rounds + 2):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            elapsed = (time.perf_counter() - start) * 1e3
            if number == 0:
                first[name] = elapsed
            if number >= 2:
                milliseconds[name].append(elapsed)
    rows = {}
    for name, times in milliseconds.items():
        ratios = [t / ours for t, ours in zip(times, milliseconds["fastlocal"], strict=True)]
        low, high = statistics.quantiles(times, n=5)[0], statistics.quantiles(times, n=5)[-1]
        rows[name] = {
            "first_step_ms": round(first[name], 2),
            "median_ms": round(statistics.median(times), 3),
            "p20_ms": round(low, 3),
            "p80_ms": round(high, 3),
            "median_ratio": round(statistics.median(ratios), 2),
        }
    return rows


def copy_milliseconds(num_parameters: int) -> float:
    """One copy of as many float32 numbers: 8 bytes a parameter."""
    source, target = torch.rand(num_parameters), torch.empty(num_parameters)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--compiled", action="store_true", help="add our own steps under torch.compile")
    parser.add_argument("--out", type=Path, help="file to append a JSON line to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = SHAPES[arguments.model]()
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    record: dict[str, Any] = {
        **machine.origin("cpu"),
        "model": arguments.model,
        "tensors": len(shapes),
        "parameters": num_parameters,
        "dtype": "float32",
        "rounds": arguments.rounds,
        "copy_8_bytes_a_parameter_ms": copy_milliseconds(num_parameters),
        "rows": {},
    }
    print(f"{arguments.model}: {len(shapes)} tensors, {num_parameters:,} parameters")
    print(f"{arguments.threads} threads; copy of as many float32: {record['copy_8_bytes_a_parameter_ms']} ms")
    for algorithm, makers in contenders(arguments.compiled).items():
        record["rows"][algorithm] = measure(makers, shapes, arguments.rounds)
        for name, row in record["rows"][algorithm].items():
            spread = f"({row['p20_ms']:.2f} to {row['p80_ms']:.2f})"
            ratio = f"{row['median_ratio']:.2f}x ours, first step {row['first_step_ms']:.1f} ms"
            print(f"{algorithm:14} {name:18} {row['median_ms']:9.2f} ms {spread:20} {ratio}")
    machine.append_rows(arguments.out, record)


if __name__ == "__main__":
    main()
