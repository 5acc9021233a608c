"""Measure what `fastlocal plan` predicts: python bench/plan_check.py [--out plan_check.jsonl] (as root; needs
iproute2, nothing else).

Gloo processes in network namespaces of their own, joined by a bridge, each sending through a token bucket (tc tbf) of
100 Mb/s. A round is J real steps of LeNet-5 on made-up images and one flat all-reduce of the parameters, through
torch.distributed alone, so that what is measured is the link and not this library. The prediction is given the link's
rate, and two measured figures: the latency, from all-reduces of one element, and the seconds of a step while all
processes compute, from J steps without a sync before each round, since a shared machine is not equally fast all the
time. Everything is timed from barrier to barrier. One JSON line a setting is appended to the file.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastlocal.bench import machine  # noqa: E402 - a checkout nobody installed must be measurable
from fastlocal.train.model import build  # noqa: E402
from fastlocal.train.plan import Link, Plan, estimate  # noqa: E402

RATE_GBPS, BURST_BYTES, QUEUE_MS = 0.1, 65_536, 50
# The bucket counts Ethernet frames without gap and preamble, and a link carries the acknowledgements of what it
# receives: 1,448 bytes of payload in 1,514, and 66 bytes back for every second segment.
PAYLOAD_SHARE = 1448 / (1514 + 66 / 2)
ROUNDS, BATCH = {1: 8, 4: 6, 16: 4}, 16  # rounds timed, by interval; images a step


def sh(command: str) -> None:
    """Run one command; raise if it fails."""
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def lay_cables(workers: int) -> None:
    """A bridge in a namespace, and a namespace a worker behind a shaped link."""
    sh("ip netns add planhub")
    sh("ip -n planhub link add bridge0 type bridge")
    sh("ip -n planhub link set bridge0 up")
    for rank in range(workers):
        sh(f"ip netns add plan{rank}")
        sh(f"ip link add planveth{rank} type veth peer name planport{rank}")
        sh(f"ip link set planveth{rank} netns plan{rank}")
        sh(f"ip link set planport{rank} netns planhub")
        sh(f"ip -n planhub link set planport{rank} master bridge0 up")
        sh(f"ip -n plan{rank} addr add 10.231.7.{rank + 1}/24 dev planveth{rank}")
        sh(f"ip -n plan{rank} link set planveth{rank} up")
        sh(f"ip -n plan{rank} link set lo up")
        sh(
            f"ip netns exec plan{rank} tc qdisc add dev planveth{rank} root tbf rate {RATE_GBPS * 1e3:g}mbit "
            f"burst {BURST_BYTES}b latency {QUEUE_MS}ms"
        )


def remove_cables(workers: int) -> None:
    """Take the namespaces away, and the links with them."""
    for name in ["planhub", *(f"plan{rank}" for rank in range(workers))]:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def take_part(rank: int, workers: int, work: Callable[[int], dict], out: Path) -> None:
    """One process behind its link: meets the others and measures; rank 0 writes what it measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method="tcp://10.231.7.1:29517", rank=rank, world_size=workers)
    measured = work(workers)
    if rank == 0:
        out.write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def seconds(action: Callable[..., object], *arguments: object) -> float:
    """From barrier to barrier."""
    dist.barrier()
    started = time.perf_counter()
    action(*arguments)
    dist.barrier()
    return time.perf_counter() - started


def barrier_and_latency(workers: int) -> tuple[float, float]:
    """Seconds that two barriers with nothing between them take, and of one hop, from all-reduces of one element."""
    one = torch.zeros(1)
    barrier = statistics.median(seconds(lambda: None) for _ in range(20))
    tiny = statistics.median(seconds(dist.all_reduce, one) - barrier for _ in range(20))
    return barrier, max(tiny, 0.0) / (2 * (workers - 1))


