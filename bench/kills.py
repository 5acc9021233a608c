"""Kill a run at random, again and again, and compare it with one that was left in peace.

    python bench/kills.py [--processes 2] [--kills 20] [--out bench/results/kills.jsonl]

torchrun starts the processes anew after each SIGKILL, and they go on from the last checkpoint. A round that was lost
or repeated would leave other parameters: both runs must end with the same bits and the same records.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import fastlocal

RUN = ["--synthetic-images", "2000", "--batch-size", "16", "--interval", "8", "--method", "slowmo", "--epochs", "40"]
CLOCK = ("train_seconds", "sync_seconds")


def start(processes: int, restarts: int, out: Path) -> subprocess.Popen:
    """The run under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", "fastlocal", "train", "--workers", str(processes), *RUN]
    return subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def outcome(folder: Path) -> tuple[list[dict], list[dict]]:
    """All workers' parameters, and the records without what the clock says."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return state["workers"], [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def main() -> None:
    """Run both, kill one, compare, print a line and append it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng, moments = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        peaceful, killed = Path(folder) / "peaceful", Path(folder) / "killed"
        if start(arguments.processes, 0, peaceful).wait():
            raise SystemExit("the run that nobody disturbs failed")
        process = start(arguments.processes, arguments.kills, killed)
        checkpoint, seen = killed / "checkpoint.pt", 0
        for _ in range(arguments.kills):
            while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen:  # it makes progress in between
                if process.poll() is not None:
                    raise SystemExit(f"the run ended after {len(moments)} kills: give it more epochs")
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            seen = checkpoint.stat().st_mtime_ns
            victim = rng.randrange(arguments.processes)
            os.kill(children(process)[victim], signal.SIGKILL)
            moments.append(victim)
        if process.wait():
            raise SystemExit("the killed run did not come to its end")
        (workers, records), (workers2, records2) = outcome(peaceful), outcome(killed)
    same_bits = all(
        torch.equal(one[name], other[name]) for one, other in zip(workers, workers2, strict=True) for name in one
    )
    row = {
        "processes": arguments.processes,
        "killed_ranks": moments,
        "epochs": len(records),
        "rounds": records[-1]["rounds"],
        "same_bits": same_bits,
        "same_records": records == records2,
        "torch": torch.__version__,
        "fastlocal": fastlocal.__version__,
    }
    print(json.dumps(row))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if not (same_bits and records == records2):
        raise SystemExit("the runs differ")


if __name__ == "__main__":
    main()
