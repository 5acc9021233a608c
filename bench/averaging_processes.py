"""What does one averaging of four processes cost? fastlocal beside PyTorch's averager and other ways to do it.

    python bench/averaging_processes.py [--sizes lenet resnet18 bert-base] [--turns 15] [--out FILE.jsonl]

Four gloo processes of one thread each on this machine; the methods take turns, in an order that moves on each turn. A
turn's time is that of the slowest process. The rows "per tensor" and "buckets" are the operations that accelerate's
LocalSGD and torchft's bucketed all-reduce issue, written out, not those libraries. A round of fastlocal holds all of
its messages: headers, the check for values that are not finite, the outer step.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.multiprocessing.spawn import spawn

import fastlocal
from fastlocal.bench import machine
from fastlocal.bench.shapes import SHAPES

WORLD = 4
PORT = 29_512
BUCKET_BYTES = 32 * 2**20


def make(size: str) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.rand(shape)) for shape in SHAPES[size]()])


def wrapped(kind: type[fastlocal.LocalSGD], size: str) -> tuple[fastlocal.LocalSGD, nn.Module]:
    """Without gradients the inner step does nothing: a step is a round and nothing else."""
    model = make(size)
    return kind(torch.optim.SGD(model.parameters(), lr=1.0), model, 1, buffers="keep"), model


def pytorch_averager(parameters: list[nn.Parameter]) -> Callable[[], None]:
    averager = PeriodicModelAverager(period=2)
    for parameter in parameters:  # it takes those that have a gradient
        parameter.grad = torch.zeros(()).expand_as(parameter)

    def average() -> None:
        averager.step = 0
        averager.average_parameters(iter(parameters))

    return average


def per_tensor(parameters: list[nn.Parameter]) -> None:
    """As accelerate's LocalSGD: a barrier; then for each tensor clone, all-reduce, scale, re-point."""
    dist.barrier()
    for parameter in parameters:
        copy = parameter.detach().clone()
        dist.all_reduce(copy)
        parameter.data = copy.mul_(1 / WORLD)


def buckets(parameters: list[nn.Parameter]) -> None:
    """Like torchft's buckets: pack, all-reduce, divide, unpack. 32 MiB is our choice; its default is one bucket."""
    groups: list[list[Tensor]] = [[]]
    for parameter in parameters:
        if sum(p.nbytes for p in groups[-1]) + parameter.nbytes > BUCKET_BYTES and groups[-1]:
            groups.append([])
        groups[-1].append(parameter.detach())
    works = []
    for group in groups:
        flat = torch.cat([p.reshape(-1) for p in group])
        works.append((dist.all_reduce(flat, async_op=True), flat, group))
    for work, flat, group in works:
        assert work is not None
        work.wait()
        flat.div_(WORLD)
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            parameter.copy_(part.view_as(parameter))


def measure(rank: int, folder: str, size: str, turns: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=WORLD)
    peers = list(make(size).parameters())
    row = torch.zeros(sum(p.numel() for p in peers))
    average, local, slow = pytorch_averager(peers), wrapped(fastlocal.LocalSGD, size), wrapped(fastlocal.SlowMo, size)
    calls: dict[str, Callable[[], object]] = {
        "fastlocal.LocalSGD": local[0].step,
        "fastlocal.SlowMo": slow[0].step,
        "PeriodicModelAverager": average,
        "per tensor": lambda: per_tensor(peers),
        "buckets": lambda: buckets(peers),
        "all_reduce alone": lambda: dist.all_reduce(row),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(turns + 2):  # two to warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            started = time.perf_counter()
            calls[name]()
            slowest = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if turn >= 2:
                seconds[name].append(slowest.item())
    if rank == 0:
        sent = local[0].stats.bytes_on_wire // local[0].stats.rounds
        Path(folder, "seconds.json").write_text(json.dumps({"seconds": seconds, "bytes": sent}))
    dist.destroy_process_group()


def main() -> None:
    """Print a table, and append rows to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["lenet", "resnet18", "bert-base"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for size in arguments.sizes:
        shapes = SHAPES[size]()
        with tempfile.TemporaryDirectory() as folder:
            spawn(measure, (folder, size, arguments.turns), nprocs=WORLD)
            found = json.loads(Path(folder, "seconds.json").read_text())
        for name, values in found["seconds"].items():
            p20, *_, p80 = statistics.quantiles(values, n=5)
            p50 = statistics.median(values)
            print(f"{size:10} {name:22} {p50 * 1e3:9.2f} ms  ({p20 * 1e3:.2f} to {p80 * 1e3:.2f})", flush=True)
            row = {
                **machine.origin("cpu"),
                "threads": 1,
                "cores": os.cpu_count(),
                "method": name,
                "size": size,
                "tensors": len(shapes),
                "parameters": sum(torch.Size(shape).numel() for shape in shapes),
                "processes": WORLD,
                "seconds_p20": p20,
                "seconds_p50": p50,
                "seconds_p80": p80,
                "turns": arguments.turns,
                "bytes_on_wire": found["bytes"],
            }
            machine.append_rows(arguments.out, row)


if __name__ == "__main__":
    main()