def work(workers: int) -> dict:
    """What one process measures."""
    model = build("lenet")
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    offset = 0
    for p in parameters:  # views of one buffer: a sync is one all-reduce without packing
        p.data = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    def sync() -> None:
        dist.all_reduce(flat)
        flat.div_(workers)

    steps(5)
    sync()
    barrier, latency = barrier_and_latency(workers)
    measured = {"latency_seconds": latency, "rounds": {}}

    def a_round(interval: int) -> None:
        steps(interval)
        sync()

    for interval, rounds in ROUNDS.items():
        pairs = [[seconds(act, interval) - barrier for act in (steps, a_round)] for _ in range(rounds)]
        measured["rounds"][interval] = pairs
    measured["sync_seconds"] = [seconds(sync) - barrier for _ in range(5)]
    measured["parameters"] = flat.numel()
    return measured


def measure(workers: int, program: str) -> dict:
    """What rank 0 of `workers` processes in their namespaces measured; each runs the program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        processes: list[subprocess.Popen] = []
        try:
            lay_cables(workers)
            for rank in range(workers):
                flags = f"--rank {rank} --workers {workers} --out {out}".split()
                command = ["ip", "netns", "exec", f"plan{rank}", sys.executable, program, *flags]
                interface = {"GLOO_SOCKET_IFNAME": f"planveth{rank}"}
                processes.append(subprocess.Popen(command, env={**environment, **interface}))
            codes = [process.wait(timeout=200) for process in processes]
        finally:
            for process in processes:
                process.kill()
            remove_cables(workers)
        if any(codes):
            raise RuntimeError(f"the processes ended with the exit codes {codes}")
        return json.loads(out.read_text())


def lines(workers: int, measured: dict) -> Iterator[tuple[dict, str]]:
    """One record an interval, measured and predicted seconds a round, and what to say of it."""
    link = Link(RATE_GBPS, measured["latency_seconds"], PAYLOAD_SHARE)
    for name, pairs in measured["rounds"].items():
        interval = int(name)
        step = statistics.median(alone for alone, _ in pairs) / interval
        seconds = statistics.median(whole for _, whole in pairs)
        predicted = estimate(Plan(measured["parameters"], workers, step, link, interval=interval))
        record = {
            **machine.origin("cpu"),
            "threads": 1,
            "cores": os.cpu_count(),
            "link": f"tc tbf {RATE_GBPS} Gb/s, burst {BURST_BYTES} B, queue {QUEUE_MS} ms; gloo; payload share "
            f"{PAYLOAD_SHARE:.4f}",
            "workers": workers,
            "interval": interval,
            "parameters": measured["parameters"],
            "batch": BATCH,
            "step_seconds": round(step, 6),
            "latency_seconds": round(measured["latency_seconds"], 7),
            "sync_seconds": round(statistics.median(measured["sync_seconds"]), 4),
            "sync_seconds_predicted": round(predicted.sync_seconds, 4),
            "round_seconds": round(seconds, 4),
            "steps_alone_and_round_seconds": [[round(value, 4) for value in pair] for pair in pairs],
            "round_seconds_predicted": round(predicted.step_seconds * interval, 4),
            "error": round(predicted.step_seconds * interval / seconds - 1, 4),
        }
        said = (
            f"{workers} workers, interval {record['interval']:3d}: {record['round_seconds']:.3f} s a round, "
            f"predicted {record['round_seconds_predicted']:.3f} ({100 * record['error']:+.1f} %)"
        )
        yield record, said


def measure_and_record(
    description: str | None,
    program: str,
    workers: Sequence[int],
    work: Callable[[int], dict],
    lines: Callable[[int, dict], Iterable[tuple[dict, str]]],
) -> None:
    """The command line of a program that measures behind links; each of its processes runs it again, with --rank.

    Args:
        description: of the program.
        program: its file.
        workers: numbers of processes to measure, by default.
        work: what one of so many processes measures.
        lines: the records of so many processes' measurement, each with what to say of it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workers", type=int, nargs="+", default=list(workers))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        take_part(arguments.rank, arguments.workers[0], work, arguments.out)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go in any case
    if os.geteuid() != 0:
        parser.error("namespaces and traffic shaping need root")
    for count in arguments.workers:
        for record, said in lines(count, measure(count, program)):
            machine.append_rows(arguments.out, record)
            print(said)


if __name__ == "__main__":
    measure_and_record(__doc__, __file__, [2, 3, 4], work, lines)
